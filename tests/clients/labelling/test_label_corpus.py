"""clients/label_corpus.py against a deterministic teacher: whatever fails, a rerun leaves the bytes of an
undisturbed run."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ranking.errors import DataError, InputError
from ranking.labels import iter_labelled, read_labels
from ranking.schema import TABLES
from ranking.text import TeacherFormat
from serving.temporary_server import free_ports
from tests.helpers.collector import arrows, collector

ROWS, SHARD_ROWS = 3000, 250
SHARDS = ("--shard-rows", str(SHARD_ROWS))
# what a server says of its requests: the stock backend's carry one prompt
PROMPTS = pytest.mark.parametrize("prompts", [(), ("--several",)], ids=["one prompt a request", "several"])

_spec = importlib.util.spec_from_file_location(
    "stub_teacher", Path(__file__).parents[2] / "helpers" / "stub_teacher.py"
)
assert _spec is not None and _spec.loader is not None
stub_teacher = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stub_teacher)


@pytest.fixture(scope="module")
def candidates(write_candidates):
    return write_candidates(ROWS)


@pytest.fixture(scope="module")
def undisturbed(candidates, label, stub, tmp_path_factory):
    """The folder of a run in which nothing failed."""
    out = tmp_path_factory.mktemp("undisturbed") / "labels"
    code, text = label.run(candidates, out, "--url", stub.url, *SHARDS)
    assert code == 0, text
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that must not depend on what happened on the way; the manifest holds rates and times."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("manifest.json", ".lock")}


def assert_same_labels(out: Path, undisturbed: Path):
    assert contents(out) == contents(undisturbed)
    assert len(read_labels(out)) == ROWS


def test_every_pair_gets_the_score_of_its_own_text(candidates, undisturbed, teacher_folder):
    rows = pa.concat_tables(iter_labelled(candidates, undisturbed))
    fields = [rows.column(name).to_pylist() for name in ("query", "title", "summary")]
    prompts = TeacherFormat.of_checkpoint(teacher_folder).texts(*fields)
    expected = [stub_teacher.stub_score(prompt.text.encode()) for prompt in prompts]
    assert rows.column("teacher_score").to_pylist() == expected
    assert rows.select(TABLES["candidates"].schema.names).equals(pq.read_table(candidates))
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["counts"] == {"rows": ROWS, "labels": ROWS, "rejects": 0, "reasons": {}}
    assert sum(manifest["scores"]["histogram"].values()) == ROWS
    assert manifest["scores"]["mean"] == pytest.approx(sum(expected) / ROWS)


def test_twenty_kills_at_random_moments_leave_no_trace(candidates, undisturbed, label, start_stub, tmp_path):
    server = start_stub("--latency", "0.05", "--capacity", "64")
    flags = ("--url", server.url, "--in-flight", "64", *SHARDS)
    draw = random.Random(4)
    found_by_kill = [0]
    folders = [tmp_path / "0"]
    for number in range(20):
        process = label(candidates, folders[-1], *flags)
        more = found_by_kill[-1] % (ROWS // SHARD_ROWS) + number % 3
        # a kill before the first write shows nothing, and some are to fall behind further shards, however slow
        while not holds_lock(process, folders[-1]) or (process.poll() is None and finished(folders[-1]) < more):
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 0.8))
        process.kill()
        process.communicate()
        found_by_kill.append(finished(folders[-1]))
        if found_by_kill[-1] == ROWS // SHARD_ROWS:
            folders.append(tmp_path / str(len(folders)))
    assert len(set(found_by_kill[1:])) > 2, f"the kills fell into too few different states: {found_by_kill}"
    for folder in folders:
        code, text = label.run(candidates, folder, *flags)
        assert code == 0, text
        assert_same_labels(folder, undisturbed)


def finished(out: Path) -> int:
    """Shards whose record is there."""
    return len(list(out.glob("labels-*.json")))


def holds_lock(process: subprocess.Popen, out: Path) -> bool:
    lock = out / ".lock"
    return process.poll() is not None or (lock.exists() and lock.read_text() == str(process.pid))


def wait_for_shards(out: Path, count: int):
    until = time.monotonic() + 120
    while finished(out) < count:
        assert time.monotonic() < until
        time.sleep(0.02)


@PROMPTS
def test_errors_delays_lost_answers_and_dropped_streams_leave_no_trace(
    prompts, candidates, undisturbed, label, start_stub, tmp_path
):
    rare = "0.02" if prompts else "0.002"  # of fewer requests
    faults = {"error": "0.1", "delay": "0.05", "silent": rare, "drop": rare}
    flags = [word for fault, rate in faults.items() for word in (f"--{fault}-rate", rate)]
    server = start_stub("--latency", "0.02", *flags, *prompts)
    code, text = label.run(
        candidates, tmp_path, "--url", server.url, "--deadline-ms", "2000", "--retries", "30", *SHARDS
    )
    assert code == 0, text
    # the server's reason is not known where a write was the first to meet the end of its stream
    assert re.search("lost: (UNAVAILABLE: stream dropped by the stub|the stream has ended); trying again", text)
    assert_same_labels(tmp_path, undisturbed)


@PROMPTS
def test_a_nan_is_asked_for_again_and_never_written(prompts, candidates, undisturbed, label, start_stub, tmp_path):
    now_and_then = start_stub("--nan-rate", "0.02", *prompts)
    code, text = label.run(candidates, tmp_path / "some", "--url", now_and_then.url, *SHARDS)
    assert code == 0, text
    assert_same_labels(tmp_path / "some", undisturbed)
    always = start_stub("--nan-rate", "1", *prompts)
    code, text = label.run(candidates, tmp_path / "all", "--url", always.url, "--retries", "1", *SHARDS)
    assert code == 1
    assert "the teacher fails on" in text and "the teacher's score is nan" in text


def test_servers_that_differ_in_what_a_request_may_carry_share_the_work(
    candidates, undisturbed, label, start_stub, tmp_path
):
    servers = [start_stub("--latency", "0.02", *flags) for flags in ((), ("--several",))]
    for first, second in (servers, servers[::-1]):
        out = tmp_path / str(first.port)
        code, text = label.run(candidates, out, "--url", f"{first.url},{second.url}", *SHARDS)
        assert code == 0 and "retries 0" in text, text
        assert all(re.search(rf"{server.url} [1-9]\d*%", text) for server in servers), text
        assert_same_labels(out, undisturbed)


def test_a_version_that_takes_over_is_used_if_it_is_the_same_teacher(
    candidates, undisturbed, label, start_stub, tmp_path
):
    """The stream never breaks: the scores would come from another teacher if requests did not name their version."""
    steady = start_stub("--several", "--latency", "0.05", "--capacity", "4")
    promoted = ("--several", "--latency", "0.01", "--promote-after", "20")
    same, other = start_stub(*promoted), start_stub(*promoted, "--promoted-id", "another")
    code, text = label.run(candidates, tmp_path / "same", "--url", same.url, *SHARDS)
    assert code == 0 and "version 1 is not at ready state; trying again" in text, text
    code, text = label.run(candidates, tmp_path / "other", "--url", f"{steady.url},{other.url}", *SHARDS)
    assert code == 0 and f"{other.url} lost: it serves teacher another, this run is of stub0" in text, text
    for name in ("same", "other"):
        assert_same_labels(tmp_path / name, undisturbed)


def test_a_server_that_rounds_scores_to_16_bits_is_refused(candidates, label, start_stub, tmp_path):
    rounding = start_stub("--bf16-scores")
    code, text = label.run(candidates, tmp_path, "--url", rounding.url, *SHARDS)
    assert code == 1 and "its vLLM is older than 0.26" in text and "Traceback" not in text
    assert not list(tmp_path.glob("labels-*.parquet"))


@PROMPTS
def test_a_prompt_that_the_teacher_refuses_goes_to_the_rejects(prompts, candidates, label, start_stub, tmp_path):
    server = start_stub(*prompts, "--final-mark", "title 77\n")
    code, text = label.run(candidates, tmp_path, "--url", server.url, "--retries", "0", *SHARDS)
    assert code == 3, text
    # asking again would not help; those that shared its request are asked alone, once
    assert re.search(r"retries (1[0-6]|[1-9])\b" if prompts else "retries 0", text), text
    (reject,) = pq.read_table(tmp_path / "rejects.parquet").to_pylist()
    assert (reject["row"], reject["query_id"], reject["doc_id"], reject["cause"]) == (78, "q9", "d5", "teacher")
    assert "maximum model length" in reject["reason"]
    labels = read_labels(tmp_path)
    assert len(labels) == ROWS - 1
    server.kill()
    server.options = server.options[:-2]  # a teacher with room for it
    server.start()
    code, text = label.run(candidates, tmp_path, "--url", server.url, "--retry-rejects", *SHARDS)
    assert code == 0, text
    assert len(read_labels(tmp_path)) == ROWS


def test_bad_rows_are_listed_with_their_reason_and_the_rest_is_labelled(candidates, label, stub, spoil_text, tmp_path):
    columns = {
        name: pq.read_table(candidates).slice(0, 600).column(name).to_pylist() for name in TABLES["candidates"].key
    }
    columns |= {name: pq.read_table(candidates).slice(0, 600).column(name).to_pylist() for name in ("query", "title")}
    columns["summary"] = ["fine"] * 600
    columns["query"][3] = "  "
    columns["title"][4] = None
    columns["doc_id"][5] = columns["doc_id"][2]  # the same query_id as row 3
    columns["summary"][6] = "x" * (1 << 20) + "y"
    columns["query_id"][250], columns["doc_id"][250] = columns["query_id"][249], columns["doc_id"][249]  # over a border
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table(columns), path)
    spoil_text(path, "title", 7)
    code, text = label.run(path, tmp_path / "out", "--url", stub.url, *SHARDS)
    assert code == 3, text
    rejects = {r["row"]: r["reason"] for r in pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()}
    assert rejects == {
        4: "query is blank",
        5: "title is null",
        6: "duplicate key (query_id, doc_id)",
        7: "summary is longer than 1048576 bytes",
        8: "title is not valid UTF-8",
        251: "duplicate key (query_id, doc_id)",
    }
    assert len(read_labels(tmp_path / "out")) == 594


def test_a_candidate_file_without_a_column_or_cut_off_is_refused_in_one_line(candidates, label, stub, tmp_path):
    pq.write_table(pq.read_table(candidates).drop_columns(["title"]), tmp_path / "short.parquet")
    (tmp_path / "cut.parquet").write_bytes(candidates.read_bytes()[:-100])
    for name, reason in (("short", "no column title"), ("cut", "cannot be read as Parquet"), ("none", "no such file")):
        code, text = label.run(tmp_path / f"{name}.parquet", tmp_path / "out", "--url", stub.url)
        assert code == 1 and reason in text and "Traceback" not in text, text
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a small file system")
def test_a_full_disk_ends_the_run_in_one_line_and_a_rerun_goes_on(
    candidates, undisturbed, stub, teacher_folder, tmp_path
):
    command = (
        f"{sys.executable} {Path(__file__).parents[3]}/clients/label_corpus.py --candidates {candidates} "
        f"--out mount/out --teacher {teacher_folder} --url {stub.url} --shard-rows {SHARD_ROWS}"
    )
    script = (
        f"mkdir -p mount && mount -t tmpfs -o size=48k tmpfs mount && {command}; echo code $?; ls mount/out/*.parquet; "
        f"mount -o remount,size=8m mount && {command}; echo code $?; cp -r mount/out out"
    )
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    if "unshare failed" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip("no user namespaces here")
    first, second = done.stdout.split("code ")[1:]
    assert first.startswith("1\n") and second.startswith("0"), done.stdout + done.stderr
    assert "No space left on device; finished shards are kept" in done.stderr and "Traceback" not in done.stderr
    assert 0 < first.count("labels-") < ROWS // SHARD_ROWS
    assert_same_labels(tmp_path / "out", undisturbed)


def test_damaged_shards_are_found_and_labelled_again(candidates, undisturbed, label, stub, tmp_path):
    out = tmp_path / "labels"
    shutil.copytree(undisturbed, out)
    flipped = bytearray((out / "labels-00003.parquet").read_bytes())
    flipped[100] ^= 4
    (out / "labels-00003.parquet").write_bytes(bytes(flipped))
    (out / "labels-00005.parquet").unlink()
    (out / "labels-00007.json").write_text('{"version": 1, "ori')
    with pytest.raises(DataError, match="differs from the manifest's checksum"):
        read_labels(out)
    code, text = label.run(candidates, out, "--url", stub.url, *SHARDS)
    assert code == 0 and text.count("the shard is labelled again") == 3, text
    assert "750 of" not in text and f"{ROWS} of {ROWS} pairs" in text
    assert_same_labels(out, undisturbed)
    assert json.loads((out / "manifest.json").read_text())["runs"][-1]["pairs"] == 3 * SHARD_ROWS


def test_a_folder_takes_no_second_teacher_file_writer_or_shard_size(
    candidates, undisturbed, label, start_stub, stub, write_candidates, tmp_path
):
    out = tmp_path / "labels"
    shutil.copytree(undisturbed, out)
    other = start_stub("--teacher-id", "another")
    code, text = label.run(candidates, out, "--url", other.url, *SHARDS)
    assert code == 1 and "labels by teacher stub0, the server has another" in text, text
    code, text = label.run(candidates, out, "--url", f"{stub.url},{other.url}", *SHARDS)
    assert code == 1 and "the endpoints serve different teachers" in text, text
    code, text = label.run(write_candidates(ROWS + 1), out, "--url", stub.url, *SHARDS)
    assert code == 1 and "labels of another candidate file" in text, text
    code, text = label.run(candidates, out, "--url", stub.url, "--shard-rows", "251")
    assert code == 1 and "--shard-rows 250" in text, text
    slow = start_stub("--latency", "5")
    process = label(candidates, tmp_path / "held", "--url", slow.url, *SHARDS)
    wait_until = time.monotonic() + 120
    while not (tmp_path / "held/manifest.json").exists():
        assert time.monotonic() < wait_until
        time.sleep(0.05)
    code, text = label.run(candidates, tmp_path / "held", "--url", slow.url, *SHARDS)
    process.kill()
    process.communicate()
    assert code == 1 and f"process {process.pid} is labelling into this folder" in text, text


def test_a_checkpoint_of_another_teacher_is_refused(candidates, label, stub, teacher_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(teacher_folder, other)
    card = json.loads((other / "ranker.json").read_text())
    (other / "ranker.json").write_text(json.dumps(card | {"limits": card["limits"] | {"max_title_tokens": 17}}))
    code, text = label.run(candidates, tmp_path / "out", "--url", stub.url, "--teacher", str(other))
    assert code == 1 and "its score card is not that of the served teacher stub0" in text, text
    assert not (tmp_path / "out/manifest.json").exists()


def test_sigterm_finishes_the_shards_in_hand_and_a_rerun_the_job(candidates, undisturbed, label, start_stub, tmp_path):
    server = start_stub("--latency", "0.05", "--capacity", "32")
    process = label(candidates, tmp_path, "--url", server.url, *SHARDS)
    wait_for_shards(tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=240)[1]
    done = finished(tmp_path)
    assert process.returncode == 130 and 1 <= done < ROWS // SHARD_ROWS, text
    assert f"stopped with {ROWS - done * SHARD_ROWS} of {ROWS} pairs to label" in text
    code, text = label.run(candidates, tmp_path, "--url", server.url, *SHARDS)
    assert code == 0, text
    assert_same_labels(tmp_path, undisturbed)


def test_a_retry_of_rejects_that_is_stopped_says_so_and_goes_on(candidates, undisturbed, label, start_stub, tmp_path):
    def tried_again() -> int:
        records = [json.loads(path.read_text()) for path in tmp_path.glob("labels-*.json")]
        return sum(not record["rejects"] for record in records)

    server = start_stub("--final-mark", "00\n")  # some in every shard
    code, text = label.run(candidates, tmp_path, "--url", server.url, *SHARDS)
    assert code == 3 and tried_again() == 0, text
    server.kill()
    server.options = [*server.options[:-2], "--latency", "0.05", "--capacity", "32"]
    server.start()
    flags = ("--url", server.url, "--retry-rejects", *SHARDS)
    process = label(candidates, tmp_path, *flags)
    until = time.monotonic() + 60
    while not tried_again():
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=240)[1]
    left = ROWS - tried_again() * SHARD_ROWS
    assert process.returncode == 130 and f"stopped with {left} of {ROWS} pairs to label" in text and left, text
    with pytest.raises(InputError, match="labelling has not finished"):
        read_labels(tmp_path)
    code, text = label.run(candidates, tmp_path, *flags)
    assert code == 0, text
    assert_same_labels(tmp_path, undisturbed)


def test_no_server_is_said_in_one_line(candidates, label, tmp_path):
    code, text = label.run(candidates, tmp_path, "--url", "127.0.0.1:9", "--give-up-seconds", "1")
    assert code == 1 and "no endpoint has model 'teacher' ready" in text and "Traceback" not in text, text


def test_a_server_that_never_answers_ends_the_run(candidates, label, start_stub, tmp_path):
    mute = start_stub("--silent-rate", "1")
    code, text = label.run(candidates, tmp_path, "--url", mute.url, "--give-up-seconds", "3", "--deadline-ms", "1000")
    assert code == 1 and "no endpoint has answered for" in text and "no answer for 1 s" in text, text


def test_a_dry_run_counts_tokens_time_and_cost_without_a_server(candidates, label, teacher_folder, tmp_path):
    flags = ("--dry-run", "--rate", "50", "--price-per-hour", "3", "--url", "a:1,b:1")
    code, text = label.run(candidates, tmp_path / "out", *flags)
    assert code == 0, text
    rows = pq.read_table(candidates)
    text_format = TeacherFormat.of_checkpoint(teacher_folder)
    prompts = text_format.texts(*(rows.column(name).to_pylist() for name in ("query", "title", "summary")))
    tokens = sum(len(text_format.tokenizer.encode(prompt.text).ids) for prompt in prompts)
    assert f"pairs   {ROWS}" in text and f"tokens  {tokens} " in text
    assert "0.02 hours at 50.0 pairs/s over 2 endpoint(s)" in text
    assert "cost    0.10 at 3 an hour and endpoint" in text  # 3000 / 50 s = 1/60 h, twice, at 3
    assert not (tmp_path / "out").exists()


def test_a_dry_run_measures_the_rate_on_the_servers(candidates, label, start_stub, tmp_path):
    server = start_stub("--latency", "0.02", "--capacity", "16")  # at most 800 pairs/s
    code, text = label.run(candidates, tmp_path / "out", "--dry-run", "--url", server.url)
    assert code == 0, text
    rate = float(text.split(" pairs/s")[0].split()[-1])
    assert 1 < rate <= 840  # fewer on a busy machine
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [("--dry-run",), ("--sample", "10"), ("--sample", "10", "--stratify")], ids=" ".join)
def test_a_file_without_a_candidate_to_label_has_no_rate_and_no_sample(flags, write_candidates, label, stub, tmp_path):
    blank = pq.read_table(write_candidates(5)).set_column(2, "query", pa.array([" "] * 5))
    pq.write_table(blank, tmp_path / "blank.parquet")
    for path in (write_candidates(0), tmp_path / "blank.parquet"):
        code, text = label.run(path, tmp_path / "out", "--url", stub.url, *flags)
        assert code == 1 and f"error: {path}: no " in text and "can be labelled" in text, text
        assert "Traceback" not in text


def test_a_stratified_sample_sees_the_whole_file_and_shows_its_scores(candidates, label, stub, tmp_path):
    code, text = label.run(candidates, tmp_path, "--url", stub.url, "--sample", "300", "--stratify")
    assert code == 0, text
    drawn = pq.read_table(tmp_path / "sample/300-seed0/candidates.parquet")
    queries = [int(q[1:]) for q in drawn.column("query_id").to_pylist()]
    assert 250 <= len(drawn) <= 300
    assert min(queries) < ROWS / 8 * 0.1 and max(queries) > ROWS / 8 * 0.9
    assert len(read_labels(tmp_path / "sample/300-seed0/labels")) == len(drawn)
    assert f"{len(drawn)} scores: mean" in text and "standard deviation within a query" in text
    assert f"the {ROWS} pairs of the file take" in text
    assert not (tmp_path / "manifest.json").exists()


def test_prometheus_can_read_a_running_job(candidates, label, start_stub, tmp_path):
    import urllib.request

    server = start_stub("--latency", "0.1", "--capacity", "32")
    (port,) = free_ports(1)
    process = label(candidates, tmp_path, "--url", server.url, "--metrics-port", str(port), *SHARDS)
    wait_for_shards(tmp_path, 1)
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
    process.kill()
    process.communicate()
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(values["disranker_label_pairs_total_planned"]) == ROWS
    assert float(values[f'disranker_label_endpoint_scored_total{{endpoint="{server.url}"}}']) >= SHARD_ROWS
    assert float(values[f'disranker_label_endpoint_in_flight{{endpoint="{server.url}"}}']) > 0


def test_the_ray_engine_writes_the_same_bytes(candidates, undisturbed, label, stub, tmp_path):
    code, text = label.run(candidates, tmp_path, "--url", stub.url, "--engine", "ray", "--ray-workers", "2", *SHARDS)
    assert code == 0 and f"{ROWS} of {ROWS} pairs, retries 0, rejects 0" in text, text
    assert_same_labels(tmp_path, undisturbed)


def test_a_traced_run_has_a_span_for_every_shard_and_request(write_candidates, label, stub, tmp_path, monkeypatch):
    with collector() as taken:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", taken.url)
        flags = ("--url", stub.url, "--shard-rows", "40", "--tracing", "--log-format", "json")
        code, output = label.run(write_candidates(100), tmp_path / "labels", *flags)
        assert code == 0, output
        spans = list(taken.spans)
    shards = [one for one in spans if one.name == "shard"]
    assert sorted(one.attributes["disranker.rows"] for one in shards) == ["20", "40", "40"]
    for shard in shards:
        expected = {
            ("", "shard", "disranker-labeller"),
            *(("shard", n, "disranker-labeller") for n in ("score", "write")),
        }
        assert arrows(spans, shard.trace) == expected
    asked = [one for one in spans if one.name == "ask"]
    assert len(asked) == 100 and {one.attributes["disranker.endpoint"] for one in asked} == {stub.url}
    said = [json.loads(line) for line in output.splitlines()]  # every line, no progress bar between them
    assert any("100 labels" in line["message"] for line in said)
