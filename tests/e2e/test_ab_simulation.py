"""Simulated users through the real router and a real tritonserver: the report must find the truth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clients.ab.router.local_router import start_router
from serving.temporary_server import start_triton
from tests.helpers.graded_rankers import write_data, write_repository

ROOT = Path(__file__).parents[2]
EXPERIMENT = """
default_model: baseline
experiments:
  - name: simulated
    seed: simulated-1
    arms: [{name: baseline, model: baseline}, {name: student, model: student}]
    control: baseline
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    with start_triton(write_repository(tmp_path_factory.mktemp("repository"))) as server:
        yield server


def program(name: str, *flags: str) -> str:
    done = subprocess.run([sys.executable, f"clients/{name}.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def simulated(triton, data: Path, folder: Path, *flags: str) -> dict:
    """Traffic, compaction, report; the report's figures."""
    folder.mkdir(exist_ok=True)
    (folder / "experiment.yaml").write_text(EXPERIMENT)
    router_flags = ("--allow-forced-arm", "--deadline-ms", "20000")
    with start_router(folder / "experiment.yaml", triton.grpc, folder / "log", *router_flags) as router:
        program("simulate_traffic", "--data", str(data), "--router", router.url, *flags)
    program("ab_compact", "--log", str(folder / "log"), "--out", str(folder / "compacted"))
    program("ab_report", "--events", str(folder / "compacted"), "--out", str(folder / "report.html"))
    return json.loads((folder / "report.json").read_text())


def test_a_better_student_is_found_and_its_true_lift_is_covered(triton, data, tmp_path):
    truth = tmp_path / "truth.json"
    figures = simulated(triton, data, tmp_path / "ab", "--users", "700", "--truth-out", str(truth))
    rates = json.loads(truth.read_text())["page_ctr"]
    true_lift = rates["student"] / rates["baseline"] - 1
    page = next(m for m in figures["metrics"] if m["name"] == "page CTR")
    assert true_lift > 0.1 and page["lift"] > 0
    assert page["always_low"] < true_lift < page["always_high"]
    assert figures["trustworthy"] and figures["pages"] > 1000
    # the truth was measured through the router: 40 queries, 2 arms
    assert "80 forced pages" in figures["basis"]["left out"]


def test_users_lost_from_one_arm_stop_the_verdict(triton, data, tmp_path):
    figures = simulated(
        triton, data, tmp_path / "ab", "--users", "900", "--pages-per-user", "1.5", "--fault", "lost",
        "--experiment-seed", "simulated-1",
    )  # fmt: skip
    assert figures["srm_p"] < 0.001 and figures["verdict"].startswith("No verdict")


def test_a_bot_is_pointed_at(triton, data, tmp_path):
    figures = simulated(triton, data, tmp_path / "ab", "--users", "400", "--fault", "bot")
    assert any("busiest user" in c["text"] and not c["passed"] for c in figures["checks"])
