"""Off-policy estimates: clicks a page of a policy that did not run, from the log of one that did. NumPy only.

Every shown document is a row with a weight: how much likelier the new policy would have had it looked at than the
logging one did. For a ranking under the position-based model that is the ratio of two examination propensities (Li et
al., "Offline Evaluation of Ranking Policies with Click Models", KDD 2018); for a policy that draws one item at random,
the ratio of two probabilities.

    IPS    mean over pages of  sum weight * click
    SNIPS  the same, divided by what the weights add up to and multiplied by what they should (Swaminathan and Joachims,
           NeurIPS 2015)
    DR     mean over pages of  direct + sum weight * (click - predicted)   (Dudik, Langford and Li, ICML 2011)

Documents that the log showed where nobody looks say nothing. IPS counts them as never clicked, SNIPS and DR about as
the others; every interval is widened to hold both, from never to as often as the others.

Few clicks with large weights are skewed to the right, so intervals are symmetric on the logarithm's scale. The unit of
variance is the user.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LoggedRows:
    """The log as the estimators need it. n rows (shown documents), p pages, users numbered from 0.

    page: int [n], each row's page; click: float [n]; weight: float [n]; mass: float [n], how much of the logging
    policy's attention the row had (its examination propensity; 1 where a policy draws one item); predicted: float [n],
    clicks that the reward model expects of the row as it was shown; user: int [p]; target_mass: float [p], the
    attention that the new policy gives to the page's documents together; direct: float [p], clicks that the reward
    model expects of the new policy's page; log_error: standard error of the logarithm of any estimate that comes from
    propensities being estimates themselves.
    """

    page: NDArray[np.int64]
    click: Floats
    weight: Floats
    mass: Floats
    predicted: Floats
    user: NDArray[np.int64]
    target_mass: Floats
    direct: Floats
    log_error: float = 0.0

    def by_page(self, values: Floats) -> Floats:
        """Sums of row values over pages, float [p]."""
        return np.bincount(self.page, values, minlength=len(self.user)).astype(np.float64)


@dataclass(frozen=True)
class Overlap:
    """How far the log can speak for the new policy.

    effective_rows: rows of equal weight that would say as much (Kish); effective_clicks: the same over clicks;
    unsupported: share of the new policy's attention that goes where the log's never went; mean_weight, its standard
    error: 1 if the logged probabilities are true.
    """

    effective_rows: float
    effective_clicks: float
    unsupported: float
    mean_weight: float
    mean_weight_error: float


@dataclass(frozen=True)
class Limits:
    """Where a forecast is refused.

    Args:
        min_effective_rows: shown documents of equal weight that would say as much as the weighted log
        min_effective_clicks: the same over clicks
        max_unsupported: share of the new arm's attention to documents that the log showed where nobody looks
    """

    min_effective_rows: float = 200.0
    min_effective_clicks: float = 10.0
    max_unsupported: float = 0.05

    def objection(self, overlap: Overlap) -> str:
        """Why this log cannot speak for the new policy, in one line; empty if it can."""
        if overlap.effective_clicks < self.min_effective_clicks:
            return (
                f"the log holds {overlap.effective_clicks:.1f} effective clicks for the new arm, and "
                f"{self.min_effective_clicks:g} are needed: log more pages"
            )
        if overlap.effective_rows < self.min_effective_rows:
            return (
                f"the log says as much of the new arm as {overlap.effective_rows:.0f} shown documents would, and "
                f"{self.min_effective_rows:g} are needed: the two show too little in common"
            )
        if overlap.unsupported > self.max_unsupported:
            return (
                f"{overlap.unsupported:.1%} of what users would see of the new arm stood where nobody looks, and "
                f"{self.max_unsupported:.0%} is the limit: interleave the two, or run a small A/B test"
            )
        off = abs(overlap.mean_weight - 1)
        if off > 0.05 and off > 4 * overlap.mean_weight_error:
            return (
                f"the weights are {overlap.mean_weight:.2f} on average instead of 1: the logged probabilities are wrong"
            )
        return ""


@dataclass(frozen=True)
class Forecast:
    """An estimate of clicks a page, and its lift over the logged pages, each with an interval on the log scale."""

    estimator: str
    value: float
    low: float
    high: float
    lift: float
    lift_low: float
    lift_high: float


@dataclass(frozen=True)
class Outlook:
    """What a log says of a new policy. logged: clicks a page as logged; refusal: empty, or why there is no forecast."""

    pages: int
    users: int
    logged: float
    overlap: Overlap
    refusal: str
    forecasts: list[Forecast] = field(default_factory=list)

    def of(self, estimator: str) -> Forecast:
        """One forecast by its estimator's name. KeyError if the log was refused."""
        return {forecast.estimator: forecast for forecast in self.forecasts}[estimator]


def overlap_of(rows: LoggedRows) -> Overlap:
    """Measure the overlap of the two policies."""
    weighted = rows.weight * rows.click
    used = rows.by_page(rows.weight * rows.mass)
    target = float(rows.target_mass.sum())
    ratio = used / (target / len(rows.user))
    return Overlap(
        _effective(rows.weight, rows.mass),
        _effective(weighted, np.ones(len(weighted))),
        max(0.0, 1 - float(used.sum()) / target) if (rows.mass < 1).any() else 0.0,
        float(ratio.mean()) if (rows.mass == 1).all() else 1.0,
        float(ratio.std() / np.sqrt(len(ratio))),
    )


def _effective(weights: Floats, counts: Floats) -> float:
    squares = float((weights**2 * counts).sum())
    return float((weights * counts).sum()) ** 2 / squares if squares else 0.0


def forecast(rows: LoggedRows, limits: Limits, alpha: float = 0.05) -> Outlook:
    """The three estimates, or why there are none. alpha: error rate of each interval.

    ValueError if the log has no page or fewer than two users.
    """
    pages, users = len(rows.user), int(rows.user.max()) + 1 if len(rows.user) else 0
    if users < 2:
        raise ValueError(f"{users} users: a variance needs at least two")
    logged = rows.by_page(rows.click)
    overlap = overlap_of(rows)
    refusal = limits.objection(overlap)
    outlook = Outlook(pages, users, float(logged.mean()), overlap, refusal)
    if refusal:
        return outlook
    ips = rows.by_page(rows.weight * rows.click)
    used = rows.by_page(rows.weight * rows.mass)
    # the ratio of two means as a mean of pages: the delta method
    snips = ips.mean() / used.mean() * rows.target_mass.mean()
    per_page = snips + (ips - ips.mean() / used.mean() * used) * rows.target_mass.mean() / used.mean()
    dr = rows.direct + rows.by_page(rows.weight * (rows.click - rows.predicted))
    unseen = 1 - overlap.unsupported
    for name, values, widened in (
        ("IPS", ips, (1.0, 1 / unseen)), ("SNIPS", per_page, (unseen, 1.0)), ("DR", dr, (unseen, 1.0))
    ):  # fmt: skip
        outlook.forecasts.append(_estimate(name, values, logged, rows, alpha, widened))
    return outlook


def _estimate(
    name: str, values: Floats, logged: Floats, rows: LoggedRows, alpha: float, widened: tuple[float, float]
) -> Forecast:
    """The mean of page values, float [p], and its ratio to the logged mean, with user-clustered log-scale intervals.

    widened: factors of the lower and the upper end, for what the log did not show.
    """
    z = float(stats.norm.isf(alpha / 2))
    value, base = float(values.mean()), float(logged.mean())
    if value <= 0:  # a doubly robust estimate may be; it has no logarithm, and no lift
        nan = float("nan")
        return Forecast(name, value, nan, nan, nan, nan, nan)
    own = values / value - 1
    error = np.hypot(_clustered(own, rows.user), rows.log_error)
    lift_error = np.hypot(_clustered(own - (logged / base - 1), rows.user), rows.log_error)
    reach, lift_reach = np.exp(z * error), np.exp(z * lift_error)
    ratio = value / base
    below, above = widened
    return Forecast(
        name, value, below * value / reach, above * value * reach, ratio - 1,
        below * ratio / lift_reach - 1, above * ratio * lift_reach - 1,
    )  # fmt: skip


def _clustered(influence: Floats, user: NDArray[np.int64]) -> float:
    """Standard error of a mean of page values whose users are independent. influence: float [p], of mean 0."""
    sums = np.bincount(user, influence)
    users = len(sums)
    return float(np.sqrt((sums**2).sum() * users / (users - 1))) / len(influence)
