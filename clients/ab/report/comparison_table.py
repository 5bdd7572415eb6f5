"""The report's main table: every metric of both arms, its lift with intervals and p values, or why there is none."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from clients.ab.report.experiment_pages import ArmTotals, ExperimentPages
from clients.ab.report.metrics import QUANTILE_METRICS, RATIO_METRICS, QuantileMetric, RatioMetric
from clients.ab.report.statistics import (
    Comparison,
    UserTotals,
    always_valid_margin,
    compare_arms,
    cuped,
    estimate,
    holm,
    quantile,
)
from ranking.telemetry import bars_are_read

Metric = RatioMetric | QuantileMetric


@dataclass(frozen=True)
class ErrorRates:
    """How sure the report is. alpha: error rate of tests and intervals.

    planned_users: users of both arms at which the always-valid interval is tightest, chosen before the start.
    """

    alpha: float = 0.05
    planned_users: int = 10_000


@dataclass
class ReportRow:
    """One metric in the report: both arms, the lift with its intervals, or the reason why there is none.

    tone: `up` or `down` for a lift that the adjusted p calls real, by whether it is better for users;
    holds_at_any_time: whether it may be called so however often and at however many metrics somebody looks.
    """

    name: str
    control: float | None = None
    treatment: float | None = None
    control_text: str = "n/a"
    treatment_text: str = "n/a"
    lift: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    adjusted_p: float | None = None
    always_low: float | None = None
    always_high: float | None = None
    cuped_variance: float | None = None
    reason: str = ""
    tone: str = ""
    decides: bool = False
    holds_at_any_time: bool = False


def comparison_rows(pages: ExperimentPages, rates: ErrorRates) -> list[ReportRow]:
    """A row for each metric that this log can tell, in the order of metrics.py."""
    ratios = [metric for metric in RATIO_METRICS if pages.columns.issuperset(metric.needs)]
    shown = tqdm(ratios, desc="metrics", unit="metric", disable=not bars_are_read())
    rows = [_ratio_row(pages, metric, rates) for metric in shown]
    deciding = [(row, row.p) for row in rows if row.decides and row.p is not None]
    for (row, _), adjusted in zip(deciding, holm([p for _, p in deciding])):
        row.adjusted_p = adjusted
    quantiles = [metric for metric in QUANTILE_METRICS if metric.column in pages.columns]
    rows += [_quantile_row(pages, metric, rates) for metric in quantiles]
    metrics: list[Metric] = [*ratios, *quantiles]
    for row, metric in zip(rows, metrics):
        if row.lift is not None and row.adjusted_p is not None and row.adjusted_p < rates.alpha:
            row.tone = "up" if (row.lift > 0) == metric.higher_is_better else "down"
    return rows


def holds_at_any_time(comparison: Comparison, rates: ErrorRates) -> bool:
    """Whether the always-valid interval leaves out zero at an error rate that all deciding metrics share (Bonferroni).

    Each at the whole rate, one of three says so of arms that do not differ in 6.5% of experiments with sixty looks.
    """
    if not comparison.has_interval:
        return False
    alpha = rates.alpha / sum(metric.decides for metric in RATIO_METRICS)
    reach = always_valid_margin(comparison.standard_error, sum(comparison.users), alpha, rates.planned_users)
    return abs(comparison.lift) > reach


def lift_of(totals: ArmTotals, rates: ErrorRates) -> Comparison:
    """Treatment against control for per-user totals. ValueError if an arm has too few users or an empty denominator."""
    arms = [estimate(UserTotals(n, d)) for n, d in zip(totals.numerator, totals.denominator)]
    return compare_arms(arms[0], arms[1], rates.alpha, rates.planned_users)


def _ratio_row(pages: ExperimentPages, metric: RatioMetric, rates: ErrorRates) -> ReportRow:
    totals = pages.totals(metric)
    try:
        # an arm of zeros stays one: adjusted by the other arm's habits it would get a lift out of nothing
        if totals.covariate is None or not all(side.any() for side in totals.numerator):
            plain = lift_of(totals, rates)
            return _decided(_row(metric, plain), metric, plain, rates)
        arms = [UserTotals(*sides) for sides in zip(totals.numerator, totals.denominator, totals.covariate)]
    except ValueError as problem:
        return ReportRow(metric.name, reason=str(problem), decides=metric.decides)
    control, treatment, variance_left = cuped(arms[0], arms[1])
    comparison = compare_arms(control, treatment, rates.alpha, rates.planned_users)
    return _decided(_row(metric, comparison, variance_left), metric, comparison, rates)


def _decided(row: ReportRow, metric: RatioMetric, comparison: Comparison, rates: ErrorRates) -> ReportRow:
    row.decides = metric.decides
    row.holds_at_any_time = metric.decides and holds_at_any_time(comparison, rates)
    return row


def _quantile_row(pages: ExperimentPages, metric: QuantileMetric, rates: ErrorRates) -> ReportRow:
    try:
        control, treatment = (quantile(values, users, metric.level) for values, users in pages.values(metric.column))
        return _row(metric, compare_arms(control, treatment, rates.alpha, rates.planned_users))
    except (ValueError, IndexError) as problem:
        return ReportRow(metric.name, reason=f"no {metric.column} in one arm: {problem}")


def _row(metric: Metric, comparison: Comparison, cuped_variance: float | None = None) -> ReportRow:
    row = ReportRow(metric.name, comparison.control, comparison.treatment)
    row.control_text, row.treatment_text = metric.unit.show(comparison.control), metric.unit.show(comparison.treatment)
    row.p = row.adjusted_p = comparison.p
    row.cuped_variance = cuped_variance
    if math.isnan(comparison.lift):
        row.reason = f"no lift: {metric.name} of the control is zero"
        return row
    if math.isnan(comparison.low):
        row.reason = f"not testable: {metric.name} does not vary between the users of an arm"
        return row
    row.lift, row.low, row.high = comparison.lift, comparison.low, comparison.high
    row.always_low, row.always_high = comparison.always_low, comparison.always_high
    return row


def latency_per_arm(pages: ExperimentPages, arms: tuple[str, str]) -> list[tuple[str, np.ndarray]]:
    """(arm, milliseconds float [pages]) of the arms that have latencies, control first."""
    found = zip(arms, pages.values("latency_ms"))
    return [(arm, values) for arm, (values, _) in found if len(values)]
