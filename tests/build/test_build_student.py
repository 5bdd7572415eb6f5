"""build_student.py and releases.py on a tiny checkpoint: what is published, and what is not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from build import build_cross_encoder, build_student, build_teacher, finish_engine, releases
from build.build_student import Config
from build.cascade import read_first_arm
from build.export_onnx import Encoder, export
from build.gate import GateLimits
from build.judged_pairs import read_judged
from build.running_server import RunningServer
from build.triton_config import (
    ServingLimits,
    as_text,
    bucket_lengths,
    encoder_config,
    front_config,
    read_config,
    row_steps,
)
from ranking.card import ScoreCard
from ranking.chunks import Chunking
from ranking.errors import InputError, Refused
from ranking.prior import PriorBlend
from ranking.text import StudentFormat
from serving.front.buckets import cut
from tests.helpers.foreign_encoders import make_encoder
from tests.helpers.tiny_student import make_judged
from tests.helpers.tiny_teacher import make_teacher
from training.evaluation.published_arm import PublishedArm

ROOT = Path(__file__).parents[2]
NO_TENSORRT = not finish_engine.tensorrt_engine.is_available()


@pytest.fixture
def build(checkpoint, data, tmp_path, exported, monkeypatch):
    """A function that builds into tmp_path/repository; the export, which the other tests make, is not made again."""

    def copy_export(encoder, path):
        if not isinstance(encoder, Encoder):
            return export(encoder, path)
        path.write_bytes(exported.read_bytes())
        return path

    monkeypatch.setattr(build_student, "export", copy_export)

    def make(target: str = "openvino", **settings) -> Path:
        settings = {
            "precision": "fp32",
            "repository": tmp_path / "repository",
            "staging": tmp_path / "engine",
        } | settings
        build_student.main(Config(checkpoint, "student", target, data, **settings))
        return tmp_path / "repository"

    return make


def test_versions_are_numbered_listed_promoted_and_rolled_back(build):
    repository = build()
    first = {p: p.read_bytes() for p in (repository / "student" / "1").rglob("*") if p.is_file()}
    build(promote=False)
    build()
    assert releases.versions(repository, "student") == [1, 2, 3]
    assert releases.serving_versions(repository, "student") == [3]
    assert {p: p.read_bytes() for p in first} == first
    assert releases.rollback(repository, "student") == 1
    assert releases.serving_versions(repository, "student") == [1]
    releases.promote(repository, "student", 2)
    assert releases.rollback(repository, "student") == 1
    table = releases.table(repository, "student").splitlines()
    assert [line[0] for line in table[1:]] == ["*", " ", " "] and "fp32" in table[1] and "1.0000" in table[1]
    with pytest.raises(InputError, match="nothing to roll back to"):
        releases.rollback(repository, "student")
    with pytest.raises(InputError, match=r"student_encoder/7|student/7"):
        releases.promote(repository, "student", 7)
    assert not list(repository.rglob(".*.part"))
    card = repository / "student" / "2" / "ranker.json"
    card.rename(repository / "elsewhere.json")
    card.symlink_to(repository / "elsewhere.json")  # the same bytes today
    with pytest.raises(InputError, match=r"ranker\.json: missing or changed since it was published"):
        releases.promote(repository, "student", 2)


def stop(*_, **__):
    raise KeyboardInterrupt


def test_a_rollback_goes_to_the_version_promoted_last_where_a_promotion_was_cut_off(build, monkeypatch):
    """Seen: to the version before it, because the one that served was not in the history yet."""
    repository = build()
    build()
    build(promote=False)
    history = repository / "student" / "promoted.json"
    with monkeypatch.context() as patch:
        patch.setattr(releases, "write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            releases.promote(repository, "student", 3)
    assert releases.serving_versions(repository, "student") == [3] and json.loads(history.read_text()) == [1, 2]
    assert releases.rollback(repository, "student") == 2
    assert releases.serving_versions(repository, "student_encoder") == [2] and json.loads(history.read_text()) == [1, 2]


def test_a_rollback_that_was_killed_is_finished_by_the_next_one_and_one_that_was_stopped_is_undone(build, monkeypatch):
    repository = build()
    build()
    history, seen = repository / "student" / "promoted.json", []

    def stop_serving(*_) -> None:
        seen.append(history.read_text())  # what a kill would leave
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(releases, "_serve", stop_serving)
        with pytest.raises(KeyboardInterrupt):
            releases.rollback(repository, "student")
    assert json.loads(history.read_text()) == [1, 2] and releases.serving_versions(repository, "student") == [2]
    history.write_text(seen[0])
    assert releases.rollback(repository, "student") == 1
    with pytest.raises(InputError, match="nothing to roll back to"):
        releases.rollback(repository, "student")


def test_a_first_promotion_that_is_stopped_leaves_nothing_that_serves(build, monkeypatch):
    repository = build(promote=False)
    plain = releases.write_text

    def stop_at_the_front(path, text):
        (stop if path.parent.name == "student" else plain)(path, text)

    monkeypatch.setattr(releases, "write_text", stop_at_the_front)
    with pytest.raises(KeyboardInterrupt):
        releases.promote(repository, "student", 1)
    assert not list(repository.glob("*/config.pbtxt")) and releases.serving_versions(repository, "student") == []


class Server(RunningServer):
    """A server's answers: it has loaded what config.pbtxt said. Ctrl-C comes once it has loaded the model `stop_at`."""

    def __init__(self, repository: Path, stop_at: str = ""):
        super().__init__("server:8001")
        self.repository, self.stop_at, self.loaded = repository, stop_at, {}

    def load(self, model):
        self.loaded[model] = releases.serving_versions(self.repository, model)
        if model == self.stop_at:
            self.stop_at = ""
            raise KeyboardInterrupt

    def unload(self, model):
        self.loaded.pop(model, None)

    def is_ready(self, model):
        return model in self.loaded

    def versions(self, model, *states):
        return self.loaded.get(model, [])


@pytest.mark.parametrize("stop_at", ["student_encoder", "student"])
def test_all_servers_and_files_go_back_when_a_promotion_is_interrupted(build, stop_at):
    repository = build(promote=False)
    servers = [Server(repository), Server(repository, stop_at)]
    with pytest.raises(KeyboardInterrupt):
        releases.promote(repository, "student", 1, servers)
    assert [server.loaded for server in servers] == [{}, {}]
    assert not list(repository.glob("*/config.pbtxt")) and releases.read_history(repository, "student") == []
    releases.promote(repository, "student", 1, servers)
    build(promote=False)
    servers[1].stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        releases.promote(repository, "student", 2, servers)
    assert [server.loaded for server in servers] == [{"student": [1], "student_encoder": [1]}] * 2
    assert [releases.serving_versions(repository, name) for name in ("student", "student_encoder")] == [[1], [1]]
    assert releases.read_history(repository, "student") == [1]


def test_two_operators_change_a_repository_one_after_the_other(build):
    """Seen: the second one's encoder took the place of the first one's, whose front then had nobody to ask."""
    repository = build()
    for _ in range(2):
        build(promote=False)
    goes_on = threading.Event()

    class Slow(Server):
        loads = 0

        def load(self, model):
            super().load(model)
            self.loads += 1
            goes_on.wait(60)

    server = Slow(repository)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(releases.promote, repository, "student", 2, [server])
        while not server.loads:
            time.sleep(0.01)
        second = pool.submit(releases.promote, repository, "student", 3, [server])
        time.sleep(0.2)
        assert server.loads == 1
        goes_on.set()
        first.result(), second.result()
    assert server.loaded == {"student": [3], "student_encoder": [3]}
    assert releases.read_history(repository, "student") == [1, 2, 3]


def test_a_server_that_is_down_is_told_before_any_is_changed(build):
    """Seen: a rollback went to the first server and back again, and nothing said how to roll back the others."""
    repository = build()
    build(promote=False)
    server = Server(repository)
    releases.promote(repository, "student", 1, [server])
    loaded = dict(server.loaded)
    server.load = lambda model: pytest.fail(f"{model} was loaded")
    down = RunningServer("127.0.0.1:1")
    with pytest.raises(InputError, match=r"127\.0\.0\.1:1: .*no server was changed\. One that is down may be left out"):
        releases.promote(repository, "student", 2, [server, down])
    assert server.loaded == loaded and releases.serving_versions(repository, "student") == [1]


def test_a_reload_finishes_one_that_was_stopped(build):
    """Seen: a cascade's small network, which the stopped one had unloaded, was left out by the next."""
    repository = build()
    (repository / "student_first_encoder" / "1").mkdir(parents=True)
    server = Server(repository)
    server.loaded = {"student": [1], "student_encoder": [1]}
    releases.reload(repository, "student", [server])
    assert set(server.loaded) == {"student", "student_encoder", "student_first_encoder"}
    server.loaded = {}
    releases.reload(repository, "student", [server])
    assert set(server.loaded) == {"student", "student_encoder", "student_first_encoder"}


def test_a_version_that_waits_beside_nothing_that_serves_is_warned_of(build, caplog):
    """Seen: no server of the whole repository started again, since Triton takes every folder for a model."""
    repository = build(promote=False)
    assert "student_encoder, student: no version of it was ever promoted" in caplog.text
    releases.promote(repository, "student", 1)
    caplog.clear()
    build(promote=False)
    assert "ever promoted" not in caplog.text


@pytest.mark.parametrize("content", ["[1,", '{"versions": [1]}', '["1"]'])
def test_a_damaged_history_is_named(build, content):
    repository = build()
    (repository / "student" / "promoted.json").write_text(content)
    with pytest.raises(InputError, match=r"promoted\.json: "):
        releases.rollback(repository, "student")


def test_a_server_of_a_bucket_is_not_asked_to_load_what_is_not_there_yet(build, monkeypatch):
    repository = build()
    monkeypatch.setattr(releases, "addressed", lambda path: "s3://bucket/models")
    asked = releases.Config("student", "promote", repository=repository, url=["127.0.0.1:1"])
    with pytest.raises(InputError, match=r"--url: what changes in s3://bucket/models .* leave --url out"):
        releases.main(asked)
    releases.main(replace(asked, url=[]))


def test_an_arm_and_a_teacher_never_take_each_others_folder(build, checkpoint, data, tmp_path):
    """Seen: an encoder reranker of an arm's name took all published versions of that arm away."""
    repository = build()
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    encoder, decoder = make_encoder(tmp_path / "encoder", "bert"), make_teacher(tmp_path / "teacher")
    with pytest.raises(InputError, match="student: holds the published versions of an arm"):
        build_cross_encoder.main(build_cross_encoder.Config(encoder, "student", repository=repository))
    with pytest.raises(InputError, match="student: holds the published versions of an arm"):
        build_teacher.main(build_teacher.Config(decoder, "student", repository=repository))
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before
    build_cross_encoder.main(build_cross_encoder.Config(encoder, "foreign", repository=repository))
    with pytest.raises(InputError, match=r"foreign: version 1 lacks manifest\.json, so it is no arm's"):
        build_student.main(Config(checkpoint, "foreign", "openvino", data, repository=repository))


def test_numbers_that_cannot_be_are_refused_before_anything_is_built(tmp_path):
    for name in ("threads", "queue_delay_us"):
        with pytest.raises(ValueError, match=f"{name} is -1: 0 or more"):
            ServingLimits(**{name: -1})
    with pytest.raises(ValueError, match="streams is 0: at least 1"):
        ServingLimits(streams=0)
    with pytest.raises(ValueError, match="calibration_pairs: at least 1"):
        Config(tmp_path, "student", "openvino", tmp_path, calibration_pairs=0)


@pytest.mark.parametrize("name", ["student_encoder", "student_first", "student_first_encoder", "../student"])
def test_no_model_has_the_name_of_an_arms_network(name, tmp_path):
    """Seen: the cascade student published its small network as a version of the arm student_first's own."""
    with pytest.raises(ValueError, match=r"choose another|letters, digits"):
        Config(tmp_path, name, "openvino", tmp_path)
    with pytest.raises(ValueError, match=r"choose another|letters, digits"):
        build_cross_encoder.Config(tmp_path, name)
    with pytest.raises(ValueError, match=r"choose another|letters, digits"):
        build_teacher.Config(tmp_path, name)


def test_nothing_that_is_published_tells_a_path_of_the_machine_that_built_it(build, checkpoint, data):
    """Seen: the manifest and the score card held absolute paths."""
    card = ScoreCard.load(checkpoint)
    card.base_model = str(checkpoint.parent / "base")
    card.save(checkpoint)
    try:
        repository = build()
    finally:
        card.base_model = ""
        card.save(checkpoint)
    told = [str(folder).encode() for folder in (checkpoint.parent, data, Path.cwd(), Path(sys.prefix))]
    for path in (path for path in repository.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert not [folder for folder in told if folder in content], path
    assert ScoreCard.load(repository / "student" / "1").base_model == "base"


def test_the_encoders_queue_takes_all_that_the_fronts_can_send_and_is_bounded(build):
    """Seen: no limit, so that whoever asked the encoder itself filled the server's memory."""
    limits = ServingLimits(max_documents=50, max_batch=4, batch_tokens=64, front_instances=3)
    repository = build(serving=limits)
    front, encoder = (read_config(repository / name / "config.pbtxt") for name in ("student", "student_encoder"))
    edges = [int(edge) for edge in front.parameters["lengths"].string_value.split(",")]
    assert not encoder.HasField("dynamic_batching")  # OpenVINO's: a queue policy leaves its calls waiting
    tensorrt = encoder_config("student", "tensorrt", limits, edges, {}, {})
    policy = tensorrt.dynamic_batching.default_queue_policy
    rng = np.random.default_rng(0)
    calls = [
        len(cut(rng.integers(3, edges[-1] + 1, 50).tolist(), edges, 4, 64, call_tokens)) for call_tokens in range(100)
    ]
    assert 3 * max(calls) <= policy.max_queue_size <= 3 * (50 + len(edges))
    assert policy.timeout_action == policy.REJECT and policy.default_timeout_microseconds == 30_000_000


def test_served_chunks_are_gated_limited_and_told(build, checkpoint, data):
    """An arm that serves fewer chunks than its checkpoint reads is another ranker, and nothing may take it for that."""
    card, folder = ScoreCard.load(checkpoint), checkpoint
    long = replace(
        card, limits=replace(card.limits, max_summary_tokens=8), chunking=Chunking(5, 2),
        calibration={"kind": "platt", "slope": 1.0, "intercept": 0.0},
    )  # fmt: skip
    long.save(folder)
    try:
        repository = build(serves_now="none", serving=ServingLimits(max_chunks=3))
        build(serves_now="none", serving=ServingLimits(max_chunks=9))
        with pytest.raises(InputError, match="serves at most 3 chunks"):
            PublishedArm.read(f"{repository / 'student' / '1'},{folder}")
        assert PublishedArm.read(f"{repository / 'student' / '2'},{folder}").checkpoint == folder
        with pytest.raises(InputError, match="5 chunks of a document, a cascade one: give --serving"):
            build(cascade_first="small")
        with pytest.raises(InputError, match="cascade_first student: version 2 reads up to 5 chunks of a document"):
            read_first_arm(repository, "student", read_judged(data, "dev", StudentFormat.of_checkpoint(folder), 5))
    finally:
        card.save(folder)  # the other tests' checkpoint
    kept = [ScoreCard.load(repository / "student" / version) for version in "12"]
    assert [each.chunking for each in kept] == [Chunking(3, 2), Chunking(5, 2)]
    assert kept[0].calibration is None and kept[1].calibration == long.calibration
    fronts = [read_config(repository / "student" / version / "config.pbtxt") for version in "12"]
    assert [front.parameters["max_chunks"].string_value for front in fronts] == ["3", "5"]
    assert "max_chunks" in {tensor.name for tensor in fronts[0].input}
    scores = [np.load(repository / "student" / version / "judged_scores.npz")["scores"] for version in "12"]
    assert (scores[0] <= scores[1] + 1e-5).all() and (scores[0] < scores[1] - 1e-3).any()
    first, second = (front.metric_tags["checkpoint"] for front in fronts)
    assert first == f"{second}-3-chunks"


def test_the_manifest_says_what_was_built_from_what(build, checkpoint):
    manifest = releases.manifest(build(), "student", 1)
    assert manifest["gate"]["tau"] == 1 and manifest["precision"] == "fp32" and manifest["accepted_drop"] == []
    assert manifest["checkpoint"]["card"]["role"] == "student" and manifest["tools"]["openvino"]
    assert manifest["onnx"]["parity_error"] < 1e-4 and manifest["tried"]["fp32"]["pairs_per_second"] > 0
    assert {"model.py", "tokenizer.json", "ranker.json", "ranking/text.py"} <= set(manifest["files"])


def test_a_build_that_fails_the_gate_publishes_nothing_and_says_what_to_do(build, tmp_path):
    strict = GateLimits(max_error=1e-9)
    with pytest.raises(Refused, match=r"not published: fp32: max error .* the query that moved most is '"):
        build(gate=strict)
    assert not (tmp_path / "repository").exists()


def test_an_accepted_drop_is_published_and_recorded(build):
    repository = build(gate=GateLimits(max_error=1e-9, mean_error=1e-12), accept_drop=True)
    assert len(releases.manifest(repository, "student", 1)["accepted_drop"]) == 2


@pytest.fixture
def auto(build, monkeypatch):
    """Builds with --precision auto on a CPU with these precisions, of these speeds; the gate refuses those named."""

    def make(speeds: dict[str, float], refused: tuple[str, ...] = (), vnni: bool = True) -> dict:
        monkeypatch.setattr(
            build_student.openvino_engine, "cpu_precisions", lambda: [each for each in speeds if each != "int8_groups"]
        )
        monkeypatch.setattr(build_student.openvino_engine, "multiplies_int8", lambda: vnni)
        times = iter(speeds.values())  # in the order of building: groups come last
        monkeypatch.setattr(build_student.openvino_engine, "pairs_per_second", lambda *_: next(times))
        plain = build_student.gate_scores

        def gate_scores(reference, scores, precision, limits):
            limits = GateLimits(-1.0 if precision in refused else 9.0, mean_error=9, min_tau=-1, max_ndcg_change=1)
            return plain(reference, scores, precision, limits)

        monkeypatch.setattr(build_student, "gate_scores", gate_scores)
        return releases.manifest(build(precision="auto"), "student", 1)

    return make


def test_auto_takes_the_fastest_that_passes_and_judges_nothing_slower(auto):
    manifest = auto({"int8": 3.0, "bf16": 4.0, "fp32": 1.0}, refused=("bf16",))
    assert manifest["precision"] == "int8" and list(manifest["tried"]) == ["int8", "bf16", "fp32"]
    judged = {name: each["gate"]["objections"] for name, each in manifest["tried"].items() if "gate" in each}
    assert judged["int8"] == [] and judged["bf16"] and "fp32" not in judged
    assert manifest["tried"]["fp32"]["pairs_per_second"] == 1


def test_a_precision_whose_scores_are_no_numbers_is_passed_over(auto, monkeypatch):
    """Seen: its infinite error could not be written, so that the one that had passed was not published."""
    plain = build_student.score_documents

    def score_documents(runner, documents, pad_id, label):
        scores = plain(runner, documents, pad_id, label)
        return np.full_like(scores, np.nan) if label == "bf16" else scores

    monkeypatch.setattr(build_student, "score_documents", score_documents)
    manifest = auto({"int8": 1.0, "bf16": 4.0, "fp32": 2.0})
    assert manifest["precision"] == "fp32" and manifest["tried"]["bf16"]["gate"]["not_finite"] == 120
    assert manifest["tried"]["bf16"]["gate"]["max_error"] is None


def test_int8_in_groups_is_built_where_whole_int8_fails_and_there_is_no_bf16(auto):
    manifest = auto({"int8": 3.0, "fp32": 1.0, "int8_groups": 2.0}, refused=("int8",))
    assert manifest["precision"] == "int8_groups" and manifest["tried"]["int8_groups"]["group"] == 32
    assert "gate" not in manifest["tried"]["fp32"]


def test_int8_in_groups_is_not_built_where_it_would_compute_in_fp32(auto):
    manifest = auto({"int8": 3.0, "fp32": 1.0}, refused=("int8",), vnni=False)
    assert manifest["precision"] == "fp32" and "int8_groups" not in manifest["tried"]


def test_int8_in_groups_is_not_built_beside_bf16(auto):
    manifest = auto({"int8": 3.0, "bf16": 2.0, "fp32": 1.0}, refused=("int8",))
    assert manifest["precision"] == "bf16" and "int8_groups" not in manifest["tried"]


def test_where_every_precision_fails_the_export_is_blamed(auto):
    """Not a precision that has just failed, in whatever order they were judged."""
    with pytest.raises(InputError, match=r"int8.*int8_groups.*fp32.*; the export itself is wrong") as refused:
        auto({"int8": 3.0, "fp32": 2.0, "int8_groups": 1.0}, refused=("int8", "fp32", "int8_groups"))
    assert "try --precision" not in str(refused.value)


@pytest.mark.skipif(not NO_TENSORRT, reason="TensorRT is installed: the build would be finished here")
def test_without_tensorrt_the_cast_graph_is_gated_and_staged_and_the_command_printed(build, tmp_path, capsys):
    repository = build("tensorrt", precision="fp16", gate=GateLimits(min_tau=0.97, max_ndcg_change=0.02))
    staged = tmp_path / "engine" / "student"
    assert f"docker compose run --rm build-engine --staged {staged}" in capsys.readouterr().out
    assert not repository.exists()
    facts, documents, reference = finish_engine.read_stage(staged)
    assert facts["cast_gate"]["tau"] > 0.97 and facts["lengths"] == [32, 64]
    assert (facts["serving"]["graph"], facts["serving"]["call_tokens"], facts["kept_fp32"]) == ("fused", 1024, [])
    assert (
        len(documents) == len(documents.pairs) == len(reference.scores) == 120 and np.isfinite(reference.scores).all()
    )
    with pytest.raises(InputError, match="TensorRT is not installed here"):
        finish_engine.main(finish_engine.Config(staged, repository=repository))
    (staged / "cast.onnx").write_bytes(b"another graph")
    with pytest.raises(InputError, match="not the graph that passed the gate"):
        finish_engine.read_stage(staged)


@pytest.mark.skipif(not NO_TENSORRT, reason="TensorRT is installed: the build would be finished here")
@pytest.mark.parametrize(("promote", "serving"), [(True, [1]), (False, [])])
def test_what_was_staged_not_to_serve_does_not_serve_once_finished(build, promote, serving, tmp_path, monkeypatch):
    """The GPU's part is played by ONNX Runtime. Seen: the printed command promoted whatever --no-promote had said."""
    build("tensorrt", precision="fp16", promote=promote, gate=GateLimits(min_tau=0.97, max_ndcg_change=0.02))
    staged, gpu = tmp_path / "engine" / "student", finish_engine.tensorrt_engine

    def no_inspector(_):
        raise InputError("no inspector")

    monkeypatch.setattr(gpu, "build_engine", lambda graph, folder, *_: shutil.copy(graph, Path(folder) / "model.plan"))
    monkeypatch.setattr(gpu, "engine_runner", lambda engine, _: gpu.cast_runner(engine))
    monkeypatch.setattr(gpu, "engine_information", no_inspector)
    finish_engine.finish(finish_engine.Config(staged, repository=tmp_path / "repository"))
    assert releases.versions(tmp_path / "repository", "student") == [1]
    assert releases.serving_versions(tmp_path / "repository", "student") == serving
    assert "promote" not in releases.manifest(tmp_path / "repository", "student", 1)


@pytest.mark.skipif(not NO_TENSORRT, reason="TensorRT is installed: the build would be finished here")
def test_a_packed_graph_passes_the_same_gate(build, tmp_path):
    limits = ServingLimits(graph="packed")
    build("tensorrt", precision="fp16", serving=limits, gate=GateLimits(min_tau=0.97, max_ndcg_change=0.02))
    facts, _, _ = finish_engine.read_stage(tmp_path / "engine" / "student")
    assert facts["cast_gate"]["tau"] > 0.97 and facts["lengths"] == [64] and facts["kept_fp32"] == []


@pytest.mark.gpu
@pytest.mark.skipif(NO_TENSORRT, reason="TensorRT is not installed")
def test_the_engine_is_built_gated_and_published(build, tmp_path):
    repository = build("tensorrt", precision="fp16", gate=GateLimits(min_tau=0.97, max_ndcg_change=0.02))
    assert (repository / "student_encoder" / "1" / "model.plan").stat().st_size > 10_000


def test_a_dataset_without_lists_is_refused(checkpoint, tmp_path):
    lonely = make_judged(tmp_path / "lonely", documents=1)
    with pytest.raises(InputError, match="no query has two judged documents"):
        build_student.main(Config(checkpoint, "student", "openvino", lonely, repository=tmp_path / "r"))


def configs(target: str, limits: ServingLimits, folder: Path, longest: int = 150):
    """Front and encoder config after a round trip through their text form."""
    lengths = bucket_lengths(limits, target, longest)
    tags = {"arm": "student"}
    for config in (
        front_config("student", target, limits, lengths, tags, PriorBlend(0.35, -0.1, 1.25)),
        encoder_config("student", target, limits, lengths, tags, {"NUM_STREAMS": "1"}),
    ):
        (folder / "config.pbtxt").write_text(as_text(config), encoding="utf-8")
        read = read_config(folder / "config.pbtxt")
        assert read == config
        yield read


def parameter(config, name: str) -> str:
    return config.parameters[name].string_value


def test_openvino_configs_survive_their_text_form(tmp_path):
    front, encoder = configs("openvino", ServingLimits(), tmp_path)
    assert encoder.max_batch_size == 0 and encoder.backend == "openvino" and encoder.instance_group[0].count == 1
    assert parameter(front, "lengths").endswith("144,150") and parameter(front, "batch_tokens") == "4096"
    assert front.instance_group[0].count == 2 and parameter(front, "layout") == "padded"


def test_a_gpu_gets_fewer_and_larger_calls_and_more_processes_that_tokenise(tmp_path):
    front, encoder = configs("tensorrt", ServingLimits(), tmp_path)
    assert parameter(front, "lengths") == "32,64,96,128,152"
    assert (parameter(front, "call_tokens"), parameter(front, "batch_tokens")) == ("1024", "16384")
    assert front.instance_group[0].count == 8 and encoder.instance_group[0].count == 2
    assert list(encoder.instance_group[0].profile) == ["0", "1", "2", "3", "4"]
    assert encoder.dynamic_batching.max_queue_delay_microseconds and encoder.max_batch_size == 256
    assert not encoder.dynamic_batching.preferred_batch_size and not encoder.optimization.cuda.graphs
    assert parameter(encoder, "execution_context_allocation_strategy") == "ON_PROFILE_CHANGE"
    _, static = configs("tensorrt", ServingLimits(memory_on_profile_change=False, encoder_instances=1), tmp_path)
    assert "execution_context_allocation_strategy" not in static.parameters and static.instance_group[0].count == 1


def test_cuda_graphs_are_captured_for_the_row_counts_that_the_front_pads_to(tmp_path):
    front, encoder = configs("tensorrt", ServingLimits(cuda_graphs=True, max_batch=48), tmp_path, longest=60)
    specs = {(spec.batch_size, spec.input["input_ids"].dim[0]) for spec in encoder.optimization.cuda.graph_spec}
    assert encoder.optimization.cuda.graphs and specs == {
        (n, length) for n in (8, 16, 24, 32, 48) for length in (32, 64)
    }
    assert parameter(front, "row_steps") == "8,16,24,32,48"
    # seen: 64 rows for 50 pairs, of which the encoder takes no more than 56
    assert row_steps(ServingLimits(cuda_graphs=True, max_batch=56), "tensorrt") == (8, 16, 24, 32, 48)
    with pytest.raises(ValueError, match="cuda_graphs: a packed list has too many possible sizes"):
        ServingLimits(cuda_graphs=True, graph="packed")


def test_packed_lists_are_ragged_inputs_and_scores_go_back_by_each_lists_lengths(tmp_path):
    front, encoder = configs("tensorrt", ServingLimits(graph="packed"), tmp_path)
    assert [(tensor.name, tensor.allow_ragged_batch) for tensor in encoder.input] == [
        ("input_ids", True), ("token_type_ids", True), ("position_ids", True), ("lengths", True),
    ]  # fmt: skip
    (scatter,) = encoder.batch_output
    assert (list(scatter.target_name), list(scatter.source_input)) == (["logits"], ["lengths"])
    assert encoder.max_batch_size == 4 and list(encoder.instance_group[0].profile) == ["0"]
    assert parameter(front, "layout") == "packed" and parameter(front, "row_steps") == ""


def test_the_command_answers_bad_input_in_one_line(tmp_path):
    command = [sys.executable, "build/releases.py", "--name", "student", "--repository", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "no published version" in done.stderr and "Traceback" not in done.stderr


def test_a_history_is_plain_json(build):
    repository = build()
    assert json.loads((repository / "student" / "promoted.json").read_text()) == [1]
