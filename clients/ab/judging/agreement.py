"""What side-by-side judgments say: the advantage with an interval that holds at every look, and the raters' agreement.
NumPy only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

VALUES = {"good": 1, "same": 0, "bad": -1}


def last_values(judgments: Iterable[tuple[str, str, str]]) -> dict[str, dict[str, float]]:
    """query -> rater -> value of the last verdict: a later word of the same rater replaces the earlier one.

    judgments: (query, rater, verdict), oldest first; an empty verdict is a query that was skipped.
    """
    last: dict[str, dict[str, float]] = defaultdict(dict)
    for number, (query, rater, verdict) in enumerate(judgments):
        if verdict:
            # without a name, two judgments of a query are two people's
            last[query][rater or f"unnamed {number}"] = VALUES[verdict]
    return last


def verdicts_of_queries(last: Mapping[str, Mapping[str, float]]) -> list[str]:
    """good, same or bad of each query, which counts once: the mean of its raters' values, rounded.

    last: what last_values gives.
    """
    means = [sum(values.values()) / len(values) for values in last.values()]
    return ["good" if mean >= 0.5 else "bad" if mean <= -0.5 else "same" for mean in means]


def advantage_interval(verdicts: Iterable[str], alpha: float = 0.05, planned: int = 100) -> tuple[float, float, float]:
    """(good minus bad over all, low, high): the interval covers the truth at every number of judgments at once.

    Robbins' normal mixture for values within -1 and 1, which are sub-Gaussian with variance 1 (Howard, Ramdas,
    McAuliffe and Sekhon, Annals of Statistics 2021): so one may look after each judgment and stop when it leaves 0.
    planned: at how many judgments it is tightest. (0, -1, 1) for no judgment.
    """
    values = [VALUES[verdict] for verdict in verdicts]
    if not values:
        return 0.0, -1.0, 1.0
    count, mean = len(values), sum(values) / len(values)
    log_alpha = -2 * np.log(alpha)
    rho = (log_alpha + np.log(log_alpha + 1)) / planned
    scaled = count * rho
    margin = float(np.sqrt((scaled + 1) / (scaled * count) * (np.log(scaled + 1) + log_alpha)))
    return mean, max(-1.0, mean - margin), min(1.0, mean + margin)


def krippendorff_alpha(by_unit: Mapping[str, Mapping[str, float]]) -> float:
    """Agreement of raters, 1 for perfect, 0 for what chance gives (Krippendorff 2004, interval distances).

    by_unit: unit (a query) -> rater -> value. Units of one rater say nothing. NaN where no unit has two raters, or all
    values are equal, since chance would agree too.
    """
    units = [list(values.values()) for values in by_unit.values() if len(values) > 1]
    every = np.array([value for values in units for value in values], float)
    if len(every) < 2:
        return float("nan")
    # pairs within a unit count 1 / (raters - 1), so that every value counts once
    observed = sum(_squares(np.array(values, float)) / (len(values) - 1) for values in units) / len(every)
    expected = _squares(every) / (len(every) * (len(every) - 1))
    return 1 - observed / expected if expected else float("nan")


def _squares(values: np.ndarray) -> float:
    """Sum of squared differences over all ordered pairs."""
    return float(2 * (len(values) * (values**2).sum() - values.sum() ** 2))
