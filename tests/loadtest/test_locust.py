"""`locust -f loadtest/` against a real tritonserver: every user headless, its JSON, the stall that only an open
loop shows."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clients.ab.router.local_router import start_router
from tests.loadtest.conftest import Rig

ROOT = Path(__file__).parents[2]


def start_locust(rig: Rig, out: Path, *flags: str) -> subprocess.Popen:
    command = [
        *(
            sys.executable,
            "-m",
            "locust",
            "-f",
            "loadtest/",
            "--headless",
            "--data",
            str(rig.data),
            "--json-out",
            str(out),
        ),
        *("--grpc-url", rig.server.grpc, "--http-url", rig.server.http, "--metrics-url", rig.server.metrics),
        *("--list-sizes", "8:0.5,16:0.5", *flags),
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def locust(rig: Rig, out: Path, *flags: str, code: int = 0) -> tuple[dict, str]:
    process = start_locust(rig, out, *flags)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code and out.exists(), output
    return json.loads(out.read_text()), output


@pytest.mark.parametrize("user", ["TritonGrpc", "TritonHttp", "TritonGrpcClosed", "TritonHttpClosed"])
def test_each_user_runs_headless_and_leaves_its_figures(rig, tmp_path, user):
    found, output = locust(rig, tmp_path / "result.json", user, "-u", "20", "-r", "100", "-t", "3s")
    assert set(found["arms"]) == {"student", "baseline"}, output
    for row in found["arms"].values():
        assert row["failed"] == row["unanswered"] == 0
        assert 0 < row["answered"] < 60  # 20 requests a second for 3 seconds over two arms, fewer on a busy machine
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
    assert found["settings"]["users"] == [user]
    more = found["server"]["student"]["requests"] - found["arms"]["student"]["answered"]
    # a closed loop stops its users where they stand: a request under way then is the server's but no answer's
    assert 0 <= more <= (20 if user.endswith("Closed") else 0)
    assert found["machine"]["cpus"] and found["versions"]["locust"]


EXPERIMENT = """
default_model: baseline
experiments:
  - name: load
    seed: load-1
    arms: [{name: baseline, model: baseline}, {name: student, model: student}]
    control: baseline
"""


@pytest.mark.parametrize("user", ["Router", "RouterClosed"])
def test_the_router_is_loaded_as_one_arm_and_both_models_answer(rig, tmp_path, user):
    (tmp_path / "experiment.yaml").write_text(EXPERIMENT)
    with start_router(
        tmp_path / "experiment.yaml", rig.server.grpc, tmp_path / "log", "--deadline-ms", "5000"
    ) as router:
        found, output = locust(
            rig, tmp_path / "result.json", user, "-u", "10", "-r", "100", "-t", "3s", "--router-url", router.url
        )
    assert set(found["arms"]) == {"router"} and found["arms"]["router"]["failed"] == 0, output
    assert {"student", "baseline"} <= set(found["server"])


def test_without_a_class_name_the_grpc_user_runs(rig, tmp_path):
    found, _ = locust(rig, tmp_path / "result.json", "-u", "5", "-r", "100", "-t", "2s", "--arms", "student")
    assert found["settings"]["users"] == ["TritonGrpc"] and set(found["arms"]) == {"student"}


def test_an_open_loop_reports_a_stall_that_a_closed_loop_hides(rig, tmp_path):
    p99 = {}
    for user in ("TritonGrpc", "TritonGrpcClosed"):
        out = tmp_path / f"{user}.json"
        process = start_locust(
            rig, out, user, "-u", "1", "--rate", "40", "-t", "7s", "--arms", "student", "--arrivals", "constant"
        )
        time.sleep(4)
        rig.stall("student", 2.0)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        p99[user] = json.loads(out.read_text())["arms"]["student"]
    assert p99["TritonGrpc"]["p99_ms"] > 1500  # a quarter of the requests was due during the stall
    assert p99["TritonGrpcClosed"]["p95_ms"] < 500  # one waited, the others were never sent
    assert p99["TritonGrpcClosed"]["sent"] < p99["TritonGrpc"]["sent"]


def test_workers_of_a_distributed_run_add_up(rig, tmp_path):
    found, output = locust(rig, tmp_path / "result.json", "-u", "20", "-r", "100", "-t", "6s", "--processes", "2")
    answered = sum(row["answered"] for row in found["arms"].values())
    assert answered == sum(found["server"][arm]["requests"] for arm in found["arms"]), output
    assert answered > 0


@contextmanager
def slow_router(seconds: float) -> Iterator[tuple[str, list[str]]]:
    """(address, query of every page that it answered) of a router that takes its time, and scores as its coins fall."""
    answered: list[str] = []

    class Slow(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            time.sleep(seconds)
            order = [document["doc_id"] for document in asked["documents"]]
            scores = [random.uniform(-9, 9) for _ in order]
            page = {"fallback": "", "served_by": "interleaved", "ranking": order, "scores": scores}
            content = json.dumps(page).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            answered.append(asked["query"])

        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", answered
    finally:
        server.shutdown()
        server.server_close()


def test_answers_that_come_late_to_workers_are_counted(rig, tmp_path):
    """Seen: of a server that takes 1.5 s a third of a ten second run was unanswered, and p95 failed: Locust hears its
    workers for half a second more. And an interleaved page was called wrong wherever its coins had fallen otherwise."""
    with slow_router(1.5) as (address, answered):
        found, output = locust(
            rig, tmp_path / "result.json", "Router", "-u", "10", "-r", "100", "-t", "3s", "--processes", "2",
            "--router-url", address,
        )  # fmt: skip
    row = found["arms"]["router"]
    assert row["unanswered"] == row["failed"] == 0 and row["sent"] == row["answered"] == len(answered) > 0, output


def test_the_capacity_search_ends_by_itself_with_a_rate_that_held(rig, tmp_path):
    found, output = locust(
        rig, tmp_path / "result.json", "--find-capacity", "--arms", "student", "--start-rate", "20", "--max-rate", "40",
        "--step-s", "3", "--p99-ms", "20000",  # beside other tests a page may wait for its turn
    )  # fmt: skip
    capacity = found["capacity"]["student"]
    assert capacity["rate"] == 40 and capacity["limited_by"] == "the search's highest rate", output
    assert [step["passed"] for step in capacity["steps"]] == [True] * len(capacity["steps"])


def test_an_unreachable_server_is_counted_as_failures_and_fails_the_run(rig, tmp_path):
    found, output = locust(
        rig, tmp_path / "result.json", "-u", "5", "-r", "100", "-t", "5s", "--rate", "4", "--arrivals", "constant",
        "--grpc-url", "127.0.0.1:9", code=1,
    )  # fmt: skip
    assert set(found["arms"]) == {"student", "baseline"}, output  # 100 requests: the arms take turns
    for row in found["arms"].values():
        assert row["answered"] == 0 and row["failed"] == row["sent"] > 0 and row["p99_ms"] is None, output


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--grpc-url", "http://127.0.0.1:8000"), "Triton's address for grpc is needed: grpc://host:port"),
        (("--grpc-url", "127.0.0.1"), "host and port are needed"),
        (("--token-file", "nowhere"), "--token-file nowhere: no such file"),
        (("Router", "--router-key-file", "nowhere"), "--router-key-file nowhere: cannot be read"),
    ],
)
def test_an_address_or_a_key_that_is_none_is_one_clear_line(rig, tmp_path, flags, reason):
    output, _ = start_locust(rig, tmp_path / "result.json", "-u", "1", "-t", "1s", *flags).communicate(timeout=300)
    assert reason in output and "Traceback" not in output and not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("processes", [[], ["--processes", "2"]])
def test_missing_data_is_one_clear_line(rig, tmp_path, processes):
    """Seen: workers that had nothing to send ended, and the master with exit code 0 and no result."""
    missing = ["--data", str(tmp_path / "none"), *processes]
    process = start_locust(rig, tmp_path / "result.json", "-u", "1", "-t", "1s", *missing)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "make a dataset first" in output and "Traceback" not in output


@pytest.mark.parametrize(("flag", "value"), [("--rate", "0"), ("--arms", ","), ("--zipf", "nan"), ("--step-s", "1")])
def test_a_flag_that_makes_no_sense_is_one_clear_line(rig, tmp_path, flag, value):
    """Seen: a traceback for each request, two thousand in two seconds, and a result of nothing."""
    process = start_locust(rig, tmp_path / "result.json", "-u", "1", "-t", "1s", flag, value)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and f"error: {flag} " in output and "Traceback" not in output
