"""Callers that are killed or leave, proxies and servers that fail: the real teacher, vLLM behind tritonserver.

All in one file, which shares one server: it takes a minute to start.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tritonclient.grpc import service_pb2_grpc

from ranking.labels import read_labels
from ranking.schema import TABLES
from ranking.text import TeacherFormat
from serving.temporary_server import start_triton
from tests.e2e.conftest import QUIET_VLLM
from tests.helpers.faulty_proxy import FaultyProxy
from tests.helpers.teacher_requests import request, scores

ROOT = Path(__file__).parents[2]
ROWS, SHARD_ROWS = 400, 50
SHARDS = ("--shard-rows", str(SHARD_ROWS))


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    path = tmp_path_factory.mktemp("candidates") / "candidates.parquet"
    draw = random.Random(7)
    words = [
        "red", "shoe", "running", "trail", "summer", "boot", "light", "rain", "city", "walk", "</s>", "größe", "靴"
    ]  # fmt: skip
    text = lambda n: " ".join(draw.choices(words, k=n))  # noqa: E731
    queries = [text(3) for _ in range(ROWS // 8)]
    rows = [(f"q{i // 8}", f"d{i}", queries[i // 8], text(5), text(12)) for i in range(ROWS)]
    pq.write_table(pa.table([list(c) for c in zip(*rows)], schema=TABLES["candidates"].schema), path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tiny_teacher_repository):
    return tiny_teacher_repository / "teacher/1/checkpoint"


@pytest.fixture(scope="module")
def start_label(candidates, tiny_teacher_repository):
    def start(out: Path, url: str, *flags: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "clients/label_corpus.py"), "--candidates", str(candidates)]
        command += ["--out", str(out), "--url", url, "--teacher", str(tiny_teacher_repository / "teacher")]
        command += [*SHARDS, *flags]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    return start


def finish(process: subprocess.Popen) -> str:
    text = process.communicate(timeout=300)[1]
    assert process.returncode == 0, text
    return text


@pytest.fixture(scope="module")
def undisturbed(start_label, abandoned_teacher_server, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    finish(start_label(out, abandoned_teacher_server.grpc))
    return read_labels(out)


def assert_same_labels(out: Path, undisturbed: pa.Table):
    """Every pair once, in order, within 1e-3: the server's batches move a score's last bits."""
    labels = read_labels(out)
    for key in ("query_id", "doc_id", "teacher_id"):
        assert labels.column(key).equals(undisturbed.column(key))
    found, expected = (t.column("teacher_score").to_numpy() for t in (labels, undisturbed))
    assert np.abs(found - expected).max() < 1e-3


def test_labels_are_the_scores_that_the_server_gives_one_by_one(
    undisturbed, candidates, checkpoint, abandoned_teacher_server
):
    rows = pq.read_table(candidates).slice(0, 40)
    text_format = TeacherFormat.of_checkpoint(checkpoint)
    prompts = text_format.texts(*(rows.column(name).to_pylist() for name in ("query", "title", "summary")))
    asked = [scores(abandoned_teacher_server.grpc, [prompt.text])[0] for prompt in prompts]
    labels = undisturbed.column("teacher_score").to_numpy()
    assert np.abs(labels[:40] - asked).max() < 1e-3
    assert labels.std() > 1e-2 and len(undisturbed) == ROWS


def test_a_labeller_killed_twenty_times_loses_and_doubles_nothing(
    start_label, abandoned_teacher_server, undisturbed, tmp_path
):
    draw = random.Random(1)
    folders = [tmp_path / "0"]
    for _ in range(20):
        process = start_label(folders[-1], abandoned_teacher_server.grpc, "--in-flight", "16")
        lock = folders[-1] / ".lock"
        while process.poll() is None and not (lock.exists() and lock.read_text() == str(process.pid)):
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 0.8))
        process.kill()
        process.communicate()
        if len(list(folders[-1].glob("labels-*.json"))) == ROWS // SHARD_ROWS:
            folders.append(tmp_path / str(len(folders)))
    for folder in folders:
        finish(start_label(folder, abandoned_teacher_server.grpc))
        assert_same_labels(folder, undisturbed)


def test_one_of_two_real_servers_is_killed_and_the_other_labels_the_rest(
    start_label, abandoned_teacher_server, tiny_teacher_repository, undisturbed, tmp_path
):
    with start_triton(tiny_teacher_repository, environment=QUIET_VLLM) as other:
        urls = f"{abandoned_teacher_server.grpc},{other.grpc}"
        process = start_label(tmp_path, urls, "--in-flight", "4")
        while not list(tmp_path.glob("labels-*.json")) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)  # on a busy machine it might else be done before the server dies
        children = other.children()
        os.kill(other.pid, signal.SIGKILL)
        for child in children:
            with suppress(psutil.NoSuchProcess):  # the watchdog may be faster
                child.kill()
        process.send_signal(signal.SIGCONT)
        text = finish(process)
    assert f"{other.grpc} lost" in text
    assert_same_labels(tmp_path, undisturbed)


def test_a_proxy_that_fails_and_takes_one_prompt_a_request_changes_no_score(
    start_label, abandoned_teacher_server, undisturbed, tmp_path
):
    with FaultyProxy(abandoned_teacher_server.grpc, one_prompt=True) as proxy:  # as NVIDIA's backend does
        text = finish(start_label(tmp_path, proxy.url, "--deadline-ms", "60000", "--retries", "8", "--in-flight", "16"))
    assert proxy.errors > ROWS * 0.03 and proxy.drops >= 1
    assert "dropped by the proxy" in text
    assert_same_labels(tmp_path, undisturbed)


def test_a_long_generation_holds_up_no_score_and_ends_when_its_caller_cancels(abandoned_teacher_server):
    endless = json.dumps({"max_tokens": 4000, "temperature": 0, "ignore_eos": True})
    with grpc.insecure_channel(abandoned_teacher_server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        long = request(text_input="a", sampling_parameters=endless, stream=True, exclude_input_in_output=True)
        call = stub.ModelStreamInfer(iter([long]))
        next(call)
        assert len(scores(abandoned_teacher_server.grpc, ["b</s>"] * 20)) == 20
        wait_for_open_requests(abandoned_teacher_server, 1)  # still running while the scores came
        call.cancel()
        wait_for_open_requests(abandoned_teacher_server, 0)
        several = request(text_input=["a", "b", "c"], sampling_parameters=endless)
        call = stub.ModelStreamInfer(iter([several]))
        wait_for_open_requests(abandoned_teacher_server, 1)
        call.cancel()
    wait_for_open_requests(abandoned_teacher_server, 0)


def wait_for_open_requests(server, count: int) -> None:
    deadline = time.monotonic() + 60
    while (found := open_requests(server)) != count:
        assert time.monotonic() < deadline, f"{found} requests open, {count} expected"
        time.sleep(0.2)


def open_requests(server) -> int:
    text = urllib.request.urlopen(f"http://{server.metrics}/metrics").read().decode()
    (line,) = [line for line in text.splitlines() if line.startswith("vllm:num_requests_open{")]
    return int(float(line.split()[-1]))
