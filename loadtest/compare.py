"""Two load test results side by side, and a failure for CI where the second is worse beyond the runs' own noise."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import variance
from typing import Any

from ranking.errors import DataError, InputError
from ranking.program import run

MEASURES = {"answered_per_second": True, "p50_ms": False, "p95_ms": False, "p99_ms": False}  # name: higher is better


@dataclass
class Config:
    """Compare two JSON results of `locust -f loadtest/`.

    Args:
        before: result of the old run
        after: result of the new run
        fail_on_regression: exit with 3 if the new run is worse beyond noise and tolerance
        tolerance: relative change that is never called a regression, however steady the runs were
    """

    before: Path
    after: Path
    fail_on_regression: bool = False
    tolerance: float = 0.1


@dataclass
class Change:
    """One measure of one arm in both runs. noise: twice the standard error of the difference over the runs' slices."""

    arm: str
    measure: str
    before: float | None
    after: float | None
    noise: float
    worse: bool


def read(path: Path) -> dict[str, Any]:
    """A result file of the load test. DataError if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        _ = found["generator"]["saturated"]
        for row in found["arms"].values():
            _ = (
                row["answered"],
                row["failed"],
                row["unanswered"],
                [one[name] for one in (row, *row["slices"]) for name in MEASURES],
            )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as problem:
        raise DataError(path, f"is no load test result: {type(problem).__name__}: {problem}") from problem
    return found


def noise(before: list[float | None], after: list[float | None]) -> float:
    """Two standard errors of the difference of means, from each run's slices; 0 where there are too few."""
    runs = [[v for v in values if v is not None] for values in (before, after)]
    if any(len(values) < 2 for values in runs):
        return 0.0
    return 2 * math.sqrt(sum(variance(values) / len(values) for values in runs))


def changes(before: dict[str, Any], after: dict[str, Any], tolerance: float) -> list[Change]:
    """Every measure of every arm of the run before. An arm that the other run lacks is worse: its model was not
    served. InputError if the runs have none in common."""
    if not before["arms"].keys() & after["arms"].keys():
        raise InputError(f"the runs have no arm in common: {', '.join(before['arms'])} and {', '.join(after['arms'])}")
    found = []
    for arm, old in before["arms"].items():
        new = after["arms"].get(arm)
        if new is None:
            found.append(Change(arm, "answered", old["answered"], 0, 0.0, True))
            continue
        for measure, higher_is_better in MEASURES.items():
            spread = noise(*([s[measure] for s in row["slices"]] for row in (old, new)))
            a, b = old[measure], new[measure]
            if a is None or b is None:  # a quantile among failed requests: worse if it was fine before
                worse = a is not None
            else:
                loss = (a - b) if higher_is_better else (b - a)
                worse = loss > max(spread, tolerance * a)
            found.append(Change(arm, measure, a, b, spread, worse))
        errors = [row["failed"] + row["unanswered"] for row in (old, new)]
        found.append(Change(arm, "failed", errors[0], errors[1], 0.0, errors[1] > errors[0]))
    return found


def text(value: float | None) -> str:
    """A measure for the table; None is a quantile among failed requests."""
    return "failed" if value is None else f"{value:.2f}"


def main(config: Config) -> int:
    """Print both runs side by side. Returns 3 for a regression if that was asked for."""
    before, after = read(config.before), read(config.after)
    for path, found in ((config.before, before), (config.after, after)):
        if found["generator"]["saturated"]:
            print(f"warning: {path}: {found['generator']['meaning']}")
    rows = changes(before, after, config.tolerance)
    print(f"{'arm':12} {'measure':20} {'before':>10} {'after':>10} {'change':>9} {'noise':>8}")
    for row in rows:
        change = "" if not row.before or row.after is None else f"{(row.after / row.before - 1) * 100:+.1f}%"
        mark = "  worse" if row.worse else ""
        print(
            f"{row.arm:12} {row.measure:20} {text(row.before):>10} {text(row.after):>10} {change:>9} "
            f"{row.noise:8.2f}{mark}"
        )
    worse = [row for row in rows if row.worse]
    print(f"{len(worse)} of {len(rows)} measures are worse" if worse else "no regression")
    return 3 if worse and config.fail_on_regression else 0


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python loadtest/compare.py a.json b.json --fail-on-regression",
        positional=("before", "after"),
    )
