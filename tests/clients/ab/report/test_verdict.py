"""What the verdict says where an arm has no click at all."""

from __future__ import annotations

import datetime as dt

import pyarrow as pa
import pytest

from clients.ab.report.comparison_table import ErrorRates, ReportRow, holds_at_any_time
from clients.ab.report.statistics import Comparison, always_valid_margin
from clients.ab.report.verdict import verdict
from tests.clients.ab.report.test_report import metric, replace_column, report
from tests.helpers.ab_logs import exposures, save, started


def without_clicks(log: pa.Table, arm: str, since: dt.datetime) -> pa.Table:
    """The log with no click of an arm's pages since then."""
    rows = zip(log.column("arm").to_pylist(), log.column("timestamp").to_pylist())
    silent = [of == arm and moment >= since for of, moment in rows]
    for name in ("clicks", "clicked_positions", "dwell_seconds"):
        values = log.column(name).to_pylist()
        log = replace_column(log, name, [type(value)() if gone else value for gone, value in zip(silent, values)])
    return log


@pytest.mark.parametrize("start", [None, "2026-11-05"])  # with clicks before it, CUPED has something to adjust by
@pytest.mark.parametrize(("silent", "other"), [("baseline", "student"), ("student", "baseline")])
def test_an_arm_whose_clicks_are_not_logged_is_named(tmp_path, silent, other, start):
    """Seen: "no clicks to compare" where the treatment had hundreds, and "student loses" where its log was lost."""
    log = without_clicks(
        exposures(1000), silent, dt.datetime.fromisoformat((start or "2026-11-01") + "T00:00:00+00:00")
    )
    figures = report(save(tmp_path, started(log, start) if start else log), start=start)
    page = metric(figures, "page CTR")
    clicked = page["control_text" if silent == "student" else "treatment_text"]
    assert figures["verdict"] == (
        f"No verdict: {silent} has no click, while {other} has {clicked} page CTR: check {silent}'s click logging."
    )
    assert clicked.endswith("%") and float(clicked[:-1]) > 20


def test_a_treatment_without_clicks_may_be_chance():
    row = ReportRow("page CTR", 0.001, 0.0, lift=-1.0, low=-1.0, high=-1.0, p=0.3, adjusted_p=0.3, decides=True)
    assert verdict([row], True, {"baseline": 900, "student": 900}).startswith("No difference found.")


@pytest.mark.parametrize(("share", "holds"), [(1, False), (3, True)])
def test_a_win_holds_at_any_time_if_it_does_at_all_metrics_together(share, holds):
    """Seen: 6.5% of tests of an arm with itself won "at any time", by one of three intervals of 5% each."""
    lift = 1.01 * always_valid_margin(0.02, 2000, 0.05 / share)
    found = Comparison(0.3, 0.3 * (1 + lift), lift, 0.02, 0.0, 0.0, 1e-4, 0.0, 0.0, (1000, 1000))
    assert holds_at_any_time(found, ErrorRates()) == holds
    row = ReportRow("page CTR", lift=lift, p=1e-4, adjusted_p=3e-4, tone="up", decides=True, holds_at_any_time=holds)
    said = verdict([row], True, {"baseline": 1000, "student": 1000})
    assert ("This holds at any time of looking." in said) == holds == ("do not exclude zero yet" not in said)


def test_a_few_users_decide_nothing():
    """Seen: "student wins" in one of five tests of an arm with itself, of three users each; one in seven of five."""
    row = ReportRow("page CTR", 0.1, 0.3, lift=2.0, low=0.5, high=3.5, p=0.01, adjusted_p=0.02, tone="up", decides=True)
    said = verdict([row], True, {"baseline": 5000, "student": 29})
    assert said.startswith("No verdict: student has 29 users, and p values and intervals hold from 30 users an arm on.")
    assert verdict([row], True, {"baseline": 5000, "student": 30}).startswith("student wins")
