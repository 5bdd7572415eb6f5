"""How long an experiment must run: users and days that find a lift, from the variance of a log."""

from __future__ import annotations

import math

from scipy import stats

from clients.ab.report.charts import percent
from clients.ab.report.experiment_pages import ExperimentPages
from clients.ab.report.metrics import PAGE_CTR
from clients.ab.report.statistics import UserTotals, estimate, users_needed


def plan(pages: ExperimentPages, control: str, lift: float, power: float, alpha: float, treatment_share: float) -> str:
    """Users and days that find a relative lift of page CTR, in words; the control's variance and the log's users per
    day.

    control: the arm's name; treatment_share: planned share of users in the treatment, between 0 and 1. ValueError if
    the control has no page or no click.
    """
    totals = pages.totals(PAGE_CTR)
    baseline = estimate(UserTotals(totals.numerator[0], totals.denominator[0]))
    users = users_needed(baseline, lift, alpha, power, treatment_share)
    per_day = sum(pages.users) / max(pages.days, 1 / 24)
    reach = stats.norm.isf(alpha / 2) + stats.norm.ppf(power)
    variance = baseline.variance * baseline.users * (1 / treatment_share + 1 / (1 - treatment_share))
    findable = reach * math.sqrt(variance / sum(pages.users)) / baseline.value
    return (
        f"page CTR of {control}: {baseline.value:.2%} over {baseline.users:,} users\n"
        f"a lift of {percent(lift)} with power {power:.0%} at alpha {alpha:g}: {users:,} users in both arms\n"
        f"at {per_day:,.0f} new users a day, as in this log: {math.ceil(users / per_day):,} days\n"
        f"the {sum(pages.users):,} users of this log find lifts from {percent(findable)}"
    )
