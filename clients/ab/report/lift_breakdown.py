"""Page CTR's lift over time and by segment: where to look next, beside the main table."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from clients.ab.report.comparison_table import ErrorRates, lift_of
from clients.ab.report.experiment_pages import ArmTotals, ExperimentPages
from clients.ab.report.metrics import PAGE_CTR

logger = logging.getLogger("ab_report")


def lift_over_time(pages: ExperimentPages, rates: ErrorRates) -> dict[str, list]:
    """The lift of all users up to the end of each time slice, with the confidence sequence: lists time, lift,
    low, high. It starts with the first slice at whose end it can be tested."""
    size = sum(pages.users)
    n, d = np.zeros(size), np.zeros(size)
    is_treatment = np.zeros(size, dtype=bool)
    points: dict[str, list] = {"time": [], "lift": [], "low": [], "high": []}
    for end, rows in zip(pages.slice_ends, pages.by_slice(PAGE_CTR)):
        n[rows["user_no"]] += rows["n"].astype(float)
        d[rows["user_no"]] += rows["d"].astype(float)
        is_treatment[rows["user_no"]] = rows["treatment"]
        arms = [(d > 0) & ~is_treatment, (d > 0) & is_treatment]
        try:
            comparison = lift_of(ArmTotals([n[arm] for arm in arms], [d[arm] for arm in arms]), rates)
        except ValueError:  # an arm without two users yet: the line starts later
            continue
        if comparison.has_interval:
            point = {"lift": comparison.lift, "low": comparison.always_low, "high": comparison.always_high}
            for name, value in {"time": end, **point}.items():
                points[name].append(value)
    return points


def lift_by_segment(pages: ExperimentPages, rates: ErrorRates) -> list[dict[str, Any]]:
    """The lift within each segment that has clicks in both arms and users who differ: family, name, lift, low, high."""
    found = []
    for family, members in pages.segments().items():
        for label, condition in members:
            try:
                comparison = lift_of(pages.totals_where(PAGE_CTR, condition), rates)
            except ValueError as problem:
                logger.info("segment %s left out: %s", label, problem)
                continue
            if comparison.has_interval:
                interval = {"lift": comparison.lift, "low": comparison.low, "high": comparison.high}
                found.append({"family": family, "name": label, **interval})
    return found
