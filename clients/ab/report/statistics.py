"""What an A/B report may claim: estimates with user-clustered variance, valid under peeking, and the checks before
them.

The unit of randomisation is the user, so the user is the unit of variance: pages and clicks of one user are not
independent, and a test that treats them so rejects far too often (benchmarks/ab/calibration.py shows it). Every metric
is a ratio of two per-user totals: page CTR = pages with a click / pages, user CTR = users with a click / users, dwell =
seconds after clicks / clicks. Pure functions of NumPy arrays; no table, no clock, no randomness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class UserTotals:
    """One arm's users for one ratio metric.

    numerator, denominator: float [users], per-user totals (clicked pages and pages, say); covariate: float [users], the
    user's value of any pre-period quantity, for CUPED, or None. Users with a zero denominator stay in: they are users
    of the arm. ValueError on differing lengths, fewer than two users, values not finite or an all-zero denominator.
    """

    numerator: np.ndarray
    denominator: np.ndarray
    covariate: np.ndarray | None = None

    def __post_init__(self):
        parts = [self.numerator, self.denominator] + ([] if self.covariate is None else [self.covariate])
        if len({len(part) for part in parts}) != 1:
            raise ValueError(f"per-user totals differ in length: {[len(part) for part in parts]}")
        if len(self.numerator) < 2:
            raise ValueError(f"{len(self.numerator)} users: a variance needs at least two")
        if not all(np.isfinite(part).all() for part in parts):
            raise ValueError("per-user totals hold NaN or infinity")
        if self.denominator.sum() <= 0:
            raise ValueError("the denominator is zero for every user (no page, or no click)")

    @property
    def users(self) -> int:
        """How many users the arm has."""
        return len(self.numerator)

    @property
    def ratio(self) -> float:
        """The metric: sum of the numerators over sum of the denominators."""
        return float(self.numerator.sum() / self.denominator.sum())

    def linearised(self) -> np.ndarray:
        """float [users] with the ratio as mean: the delta method's influence values (Deng, Knoblich, Lu 2018,
        section 3)."""
        return self.ratio + (self.numerator - self.ratio * self.denominator) / self.denominator.mean()


@dataclass(frozen=True)
class Estimate:
    """One arm's value with the variance of that value (already divided by the number of users)."""

    value: float
    variance: float
    users: int


@dataclass(frozen=True)
class Comparison:
    """Treatment against control for one metric. lift is relative: treatment / control - 1.

    low, high: the fixed-horizon interval of the lift; always_low, always_high: the interval that holds at every look;
    p: two-sided, of no difference. lift and its bounds are NaN where the control's value is zero; where no arm's users
    differ among themselves nothing can be tested: p is 1 and the bounds are NaN.
    """

    control: float
    treatment: float
    lift: float
    standard_error: float
    low: float
    high: float
    p: float
    always_low: float
    always_high: float
    users: tuple[int, int]

    @property
    def has_interval(self) -> bool:
        """Whether the lift and its bounds are numbers."""
        return not (math.isnan(self.lift) or math.isnan(self.low))


def estimate(arm: UserTotals) -> Estimate:
    """Ratio of totals with its delta-method variance, clustered by user."""
    return Estimate(arm.ratio, float(arm.linearised().var(ddof=1)) / arm.users, arm.users)


def cuped(control: UserTotals, treatment: UserTotals) -> tuple[Estimate, Estimate, float]:
    """Both arms' estimates with the pre-period covariate regressed out, and the variance ratio left (1 - rho^2).

    Deng, Xu, Kohavi, Walker 2013. The coefficient is pooled within arms, so that a treatment effect cannot leak into
    it; the covariate is centred on both arms' users together. ValueError if an arm has no covariate.
    """
    if control.covariate is None or treatment.covariate is None:
        raise ValueError("CUPED needs the covariate of both arms")
    values = [arm.linearised() for arm in (control, treatment)]
    covariates = [control.covariate, treatment.covariate]
    centred = [(y - y.mean(), x - x.mean()) for y, x in zip(values, covariates)]
    spread = sum(float(x @ x) for _, x in centred)
    theta = sum(float(y @ x) for y, x in centred) / spread if spread > 0 else 0.0
    middle = np.concatenate(covariates).mean()
    adjusted = [y - theta * (x - middle) for y, x in zip(values, covariates)]
    left = sum(float(y.var()) * len(y) for y in adjusted) / max(sum(float(y @ y) for y, _ in centred), 1e-300)
    control_estimate, treatment_estimate = (
        Estimate(float(y.mean()), float(y.var(ddof=1)) / len(y), len(y)) for y in adjusted
    )
    return control_estimate, treatment_estimate, left


def compare_arms(
    control: Estimate, treatment: Estimate, alpha: float = 0.05, planned_users: int = 10_000
) -> Comparison:
    """Relative lift with its fixed-horizon and always-valid intervals.

    alpha: error rate of both intervals; planned_users: users of both arms at which the always-valid interval is
    tightest. It must be chosen before the data are seen; a wrong guess widens the interval, it never invalidates it.
    """
    users = (control.users, treatment.users)
    difference = treatment.value - control.value
    difference_error = float(np.sqrt(control.variance + treatment.variance))
    if difference_error > 0:
        p = float(2 * stats.norm.sf(abs(difference) / difference_error))
    else:  # three users who all clicked against three who did not: no variance, and no certainty either
        p = 1.0
    nan = float("nan")
    if control.value == 0:
        return Comparison(0.0, treatment.value, nan, nan, nan, nan, p, nan, nan, users)
    lift = difference / control.value
    if difference_error == 0:
        return Comparison(control.value, treatment.value, lift, nan, nan, nan, p, nan, nan, users)
    ratio = treatment.value / control.value
    error = float(np.sqrt(treatment.variance + ratio**2 * control.variance) / abs(control.value))
    margin = float(stats.norm.isf(alpha / 2)) * error
    always = always_valid_margin(error, sum(users), alpha, planned_users)
    return Comparison(
        control.value,
        treatment.value,
        lift,
        error,
        lift - margin,
        lift + margin,
        p,
        lift - always,
        lift + always,
        users,
    )


def always_valid_margin(standard_error: float, users: int, alpha: float = 0.05, planned_users: int = 10_000) -> float:
    """Half-width of the asymptotic confidence sequence after `users` users (Waudby-Smith et al., arXiv 2103.06476, eq.
    4).

    The interval covers the truth at every look together with probability 1 - alpha, as users grow. The mixture's rho is
    the one that makes it tightest at planned_users (their appendix B.2).
    """
    log_alpha = -2 * np.log(alpha)
    rho_squared = (log_alpha + np.log(log_alpha + 1)) / planned_users
    scaled = users * rho_squared
    return float(standard_error * np.sqrt((scaled + 1) / scaled * (np.log(scaled + 1) + log_alpha)))


def quantile(values: np.ndarray, users: np.ndarray, level: float, confidence: float = 0.95) -> Estimate:
    """A quantile of per-request values (latency, say) with its variance clustered by user.

    values: float [requests]; users: int [requests], each request's user, 0..n-1; level in (0, 1). The variance of the
    share below the quantile is the delta method's over users; it is carried to the value axis by reading the quantiles
    at level +- z standard errors, so that no density has to be estimated (Deng, Knoblich, Lu 2018, section 4).
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1")
    if len(values) != len(users):
        raise ValueError(f"{len(values)} values but {len(users)} users")
    value = float(np.quantile(values, level))
    requests = np.bincount(users).astype(np.float64)
    present = requests > 0
    below = np.bincount(users, weights=values <= value, minlength=len(requests))[present]
    share = estimate(UserTotals(below, requests[present]))
    z = float(stats.norm.isf((1 - confidence) / 2))
    reach = z * float(np.sqrt(share.variance))
    low, high = np.quantile(values, [max(level - reach, 0.0), min(level + reach, 1.0)])
    return Estimate(value, float(((high - low) / (2 * z)) ** 2), int(present.sum()))


def sample_ratio_p(users: list[int], weights: list[float]) -> float:
    """p of the observed users per arm under the planned weights (chi-square): below 0.001 the split itself is broken.

    Nothing else in a report may be believed then (Fabijan et al. 2019).
    """
    total, weight = sum(users), sum(weights)
    if len(users) != len(weights) or len(users) < 2:
        raise ValueError(f"{len(users)} arms but {len(weights)} weights")
    if total == 0 or min(weights) <= 0:
        raise ValueError("no user, or an arm of weight zero")
    return float(stats.chisquare(users, [total * w / weight for w in weights]).pvalue)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the given order: the family's error rate stays at alpha."""
    order = np.argsort(p_values, kind="stable")
    n = len(p_values)
    adjusted = np.empty(n)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values)[order] * (n - np.arange(n))))
    return adjusted.tolist()


@dataclass(frozen=True)
class GoodSameBad:
    """Side-by-side judgments of treatment against control, as the paper's Table 4 counts them."""

    good: int
    same: int
    bad: int

    @property
    def advantage(self) -> float:
        """Delta-GSB = (good - bad) / (good + same + bad)."""
        return (self.good - self.bad) / (self.good + self.same + self.bad)

    @property
    def p(self) -> float:
        """Two-sided, by the sign test."""
        return sign_test(self.good, self.bad)


def sign_test(better: int, worse: int) -> float:
    """Exact two-sided p of no direction; ties say nothing about it and are left out."""
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def users_needed(
    baseline: Estimate, lift: float, alpha: float = 0.05, power: float = 0.8, treatment_share: float = 0.5
) -> int:
    """Users of both arms together that find a relative lift with the given power (two-sided test at alpha).

    baseline: today's value with its variance, from any log of the control; the treatment is taken to vary as much.
    """
    if lift == 0 or baseline.value == 0:
        raise ValueError("a lift of zero, or of a metric that is zero, can never be found")
    if not 0 < treatment_share < 1 or not 0 < power < 1 or not 0 < alpha < 1:
        raise ValueError("treatment_share, power and alpha lie strictly between 0 and 1")
    per_user = baseline.variance * baseline.users
    reach = stats.norm.isf(alpha / 2) + stats.norm.ppf(power)
    effect = lift * baseline.value
    return int(np.ceil(per_user * (1 / treatment_share + 1 / (1 - treatment_share)) * (reach / effect) ** 2))


FEW_USERS = 30  # below, the normal distribution of a mean over users is not to be relied on


@dataclass(frozen=True)
class Preference:
    """Share of decided interleaved pages that the treatment's team won, and p of no preference."""

    share: float
    p: float
    pages: int
    users: int


def preference(treatment_wins: np.ndarray, control_wins: np.ndarray) -> Preference:
    """Team-draft interleaving (Radlinski, Kurup, Joachims 2008): pages won by clicks, clustered by user.

    treatment_wins, control_wins: float [users], pages on which that team's documents got more clicks. Pages with as
    many clicks on both sides decide nothing. Of fewer than FEW_USERS users, and where no user's share differs from
    another's, p is the exact sign test's over users, each by the team that won more of their pages. ValueError if fewer
    than two users have a decided page.
    """
    decided = treatment_wins + control_wins
    present = decided > 0
    share = estimate(UserTotals(treatment_wins[present].astype(float), decided[present].astype(float)))
    error = float(np.sqrt(share.variance))
    if share.users < FEW_USERS or error < 1e-9:  # equal shares differ by rounding
        p = sign_test(int((treatment_wins > control_wins).sum()), int((treatment_wins < control_wins).sum()))
    else:
        p = float(2 * stats.norm.sf(abs(share.value - 0.5) / error))
    return Preference(share.value, p, int(decided.sum()), int(present.sum()))
