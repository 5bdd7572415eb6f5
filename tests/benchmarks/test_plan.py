"""The capacity plan: its rates are those of the pages, and its closed form agrees with a simulated day."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

from benchmarks.capacity import Load, Rates, StudentMachine, smallest, waiting
from benchmarks.plan import Config, main, make_plan, rates_of, simulated
from benchmarks.simulated_day import Fleet, rate_at, simulate
from ranking.errors import InputError

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PAGE = {"requests_per_second": 500.0, "candidates": 48, "tokens": 96}


def steady(fleet: Fleet, rate: float, arrivals: int = 15_000, seed: int = 3) -> tuple[float, float, float]:
    """Mean wait, p99 of a page and share busy over 24 windows of the same rate."""
    hours = simulate(fleet, rate, 1.0, math.inf, arrivals, seed)
    return tuple(sum(getattr(hour, name) for hour in hours) / 24 for name in ("mean_wait", "p99", "busy"))


def test_the_rates_are_those_that_the_pages_name():
    rates = Rates.measured(RESULTS)
    calls = (RESULTS / "encoder_calls.md").read_text()
    assert f"and {rates.tokenise_ms * 48 * 139:.1f} ms of one core" in calls
    assert f"| {rates.encode_ms * 137:.2f} | 0.991 |" in (RESULTS / "serving.md").read_text()
    assert f"about {rates.router_ms:.1f} ms a page" in (RESULTS / "router.md").read_text()
    assert set(rates.sources) == {"tokenising", "encoder", "router", "log"}


def test_a_page_without_its_figure_is_named(tmp_path):
    for page in ("encoder_calls.md", "serving.md", "router.md"):
        shutil.copy(RESULTS / page, tmp_path)
    (tmp_path / "router.md").write_text("nothing was measured")
    with pytest.raises(InputError, match=r"router\.md: no figure for router"):
        Rates.measured(tmp_path)


def test_one_server_with_exponential_times_waits_as_the_textbook_says():
    found = waiting(1, 8.0, 0.1, variation=1.0)
    assert found.share == pytest.approx(0.8) and found.mean == pytest.approx(0.8 / (10 - 8))
    assert found.at(0.99) == pytest.approx(math.log(0.8 / 0.01) / 2)
    assert found.longer_than(found.at(0.99)) == pytest.approx(0.01)
    assert found.at(0.1) == 0.0


def test_ten_servers_wait_as_the_tables_of_erlang_say():
    assert waiting(10, 7.0, 1.0, variation=1.0).share == pytest.approx(0.2217, abs=5e-4)


def test_a_load_that_is_not_borne_waits_for_ever_and_a_thousand_servers_do_not_overflow():
    assert waiting(4, 40.0, 0.1).mean == math.inf
    assert 0 < waiting(1000, 9_900.0, 0.1).share < 1


@pytest.mark.parametrize(("machines", "load"), [(1, 0.7), (4, 0.8), (12, 0.9), (40, 0.92)])
def test_the_simulation_agrees_with_the_closed_form(machines, load):
    """Within 2% of the busy share, 20% of the mean wait and 15% of the page's p99."""
    service, idle = 0.02, 0.025
    rate = load * machines / service
    mean, p99, busy = steady(Fleet(machines, 0.0, service, 1, idle), rate)
    closed = waiting(machines, rate, service)
    assert busy == pytest.approx(load, rel=0.02)
    assert mean == pytest.approx(closed.mean, rel=0.2)
    assert p99 == pytest.approx(idle + closed.at(0.99), rel=0.15)


def test_merged_calls_bear_a_load_that_single_ones_do_not():
    """A call of 8 ms and 1 ms a list: 111 lists a second alone, 333 by fours."""
    rate = 250.0
    alone = steady(Fleet(1, 0.008, 0.001, 1, 0.009), rate, arrivals=2_000)
    merged = steady(Fleet(1, 0.008, 0.001, 4, 0.009), rate, arrivals=2_000)
    assert merged[0] < 0.05 < 1.0 < alone[0]


def test_failed_machines_are_away_for_as_long_as_they_should_and_no_page_is_lost():
    fleet = Fleet(40, 0.0, 0.02, 1, 0.02, failure_hours=2.0, repair_seconds=600.0)
    hours = simulate(fleet, 1000.0, 1.0, 0.5, 5_000, seed=1)
    up = sum(hour.machines_up for hour in hours) / 24 / 40
    assert up == pytest.approx(120 / 130, abs=0.02)  # two hours up, ten minutes down
    assert all(0 <= hour.mean_wait < 1 and hour.p50 >= 0.02 for hour in hours)
    often = dataclasses.replace(fleet, failure_hours=0.2)  # 22 of 40 machines are up, and 30 would be needed
    assert all(hour.late > 0.3 for hour in simulate(often, 1500.0, 1.0, 0.1, 5_000)[2:])


def test_the_peak_is_reached_at_its_hour_and_the_quietest_is_the_given_share():
    assert rate_at(20, 100, 0.2) == pytest.approx(100) and rate_at(8, 100, 0.2) == pytest.approx(20)


@pytest.mark.parametrize("machine", [{}, {"encoder_tokens_per_second": 700_000.0, "merged_lists": 4, "call_ms": 2.0}])
def test_the_planned_fleet_meets_the_deadline_and_a_smaller_one_does_not(machine):
    config = Config(**PAGE, **machine, deadline_ms=60, simulated_pages=20_000, spare=0, failure_hours=1e9)
    rates = rates_of(config)
    plan = make_plan(config, rates)
    assert max(hour.p99 for hour in simulated(config, rates, plan.students)) < 0.060
    too_few = math.floor(500 / (plan.stages[plan.saturates_first][0] / plan.students))  # over 100% at the peak
    assert too_few < plan.students
    assert max(hour.late for hour in simulated(config, rates, too_few)) > 0.05


def test_an_accelerator_moves_the_limit_to_tokenising_and_a_slow_disk_to_the_log():
    rates = Rates.measured(RESULTS)
    stages = StudentMachine(cores=16, encoder_tokens_per_second=10e6).stages(Load(1, 48, 139), rates)
    assert stages["tokenising"] == pytest.approx(16 / 0.0132) and stages["tokenising"] < stages["encoder"]
    slow = Config(**PAGE, disk_mb_per_second=1.0, busy_share=1.0)
    assert make_plan(slow, rates).saturates_first == "log disk"


def test_flags_replace_the_measured_rates(tmp_path):
    config = Config(
        **PAGE, tokenise_ms_per_list=10.0, encode_ms_per_list=100.0, router_ms=2.0, log_bytes_per_page=1000.0,
        results=tmp_path,
    )  # fmt: skip
    rates = rates_of(config)
    assert rates.tokenise_ms * 48 * 96 == pytest.approx(10) and rates.log_bytes * 48 == pytest.approx(1000)
    assert set(rates.sources.values()) == {"flag"}
    plan = make_plan(config, rates)
    assert plan.stages["tokenising and encoder (one set of cores)"][0] == pytest.approx(plan.students * 16 / 0.11)


def test_a_page_that_no_number_of_machines_ranks_in_time_is_refused():
    config = Config(**PAGE, cores=1, deadline_ms=50)
    with pytest.raises(InputError, match="more machines do not help"):
        make_plan(config, rates_of(config))


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"busy_share": 1.5}, {"spare": -1}, {"router_ms": math.inf}])
def test_a_setting_that_makes_no_sense_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**PAGE | wrong)


def test_the_plan_is_written_and_costs_what_its_machines_cost(tmp_path, capsys):
    out = tmp_path / "plan.json"
    main(Config(**PAGE, price_per_hour=2.0, simulated_pages=200, out=out))
    plan = json.loads(out.read_text())
    assert len(plan["hours"]) == 24 and plan["machine_hours"] < plan["students"] * 24
    printed = capsys.readouterr().out
    assert f"money: {plan['students'] * 48:,.2f} a day" in printed and "router.md" in printed


def test_smallest_finds_the_border():
    assert [smallest(lambda count, least=least: count >= least) for least in (1, 2, 3, 17, 1000)] == [1, 2, 3, 17, 1000]
