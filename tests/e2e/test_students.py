"""Students on a real tritonserver: both arms, limits, version changes under load. One server for the whole file."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pytest
import tritonclient.grpc as grpc
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException

from build import releases
from build.build_student import Config, main
from build.export_onnx import example_inputs, load_encoder, torch_runner
from build.runners import score_pairs
from build.running_server import RunningServer
from build.triton_config import ServingLimits, as_text, read_config
from clients.ab.log.compaction import compact
from clients.ab.router.local_router import start_router
from clients.label_corpus import Config as LabelConfig
from clients.label_corpus import main as label_corpus
from clients.triton.connection import TritonConnection
from clients.triton.reranker import AsyncReranker, Reranker, RerankError
from clients.triton.scoring import PageTensors, ScoringClient
from ranking.calibration import ece, probability
from ranking.card import ScoreCard, fingerprint
from ranking.chunks import Chunking
from ranking.encoder_inputs import INPUTS
from ranking.errors import InputError
from ranking.first_stage import first_stage_scores
from ranking.labels import LabelSet, iter_labelled
from ranking.prior import PriorBlend, standardised
from ranking.query_engine import QueryEngineSettings
from ranking.request_tensors import request_tensors, token_tensors
from ranking.schema import read_table, write_table
from ranking.text import StudentFormat
from serving.temporary_server import TritonServer, start_triton
from tests.helpers.tiny_student import make_judged, make_student, sentence
from training.evaluation.checkpoint_scores import score_pairs as training_scores

TITLES = ["night train", "the red queen", "", "moon", "winter ghost story"]
SUMMARIES = ["a doctor and a robot", "king and ship " * 12, "blue", "", "dream city star house " * 4]
LIMITS = ServingLimits(
    max_documents=60, queue_size=4, queue_timeout_ms=120_000, threads=1, batch_tokens=512, call_tokens=16
)


@dataclass
class Served:
    server: TritonServer
    repository: Path
    checkpoints: dict[str, Path]

    def reranker(self, model: str = "student", **more) -> Reranker:
        return Reranker([f"grpc://{self.server.grpc}"], model, **{"deadline_ms": 20_000.0, **more})


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("students")
    data = make_judged(folder / "data")
    repository = folder / "repository"
    checkpoints = {
        "student": make_student(folder / "student", seed=1),
        "baseline": make_student(folder / "baseline", "baseline", seed=2),
        "newer": make_student(folder / "newer", seed=3),
        "long": make_student(folder / "long", seed=4),
    }
    # the judged summaries have up to 30 words, of which this one reads 8 at a time
    card = ScoreCard.load(checkpoints["long"])
    replace(card, limits=replace(card.limits, max_summary_tokens=8), chunking=Chunking(6, 3)).save(checkpoints["long"])
    liked = _data_that_likes(checkpoints["baseline"], data)
    card = ScoreCard.load(checkpoints["baseline"])
    card.calibration = {"kind": "platt", "slope": 0.8, "intercept": -0.3}
    card.save(checkpoints["baseline"])
    others, limits = {"long": "none"}, {"long": replace(LIMITS, front_instances=1, score_cache_mb=1)}
    for checkpoint, name in (("student", "student"), ("baseline", "baseline"), ("newer", "student"), ("long", "long")):
        first = not (repository / name).exists()
        main(
            Config(
                checkpoints[checkpoint], name, "openvino", liked if name == "baseline" else data,
                repository=repository, precision="fp32", serving=limits.get(name, LIMITS), promote=first,
                accept_worse="random weights" if name in ("baseline", "long") else "", serves_now=others.get(name, ""),
            )
        )  # fmt: skip
    _add_merging_encoder(repository)
    with start_triton(repository, "--model-control-mode=explicit", "--load-model=*") as server:
        yield Served(server, repository, checkpoints)


def _data_that_likes(checkpoint: Path, data: Path) -> Path:
    """The judged data with grades that follow a checkpoint's score and BM25, so that both tell of relevance."""
    folder = data.with_name("liked")
    shutil.copytree(data, folder)
    path = folder / "judgments" / "dev.parquet"
    table = read_table(path, "judgments")
    text = StudentFormat.of_checkpoint(checkpoint)
    pairs = text.encode(*(table.column(name).to_pylist() for name in ("query", "title", "summary")))
    scores = score_pairs(torch_runner(load_encoder(checkpoint)), pairs, text.pad_id)
    _, groups = np.unique(table.column("query_id").to_pylist(), return_inverse=True)
    bm25, _ = standardised(first_stage_scores(None, folder, table).astype(np.float64), groups)
    merit = 1.5 * (scores - scores.mean()) / scores.std() + bm25 + np.random.default_rng(0).normal(0, 0.5, len(scores))
    grades = np.digitize(merit, np.quantile(merit, [0.5, 0.8])).astype(np.int8)
    place = table.schema.get_field_index("grade")
    write_table(path, "judgments", table.set_column(place, table.schema.field(place), pa.array(grades)))
    return folder


def _add_merging_encoder(repository: Path) -> None:
    """A copy of the student's encoder whose requests Triton's batcher merges."""
    shutil.copytree(repository / "student_encoder" / "1", repository / "merging" / "1")
    config = read_config(repository / "student_encoder" / "config.pbtxt")
    config.name, config.max_batch_size = "merging", 16
    for tensor in (*config.input, *config.output):
        del tensor.dims[0]
    del config.model_warmup[:]
    config.dynamic_batching.max_queue_delay_microseconds = 20_000_000  # until all 8 documents are there, however slowly
    config.dynamic_batching.preferred_batch_size.append(8)
    (repository / "merging" / "config.pbtxt").write_text(as_text(config), encoding="utf-8")


def checkpoint_scores(checkpoint: Path, query: str, titles: list[str], summaries: list[str]) -> np.ndarray:
    text = StudentFormat.of_checkpoint(checkpoint)
    pairs = text.encode([query] * len(titles), titles, summaries)
    return score_pairs(torch_runner(load_encoder(checkpoint)), pairs, text.pad_id)


@pytest.mark.parametrize("arm", ["student", "baseline"])
def test_both_arms_give_their_checkpoints_scores(served, arm):
    with served.reranker(arm) as ranker:
        ranking = ranker.rank("red night", TITLES, SUMMARIES)
    expected = checkpoint_scores(served.checkpoints[arm], "red night", TITLES, SUMMARIES)
    np.testing.assert_allclose(ranking.scores, expected, atol=1e-5)
    assert ranking.scores.std() > 1e-3
    assert list(ranking.order) == list(np.argsort(-expected, kind="stable"))


def test_batch_of_one_equals_batch_of_many_in_any_order(served):
    with served.reranker() as ranker:
        together = ranker.rank("moon", TITLES, SUMMARIES).scores
        alone = [ranker.rank("moon", [t], [s]).scores[0] for t, s in zip(TITLES, SUMMARIES)]
        backwards = ranker.rank("moon", TITLES[::-1], SUMMARIES[::-1]).scores
    np.testing.assert_allclose(alone, together, atol=1e-5)
    np.testing.assert_allclose(backwards[::-1], together, atol=1e-5)


def test_http_and_grpc_answer_the_same_bits(served):
    with served.reranker() as ranker, Reranker([f"http://{served.server.http}"], deadline_ms=20_000) as http:
        over_grpc, over_http = (r.rank("moon", TITLES, SUMMARIES) for r in (ranker, http))
    assert over_grpc.scores.tobytes() == over_http.scores.tobytes()
    assert over_grpc.version == over_http.version == "1"


def test_asyncio_over_both_protocols_and_past_a_dead_server(served):
    async def ask(url: str) -> np.ndarray:
        async with AsyncReranker(["http://127.0.0.1:1", url], deadline_ms=20_000) as ranker:
            answers = await asyncio.gather(*(ranker.rank("moon", TITLES, SUMMARIES) for _ in range(4)))
        return np.stack([answer.scores for answer in answers])

    with served.reranker() as ranker:
        expected = ranker.rank("moon", TITLES, SUMMARIES).scores
    for url in (f"grpc://{served.server.grpc}", f"http://{served.server.http}"):
        np.testing.assert_allclose(asyncio.run(ask(url)), np.tile(expected, (4, 1)), atol=1e-6)


def test_token_ids_of_a_caller_who_tokenises_get_the_bits_of_the_text(served):
    checkpoint = served.checkpoints["student"]
    text = StudentFormat.of_checkpoint(checkpoint)
    query, titles, summaries = text.tokenise(["red night"], TITLES, SUMMARIES)
    tensors = token_tensors(query[0], titles, summaries, fingerprint(checkpoint / "tokenizer.json"))
    priors = request_tensors("red night", TITLES, SUMMARIES, [3.0, None, 12.5, 0.0, 7.0])
    for url in (f"grpc://{served.server.grpc}", f"http://{served.server.http}"):
        client = ScoringClient(TritonConnection(url), 20_000)
        for more in ({}, {"prior": priors["prior"]}):
            as_text = client.score(
                "student", PageTensors(request_tensors("red night", TITLES, SUMMARIES) | more), 20_000
            )
            as_ids = client.score("student", PageTensors(tensors | more), 20_000)
            assert as_ids.values.tobytes() == as_text.values.tobytes() and as_text.values.std() > 1e-3
        client.close()


def token_request(**changes) -> dict:
    return token_tensors([60, 61], [[70]], [[80, 81]], "") | changes


BAD_TOKENS = {
    r"vocabulary is '', this version reads '[0-9a-f]{16}'": token_request(),
    "the request has token_ids, token_counts: send query, title and summary, or": {"vocabulary": None},
    "the request has query, token_ids, token_counts, vocabulary: send": {"query": np.array([b"a"], np.object_)},
    "the request has no tensor|did not|expected": {"vocabulary": None, "token_ids": None, "token_counts": None},
    "token_counts has 2 values": {"token_counts": np.array([2, 3], np.int32)},
    "no documents": {"token_counts": np.array([5], np.int32)},
    r"token_counts\[2\] is -1: summary\[0\] has 0 to 40": {"token_counts": np.array([2, 4, -1], np.int32)},
    r"token_counts\[0\] is 9: query has 0 to 8 tokens": {"token_counts": np.array([9, 1, 2], np.int32)},
    r"token_counts\[1\] is 13: title\[0\] has 0 to 12": {"token_counts": np.array([2, 13, 2], np.int32)},
    "query is blank": {"token_counts": np.array([0, 3, 2], np.int32)},
    "token_counts add up to 4, token_ids has 5 values": {"token_counts": np.array([2, 1, 1], np.int32)},
    r"token_ids\[2\] of title\[0\] is 100000: the vocabulary has ids 0 to": {
        "token_ids": np.array([60, 61, 100000, 80, 81], np.int32)
    },
    r"token_ids\[4\] of summary\[0\] is -7: the vocabulary": {"token_ids": np.array([60, 61, 70, 80, -7], np.int32)},
    r"token_ids\[0\] of query is 3: that is a mark": {"token_ids": np.array([3, 61, 70, 80, 81], np.int32)},
}


@pytest.mark.parametrize("message", BAD_TOKENS)
def test_token_ids_that_no_text_is_made_into_are_refused(served, message):
    vocabulary = fingerprint(served.checkpoints["student"] / "tokenizer.json")
    tensors = token_request(vocabulary=np.array([vocabulary.encode()], np.object_)) | BAD_TOKENS[message]
    inputs = TritonConnection(f"grpc://{served.server.grpc}").infer_inputs(
        {name: values for name, values in tensors.items() if values is not None}
    )
    with (
        grpc.InferenceServerClient(served.server.grpc) as client,
        pytest.raises(InferenceServerException, match=message) as refused,
    ):
        client.infer("student", inputs)
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


BAD = {
    "query is blank": {"query": [b" "]},
    "no documents": {"title": [], "summary": []},
    "title has 1 documents, summary has 2": {"title": [b"a"]},
    r"title\[1\] is not valid UTF-8": {"title": [b"a", b"\xff\xfe"]},
    r"summary\[0\] has 1048577 bytes": {"summary": [b"x" * 1048577, b""]},
    "61 documents in one request; at most 60": {"title": [b"a"] * 61, "summary": [b"b"] * 61},
    "10000 documents in one request": {"title": [b"a"] * 10000, "summary": [b"b"] * 10000},
    "unexpected shape for input 'query'": {"query": [b"a", b"b"]},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_request_is_told_so_and_others_are_not_disturbed(served, message):
    fields = {"query": [b"moon"], "title": [b"a", b"b"], "summary": [b"c", b"d"]} | BAD[message]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(served.reranker().rank, "moon", TITLES, SUMMARIES)
        with (
            grpc.InferenceServerClient(served.server.grpc) as client,
            pytest.raises(InferenceServerException, match=message) as refused,
        ):
            client.infer("student", [bytes_input(name, values) for name, values in fields.items()])
        assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert np.isfinite(other.result().scores).all()


def test_a_wrong_tensor_type_is_refused(served):
    number = grpc.InferInput("query", [1], "INT32")
    number.set_data_from_numpy(np.zeros(1, np.int32))
    with (
        grpc.InferenceServerClient(served.server.grpc) as client,
        pytest.raises(InferenceServerException, match="query"),
    ):
        client.infer("student", [number, bytes_input("title", [b"a"]), bytes_input("summary", [b"b"])])


def bytes_input(name: str, values: list[bytes]) -> grpc.InferInput:
    tensor = grpc.InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(np.array(values, dtype=np.object_))
    return tensor


def test_long_documents_are_served_in_chunks_with_the_scores_of_training(served, tmp_path):
    texts = ["", "moon", SUMMARIES[1], SUMMARIES[4] * 3, "queen " * 33]
    expected = training_scores(served.checkpoints["long"], ["red night"] * 5, TITLES, texts)
    with served.reranker("long") as ranker:
        found = ranker.rank("red night", TITLES, texts).scores
        fewer = ranker.rank("red night", TITLES, texts, max_chunks=1).scores
        more = ranker.rank("red night", TITLES, texts, max_chunks=99).scores
        kept = [ranker.rank("red night", TITLES, texts, max_chunks=most).scores for most in (1, 6)]
        with pytest.raises(RerankError, match="max_chunks 0"):
            ranker.rank("red night", TITLES, texts, max_chunks=0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(more, expected, atol=1e-4)
    # the front keeps scores, of each number of chunks its own
    assert [scores.tobytes() for scores in kept] == [fewer.tobytes(), found.tobytes()]
    beginning = shutil.copytree(served.checkpoints["long"], tmp_path / "beginning")
    replace(ScoreCard.load(beginning), chunking=Chunking()).save(beginning)
    short = training_scores(beginning, ["red night"] * 5, TITLES, texts)
    np.testing.assert_allclose(fewer, short, atol=1e-4)
    assert (fewer < found - 1e-3).any() and (fewer <= found + 1e-4).all()
    with grpc.InferenceServerClient(served.server.grpc) as client:
        page = [bytes_input("query", [b"red"]), bytes_input("title", [b"a"] * 3)]
        page.append(bytes_input("summary", [b"", b"queen " * 9, b"queen " * 99]))
        wanted = grpc.InferInput("max_chunks", [1], "INT32").set_data_from_numpy(np.array([-1], np.int32))
        for _ in range(2):  # the second time from the kept scores
            assert client.infer("long", page).as_numpy("chunks").tolist() == [1, 2, 6]
        with pytest.raises(InferenceServerException, match="max_chunks is -1: at least 1"):
            client.infer("long", [*page, wanted])
    fields = StudentFormat.of_checkpoint(served.checkpoints["long"]).tokenise(["red night"], TITLES, texts)
    ids = token_tensors(fields[0][0], *fields[1:], fingerprint(served.checkpoints["long"] / "tokenizer.json"))
    client = ScoringClient(TritonConnection(f"grpc://{served.server.grpc}"), 20_000)
    for most, of_text in ((6, found), (1, fewer)):
        tensors = ids | {"max_chunks": np.array([most], np.int32)}
        assert client.score("long", PageTensors(tensors), 20_000).values.tobytes() == of_text.tobytes()
    client.close()
    manifest = releases.manifest(served.repository, "long", 1)
    assert manifest["gate"]["max_error"] < 1e-3 and manifest["checkpoint"]["card"]["chunking"]["most"] == 6


def test_over_long_text_is_cut_to_the_field_limits(served):
    long = "night " * 20000
    with served.reranker() as ranker:
        cut, short = ranker.rank("moon", [long, "night " * 12], [long, "night " * 40]).scores
    assert cut == pytest.approx(short, abs=1e-5)


def test_concurrent_clients_get_their_own_answers(served):
    rng = random.Random(5)
    lists = [([sentence(rng, 1, 6) for _ in range(9)], [sentence(rng, 0, 40) for _ in range(9)]) for _ in range(8)]
    expected = [checkpoint_scores(served.checkpoints["baseline"], "star", *fields) for fields in lists]

    def ask(number: int) -> float:
        with served.reranker("baseline") as ranker:
            worst = 0.0
            for _ in range(5):
                while True:
                    try:
                        scores = ranker.rank("star", *lists[number]).scores
                        break
                    except RerankError as problem:  # eight callers may find the queue of four full
                        assert "queue" in str(problem)
                        time.sleep(0.02)
                worst = max(worst, float(np.abs(scores - expected[number]).max()))
            return worst

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(ask, range(8))) < 1e-5


def test_a_full_queue_refuses_at_once_while_accepted_requests_finish(served):
    titles, summaries = ["king ship"] * 60, ["story of a robot " * 10] * 60
    answers: list[str] = []  # in order of arrival

    async def flood() -> None:
        async with AsyncReranker([f"grpc://{served.server.grpc}"], "baseline", deadline_ms=120_000) as ranker:

            async def one() -> None:
                try:
                    await ranker.rank("moon", titles, summaries)
                    answers.append("served")
                except RerankError as problem:
                    answers.append("refused" if "Exceeds maximum queue size" in str(problem) else str(problem))

            await asyncio.gather(*(one() for _ in range(40)))

    asyncio.run(flood())
    assert set(answers) == {"served", "refused"} and answers.count("served") >= 4
    assert answers[-1] == "served"  # whoever was refused did not wait for those before it


def test_metrics_are_tagged_with_the_arm(served):
    with served.reranker("baseline") as ranker:
        ranker.rank("moon", TITLES, SUMMARIES)
    text = urllib.request.urlopen(f"http://{served.server.metrics}/metrics").read().decode()
    counted = [line for line in text.splitlines() if line.startswith("nv_inference_request_success")]
    assert any(
        'model="baseline"' in line and 'arm="baseline"' in line and 'role="baseline"' in line for line in counted
    )


def cache_figures(served: Served, model: str) -> dict[str, float]:
    """The caches' metrics of an arm, summed over its front instances, which have series of their own."""
    text = urllib.request.urlopen(f"http://{served.server.metrics}/metrics").read().decode()
    lines = [line for line in text.splitlines() if line.startswith("disranker_") and f'model="{model}"' in line]
    assert len(lines) == len(set(lines))
    figures: dict[str, float] = defaultdict(float)
    for line in lines:
        figures[line.partition("{")[0]] += float(line.rpartition(" ")[2])
    return figures


def test_the_metrics_page_has_the_hit_rate_and_the_size_of_the_field_cache(served):
    titles = [f"a title that was never seen before {number}" for number in range(20)]
    with served.reranker("baseline") as ranker:
        before = cache_figures(served, "baseline")
        for _ in range(6):  # two front instances: at least four of these lists find their fields
            ranker.rank("moon", titles, [""] * 20)
        after = cache_figures(served, "baseline")
    grown = {name: after[name] - before[name] for name in after}
    assert grown["disranker_field_cache_hits_total"] + grown["disranker_field_cache_misses_total"] == 6 * 22
    assert 20 <= grown["disranker_field_cache_misses_total"] <= 2 * 22
    assert 20 <= grown["disranker_field_cache_fields"] <= 2 * 22
    assert 20 * 300 < grown["disranker_field_cache_bytes"] < 44 * 1000


def test_the_openvino_backend_merges_requests_that_the_batcher_hands_over(served):
    vocabulary = load_encoder(served.checkpoints["student"]).model.config.vocab_size
    feeds = [example_inputs(2, 16, vocabulary, seed) for seed in range(4)]
    with grpc.InferenceServerClient(served.server.grpc) as client:
        answers: list[np.ndarray | None] = [None] * 4
        threads = [
            threading.Thread(target=lambda i=i: answers.__setitem__(i, encode(client, feeds[i]))) for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        end = time.monotonic() + 30
        while (stats := client.get_inference_statistics("merging").model_stats[0]).inference_count < 8:
            assert time.monotonic() < end  # Triton counts a request after its answer has left
            time.sleep(0.05)
    runner = torch_runner(load_encoder(served.checkpoints["student"]))
    for feed, answer in zip(feeds, answers):
        np.testing.assert_allclose(answer, runner(feed), atol=1e-5)
    assert stats.inference_count == 8 and stats.execution_count < 4


def encode(client: grpc.InferenceServerClient, feed: dict[str, np.ndarray], model: str = "merging") -> np.ndarray:
    tensors = []
    for name, values in feed.items():
        tensor = grpc.InferInput(name, list(values.shape), "INT32")
        tensor.set_data_from_numpy(values)
        tensors.append(tensor)
    return client.infer(model, tensors).as_numpy("logits")[:, 0]


def test_an_input_that_the_network_refuses_is_that_callers_error_alone(served):
    good = example_inputs(2, 16, 50)
    too_long = example_inputs(1, 500, 50)  # 128 positions
    with grpc.InferenceServerClient(served.server.grpc) as client:
        before = encode(client, good, "student_encoder")
        with pytest.raises(InferenceServerException, match="OpenVINO"):
            encode(client, too_long, "student_encoder")
        np.testing.assert_array_equal(encode(client, good, "student_encoder"), before)


@dataclass
class Load:
    """Requests sent by threads while something else happens: how many went well, and what went wrong."""

    served: int
    failures: list[str]
    versions: set[str]


def under_load(served: Served, act) -> Load:
    """Run act() while three clients rank without a pause: ten requests are answered before it, ten sent after it."""
    load, stop = Load(0, [], set()), threading.Event()

    def wait_for_more(requests: int) -> None:
        wanted, end = load.served + requests, time.monotonic() + 60
        while load.served < wanted and not load.failures:
            assert time.monotonic() < end, "no more requests are answered"
            time.sleep(0.01)

    def client() -> None:
        with served.reranker() as ranker:
            while not stop.is_set():
                try:
                    load.versions.add(ranker.rank("moon", TITLES, SUMMARIES).version)
                    load.served += 1
                except RerankError as problem:
                    load.failures.append(str(problem))

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        wait_for_more(10)
        act()
        wait_for_more(3 + 10)  # three may have been sent before act() was over
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return load


def test_versions_change_and_roll_back_under_load_without_a_failed_request(served):
    servers, repository = [RunningServer(served.server.grpc)], served.repository
    load = under_load(served, lambda: releases.promote(repository, "student", 2, servers))
    assert not load.failures and load.versions == {"1", "2"}
    with served.reranker() as ranker:
        newer = ranker.rank("moon", TITLES, SUMMARIES)
    expected = checkpoint_scores(served.checkpoints["newer"], "moon", TITLES, SUMMARIES)
    np.testing.assert_allclose(newer.scores, expected, atol=1e-5)
    assert releases.serving_versions(repository, "student") == [2]

    back = under_load(served, lambda: releases.rollback(repository, "student", servers))
    assert not back.failures and back.versions == {"1", "2"}
    with served.reranker() as ranker:
        assert ranker.rank("moon", TITLES, SUMMARIES).version == "1"
    assert releases.serving_versions(repository, "student") == [1]


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt(), InputError("version [1] still works on requests")])
def test_a_promotion_that_is_stopped_goes_back_under_load_without_a_failed_request(served, stopped_by):
    class Stopped(RunningServer):
        """Stops the program once, when the front has changed over and the old encoder is still there."""

        def wait_until_gone(self, model: str, old: set[int]) -> None:
            super().wait_until_gone(model, old)
            if 1 in old:
                raise stopped_by

    def act() -> None:
        with pytest.raises(type(stopped_by)):
            releases.promote(served.repository, "student", 2, [Stopped(served.server.grpc)])

    history = releases.read_history(served.repository, "student")
    load = under_load(served, act)
    assert not load.failures and load.versions == {"1", "2"}
    assert releases.serving_versions(served.repository, "student") == [1]
    assert releases.read_history(served.repository, "student") == history
    server = RunningServer(served.server.grpc)
    assert server.versions("student", "READY") == server.versions("student_encoder", "READY") == [1]


def test_a_first_promotion_that_is_stopped_leaves_an_arm_unloaded(served):
    repository = served.repository
    for name, model in (("fresh", "student"), ("fresh_encoder", "student_encoder")):
        shutil.copytree(repository / model / "1", repository / name / "1")
        config = read_config(repository / name / "1" / "config.pbtxt")
        config.name = name
        if "encoder" in config.parameters:
            config.parameters["encoder"].string_value = "fresh_encoder"
        (repository / name / "1" / "config.pbtxt").write_text(as_text(config), encoding="utf-8")
        record = releases.manifest(repository, name, 1)
        record["files"]["config.pbtxt"] = fingerprint(repository / name / "1" / "config.pbtxt")
        (repository / name / "1" / releases.MANIFEST_NAME).write_text(json.dumps(record), encoding="utf-8")

    class Stopped(RunningServer):
        def wait_until_gone(self, model: str, old: set[int]) -> None:
            assert self.is_ready(model)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        releases.promote(repository, "fresh", 1, [Stopped(served.server.grpc)])
    assert not served.server.model_is_ready("fresh") and not served.server.model_is_ready("fresh_encoder")
    assert not list(repository.glob("fresh*/config.pbtxt"))
    for name in ("fresh", "fresh_encoder"):
        shutil.rmtree(repository / name)


@pytest.mark.parametrize("broken", ["encoder", "front"])
def test_a_broken_version_is_left_out_and_the_old_one_goes_on(served, broken):
    repository = served.repository
    number = max(releases.versions(repository, "student")) + 1
    for home in (repository / "student_encoder", repository / "student"):
        shutil.copytree(home / "1", home / str(number))
    home, file = ("student_encoder", "model.xml") if broken == "encoder" else ("student", "tokenizer.json")
    (repository / home / str(number) / file).write_text("<net>", encoding="utf-8")
    with pytest.raises(InputError, match=f"{file}: missing or changed since it was published"):
        releases.promote(repository, "student", number, [RunningServer(served.server.grpc)])
    # the same, broken before it was published: only loading it can tell
    record = releases.manifest(repository, home, number)
    record["files"][file] = fingerprint(repository / home / str(number) / file)
    (repository / home / str(number) / releases.MANIFEST_NAME).write_text(json.dumps(record), encoding="utf-8")

    def act() -> None:
        with pytest.raises(InputError, match=r"does not load.*the old version goes on serving"):
            releases.promote(repository, "student", number, [RunningServer(served.server.grpc)])

    load = under_load(served, act)
    assert not load.failures and load.versions == {"1"}
    assert releases.serving_versions(repository, "student") == [1]
    encoder: pb.ModelConfig = read_config(repository / "student_encoder" / "config.pbtxt")
    assert list(encoder.version_policy.specific.versions) == [1]
    assert served.server.model_is_ready("student") and served.server.model_is_ready("student_encoder")


def test_an_encoder_that_is_asked_directly_serves_on_whatever_it_was_sent(served):
    """Whoever reaches the server may ask the encoder too, past the front's checks."""
    client = grpc.InferenceServerClient(served.server.grpc)

    def ask(shape: tuple[int, ...], value: int) -> None:
        inputs = []
        for name in INPUTS:
            tensor = grpc.InferInput(name, list(shape), "INT32")
            tensor.set_data_from_numpy(np.full(shape, value, np.int32))
            inputs.append(tensor)
        with suppress(InferenceServerException):  # an error is as good an answer as any
            client.infer("student_encoder", inputs, client_timeout=20)

    for shape in ((2, 16), (1, 100_000), (0, 16), (16, 0), (1, 1)):
        for value in (0, -1, 10**6, 2**31 - 1, -(2**31)):
            ask(shape, value)
    with served.reranker() as ranker:
        expected = checkpoint_scores(served.checkpoints["student"], "moon", TITLES, SUMMARIES)
        np.testing.assert_allclose(ranker.rank("moon", TITLES, SUMMARIES).scores, expected, atol=1e-5)


def test_a_model_whose_process_was_killed_serves_again_after_a_reload(served):
    for process in served.server.children():
        if process.status() != psutil.STATUS_ZOMBIE and "baseline_encoder_0" in " ".join(process.cmdline()):
            process.kill()
    with served.reranker("baseline") as ranker:
        with pytest.raises(RerankError, match="not healthy"):
            ranker.rank("moon", TITLES, SUMMARIES)
        releases.reload(served.repository, "baseline", [RunningServer(served.server.grpc)])
        assert np.isfinite(ranker.rank("moon", TITLES, SUMMARIES).scores).all()


def test_a_prior_is_blended_by_the_weight_that_the_arm_was_published_with(served):
    manifest = releases.manifest(served.repository, "student", 1)
    blend = PriorBlend(**manifest["quality"]["prior"])
    assert blend.weight > 0  # a random model's judged queries want some of BM25
    priors = [3.0, None, 12.5, 0.0, 7.0]
    with served.reranker() as ranker, Reranker([f"http://{served.server.http}"], deadline_ms=20_000) as http:
        alone = ranker.rank("red night", TITLES, SUMMARIES).scores
        blended, over_http = (r.rank("red night", TITLES, SUMMARIES, priors=priors).scores for r in (ranker, http))
        none = ranker.rank("red night", TITLES, SUMMARIES, priors=[None] * 5).scores
        with pytest.raises(RerankError, match=r"5 titles and 2 priors"):
            ranker.rank("red night", TITLES, SUMMARIES, priors=[1.0, 2.0])
    expected = blend.blend(alone, np.array([np.nan if p is None else p for p in priors]))
    np.testing.assert_allclose(blended, expected, atol=1e-6)
    assert blended.tobytes() == over_http.tobytes() and none.tobytes() == alone.tobytes()
    assert np.abs(blended - alone).max() > 0.01


def test_the_router_passes_priors_on(served, tmp_path):
    (tmp_path / "experiment.yaml").write_text("default_model: student\nexperiments: []\n")
    priors = [3.0, None, 12.5, 0.0, 7.0]
    documents = [
        {"doc_id": str(number), "title": title, "summary": summary, "prior": prior}
        for number, (title, summary, prior) in enumerate(zip(TITLES, SUMMARIES, priors))
    ]
    body = json.dumps({"user_id": "u", "query": "red night", "documents": documents}).encode()
    arguments = (tmp_path / "experiment.yaml", served.server.grpc, tmp_path / "log", "--deadline-ms", "20000")
    with start_router(*arguments) as router, served.reranker() as ranker:
        request = urllib.request.Request(f"{router.url}/rank", body, {"Content-Type": "application/json"})
        answer = json.load(urllib.request.urlopen(request, timeout=30))
        direct = ranker.rank("red night", TITLES, SUMMARIES, priors=priors)
    assert answer["ranking"] == [str(number) for number in direct.order] and answer["served_by"] == "student"
    np.testing.assert_allclose(answer["scores"], direct.scores[direct.order], atol=1e-6)


def test_probabilities_are_those_of_the_fitted_map_over_both_protocols(served):
    card = ScoreCard.load(served.checkpoints["baseline"])
    with (
        served.reranker("baseline") as ranker,
        Reranker([f"http://{served.server.http}"], "baseline", deadline_ms=20_000) as http,
    ):
        over_grpc, over_http = (r.rank("red night", TITLES, SUMMARIES) for r in (ranker, http))
        blended = ranker.rank("red night", TITLES, SUMMARIES, priors=[3.0, None, 12.5, 0.0, 7.0])
        unknown = ranker.rank("red night", TITLES, SUMMARIES, priors=[None] * 5)
    expected = probability(over_grpc.scores, card.calibration)
    np.testing.assert_allclose(over_grpc.probabilities, expected, atol=1e-6)
    assert over_grpc.probabilities.tobytes() == over_http.probabilities.tobytes() == unknown.probabilities.tobytes()
    maps = json.loads((served.repository / "baseline/1/probabilities.json").read_text())
    np.testing.assert_allclose(blended.probabilities, probability(blended.scores, maps["with_prior"]), atol=1e-6)
    assert maps["alone"] == card.calibration != maps["with_prior"]


def test_the_calibration_error_that_is_served_is_the_one_that_the_manifest_names(served):
    about = releases.manifest(served.repository, "baseline", 1)["probabilities"]
    assert about["method"] == "platt" and about["fitted_on"].startswith("dev judgments")
    judged = read_table(served.repository.parent / "liked/judgments/dev.parquet", "judgments").to_pylist()
    served_chances, relevant = [], []
    with served.reranker("baseline") as ranker:
        for query in dict.fromkeys(row["query_id"] for row in judged):
            rows = [row for row in judged if row["query_id"] == query]
            titles, summaries = ([row[name] for row in rows] for name in ("title", "summary"))
            served_chances.append(ranker.rank(rows[0]["query"], titles, summaries).probabilities)
            relevant += [row["grade"] > 0 for row in rows]
    assert ece(np.concatenate(served_chances), relevant) == pytest.approx(about["ece"], abs=1e-6)


def test_the_router_gives_probabilities_and_leaves_out_what_is_below_the_threshold(served, tmp_path):
    (tmp_path / "experiment.yaml").write_text("default_model: baseline\nexperiments: []\n")
    documents = [
        {"doc_id": str(number), "title": title, "summary": summary}
        for number, (title, summary) in enumerate(zip(TITLES, SUMMARIES))
    ]
    body = {"user_id": "u", "query": "red night", "documents": documents}
    with (
        start_router(
            tmp_path / "experiment.yaml", served.server.grpc, tmp_path / "log", "--deadline-ms", "20000"
        ) as router,
        httpx.Client(base_url=router.url, timeout=30) as client,
    ):
        whole = client.post("/rank", json=body).json()
        middle = float(np.median(whole["probabilities"]))
        cut = client.post("/rank", json={**body, "min_probability": middle}).json()
        nothing = client.post("/rank", json={**body, "min_probability": 1.0}).json()
    assert whole["probabilities"] == sorted(whole["probabilities"], reverse=True) and whole["left_out"] == 0
    assert cut["ranking"] == whole["ranking"][:3] and cut["left_out"] == 2 and len(cut["scores"]) == 3
    assert nothing["ranking"] == [] and nothing["left_out"] == 5 and nothing["served_by"] == "baseline"
    assert compact(tmp_path / "log", tmp_path / "data", QueryEngineSettings()).rejected == 0
    days = [read_table(path, "exposures").to_pylist() for path in (tmp_path / "data/exposures").iterdir()]
    assert sorted(len(row["documents"]) for rows in days for row in rows) == [0, 3, 5]


def test_a_prior_that_cannot_be_one_is_refused_with_its_place(served):
    client = grpc.InferenceServerClient(served.server.grpc)
    page = request_tensors("moon", TITLES[:2], SUMMARIES[:2], [1.0, 2.0])
    for prior, reason in (([1.0, np.inf], r"prior\[1\] is infinite"), ([1.0], "prior has 1 values for 2 documents")):
        tensors = page | {"prior": np.array(prior, np.float32)}
        inputs = TritonConnection(f"grpc://{served.server.grpc}").infer_inputs(tensors)
        with pytest.raises(InferenceServerException, match=reason):
            client.infer("student", inputs)


def test_an_arm_labels_a_corpus_as_a_teacher(served, tmp_path):
    """Every pair has its checkpoint's score, although the server takes four requests at a time and refuses others."""
    candidates = served.repository.parent / "data" / "candidates.parquet"
    config = LabelConfig(
        candidates=candidates,
        out=tmp_path,
        url=[served.server.grpc],
        teacher_kind="ranker",
        model="baseline",
        retries=50,
    )
    assert label_corpus(config) == 0
    checkpoint = served.checkpoints["baseline"]
    rows = pa.concat_tables(iter_labelled(candidates, tmp_path)).to_pylist()
    text = StudentFormat.of_checkpoint(checkpoint)
    pairs = text.encode(*([row[name] for row in rows] for name in ("query", "title", "summary")))
    expected = score_pairs(torch_runner(load_encoder(checkpoint)), pairs, text.pad_id)
    np.testing.assert_allclose([row["teacher_score"] for row in rows], expected, atol=1e-5)
    manifest = json.loads((served.repository / "baseline" / "1" / "manifest.json").read_text())
    assert LabelSet.load(tmp_path).teacher_id == f"{manifest['checkpoint']['fingerprint']}-fp32"
