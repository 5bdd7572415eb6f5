"""The load test's arithmetic: quantiles, capacity search, answer checks, and the comparison of two runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from loadtest import _recorder
from loadtest._capacity_search import PRECISION, Search
from loadtest._recorder import Recorder
from loadtest._request_pool import RankRequest, check_scores, parse_sizes
from loadtest._results import exit_code, lines, result
from loadtest._server_metrics import ServerMetrics, difference
from loadtest.compare import Config as CompareConfig
from loadtest.compare import changes, main
from ranking.errors import DataError, InputError

REQUEST = RankRequest(0, "q", ("a", "b", "c"), ("A", "B", "C"), ("", "", ""))


def recorded(
    latencies: list[float], failures: int = 0, lag_ms: float = 0.1, seconds: int = 20, chunks: int = 24
) -> Recorder:
    recorder = Recorder()
    for i, latency in enumerate(latencies):
        recorder.sent(1000 + i % seconds, "student", lag_ms)
        recorder.answered(1000 + i % seconds, "student", latency, 24, chunks)
    for i in range(failures):
        recorder.sent(1000 + i % seconds, "student", lag_ms)
        recorder.failed(1000 + i % seconds, "student", "DEADLINE_EXCEEDED")
    return recorder


def found(recorder: Recorder) -> dict:
    return json.loads(json.dumps(result(recorder, {}, 0.1, {}, None), allow_nan=False))


def test_quantiles_are_within_one_percent_of_the_exact_ones():
    latencies = np.random.default_rng(1).lognormal(3, 1, 20_000)
    tally = recorded(latencies.tolist()).window("student", 0, 1e10)
    for level in (0.5, 0.95, 0.99):
        assert tally.quantile(level) == pytest.approx(np.quantile(latencies, level), rel=0.015)


def test_chunks_are_counted_beside_documents_and_told_where_they_differ():
    whole, chunked = (found(recorded([10.0] * 40, chunks=chunks)) for chunks in (24, 60))
    row = chunked["arms"]["student"]
    assert (row["chunks_per_page"], row["chunks_per_second"], row["pairs_per_second"]) == (60.0, 120.0, 48.0)
    assert "(48 pairs/s in 120 chunks/s, 60 a page)" in lines(chunked)[0] and "chunks" not in lines(whole)[0]


def test_a_failed_request_is_infinitely_slow():
    tally = recorded([10.0] * 97, failures=3).window("student", 0, 1e10)
    assert tally.quantile(0.95) == pytest.approx(10.0, rel=0.01)
    assert math.isinf(tally.quantile(0.99))
    assert found(recorded([10.0] * 97, failures=3))["arms"]["student"]["p99_ms"] is None


def test_setting_the_clock_makes_no_request_late(monkeypatch):
    """Seen: an hour forward made every request that was due in it leave at once, an hour back none for an hour."""
    before = _recorder.clock()
    assert abs(before - time.time()) < 5
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= _recorder.clock() - before < 5


def test_an_unanswered_request_counts_as_slow_too():
    recorder = recorded([10.0] * 50)
    for _ in range(50):
        recorder.sent(1001, "student", 0.1)
    row = found(recorder)["arms"]["student"]
    assert row["unanswered"] == 50 and row["p99_ms"] is None


def test_worker_reports_add_up_to_one_recorder():
    whole, merged = recorded([5.0, 50.0] * 40, failures=4), Recorder()
    half = recorded([5.0, 50.0] * 40, failures=4)
    merged.merge(json.loads(json.dumps(half.take_unsent()), object_hook=_integer_keys))
    assert half.take_unsent() == {"tallies": [], "send_lag": {}}
    assert merged.window("student", 0, 1e10) == whole.window("student", 0, 1e10)


def _integer_keys(pairs: dict) -> dict:
    return {int(k) if k.lstrip("-").isdigit() else k: v for k, v in pairs.items()}


def test_a_late_generator_says_so_itself():
    assert not found(recorded([10.0] * 100))["generator"]["saturated"]
    late = found(recorded([10.0] * 100, lag_ms=80.0))["generator"]
    assert late["saturated"] and "short of CPU" in late["meaning"]


@pytest.mark.parametrize("true_capacity", [3.0, 37.0, 410.0])
def test_the_search_finds_a_capacity_from_below(true_capacity):
    search = Search(start=4.0, highest=2000.0)
    for _ in range(60):
        if search.judge(search.rate <= true_capacity):
            break
    assert search.passed <= true_capacity <= search.failed
    assert search.failed <= search.passed * PRECISION


def test_the_search_gives_up_where_nothing_holds():
    search = Search(start=4.0, highest=2000.0)
    steps = 0
    while not search.judge(False):
        steps += 1
        assert steps < 10
    assert search.passed == 0


@pytest.mark.parametrize("unit", [0.3, 1.0, 10.0])
@pytest.mark.parametrize("true_capacity", [1.2, 2.4, 14.0, 410.0])
def test_the_search_tells_no_rate_that_was_not_sent(unit, true_capacity):
    """Seen: with users of ten requests a second, 10 held and 20 not, it told 14.9; with users of one, 2.5 for 2."""
    search = Search(4.0, 2000.0, unit)
    sent: dict[float, bool] = {0.0: True}
    while True:
        rate = unit * max(1, round(search.rate / unit))  # what whole users send
        sent[rate] = rate <= true_capacity
        if search.judge(sent[rate]):
            break
    assert sent[search.passed] and len(sent) < 20
    assert search.failed <= max(search.passed * PRECISION, search.passed + 1.001 * unit)


def test_the_first_step_of_a_search_begins_with_the_first_request():
    """Seen: workers that read their requests for longer than a step had failed it, and the capacity was below it."""
    code = """
from loadtest import _capacity
from loadtest._recorder import Recorder
now, recorder, steps = 1000.0, Recorder(), []
_capacity.clock = lambda: now
settings = _capacity.CapacitySettings(["student"], 4, 40, p99_ms=100, step_s=3, settle_s=1, rate_per_user=1)
shape = _capacity.CapacityShape(recorder, settings, steps.append)
for now in range(1000, 1060):
    assert shape.tick() == (4, 10_000.0)
recorder.sent(1060, "student", 0.1)
for now in range(1060, 1064):
    shape.tick()
    recorder.sent(now, "student", 0.1)
    recorder.answered(now, "student", 5.0, 24, 24)
now = 1065
assert shape.tick() == (6, 10_000.0), shape._steps
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )  # importing Locust patches the process
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "scores, first, reason",
    [
        ([1.0, 2.0], None, "scores of shape [2] for 3 documents"),
        ([1.0, np.nan, 2.0], None, "NaN"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.5], "moved by more than 0.1"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.05], ""),
    ],
)
def test_wrong_answers_are_named(scores, first, reason):
    said = check_scores(REQUEST, np.array(scores), None if first is None else np.array(first), tolerance=0.1)
    assert said == reason or (reason and reason in said)


def test_list_sizes_are_shares_and_nonsense_is_refused():
    assert parse_sizes("24:1,48:3") == [(24, 0.25), (48, 0.75)]
    assert parse_sizes("10") == [(10, 1.0)]
    for nonsense in ("x", "0:1", "24:-1", "24:nan", ""):
        with pytest.raises(InputError, match="--list-sizes"):
            parse_sizes(nonsense)


def test_server_counters_become_means_per_request():
    before = ServerMetrics({"student": {"nv_inference_request_success": 100.0, "nv_inference_queue_duration_us": 5e5}})
    after = ServerMetrics(
        {
            "student": {
                "nv_inference_request_success": 150.0,
                "nv_inference_queue_duration_us": 6e5,
                "nv_inference_count": 50.0,
                "nv_inference_exec_count": 10.0,
            }
        }
    )
    row = difference(before, after)["student"]
    assert (row["requests"], row["queue_ms"], row["mean_batch"]) == (50, 2.0, 5.0)
    assert difference(ServerMetrics({}, "no"), after) == {"unavailable": "no"}


def test_a_slower_run_is_worse_and_noise_is_not():
    rng = np.random.default_rng(2)
    steady = found(recorded(rng.lognormal(3, 0.2, 4000).tolist()))
    again = found(recorded(rng.lognormal(3, 0.2, 4000).tolist()))
    slower = found(recorded(rng.lognormal(3.3, 0.2, 4000).tolist()))
    assert not any(change.worse for change in changes(steady, again, 0.1))
    assert {c.measure for c in changes(steady, slower, 0.1) if c.worse} == {"p50_ms", "p95_ms", "p99_ms"}
    assert not any(change.worse for change in changes(slower, steady, 0.1))


def test_new_failures_are_a_regression(tmp_path):
    paths = []
    for name, failures in (("a", 0), ("b", 5)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(found(recorded([10.0] * 1000, failures=failures))))
    assert main(CompareConfig(paths[0], paths[1], fail_on_regression=True)) == 3
    assert main(CompareConfig(paths[0], paths[0], fail_on_regression=True)) == 0


def test_an_arm_that_the_second_run_lacks_is_a_regression():
    """Seen: the student was not served any more, and the baseline alone was called no regression."""
    both = found(recorded([10.0] * 100))
    both["arms"]["baseline"] = both["arms"]["student"]
    alone = both | {"arms": {"baseline": both["arms"]["baseline"]}}
    assert [(change.arm, change.after) for change in changes(both, alone, 0.1) if change.worse] == [("student", 0)]
    assert not any(change.worse for change in changes(alone, both, 0.1))
    with pytest.raises(InputError, match="no arm in common: baseline and router"):
        changes(alone, {"arms": {"router": alone["arms"]["baseline"]}}, 0.1)


def test_requests_that_fail_above_an_arms_capacity_fail_no_search():
    """Seen: every search whose last step refused requests ended with 1, though it had found its rate."""
    run = found(recorded([10.0] * 100, failures=3))
    assert exit_code(run, None) == 1
    run["capacity"] = {"student": {"rate": 20.0}}
    assert exit_code(run, ["student"]) == 0
    assert exit_code(run, ["student", "baseline"]) == 1  # the run was cut short
    run["capacity"]["baseline"] = {"rate": 0.0}
    assert exit_code(run, ["student", "baseline"]) == 1


def test_compare_takes_bare_paths_and_refuses_another_file(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "loadtest/compare.py", str(tmp_path / "a.json"), str(tmp_path / "b.json")],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 1 and "is no load test result" in done.stderr
    with pytest.raises(DataError):
        main(CompareConfig(tmp_path / "a.json", tmp_path / "a.json"))
    for arms in ({"student": {}}, {"student": {"failed": 0, "unanswered": 0, "slices": [{}]}}, []):  # seen: KeyError
        (tmp_path / "a.json").write_text(json.dumps({"generator": {"saturated": False}, "arms": arms}))
        with pytest.raises(DataError):
            main(CompareConfig(tmp_path / "a.json", tmp_path / "a.json"))
