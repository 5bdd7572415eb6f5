"""The pages of one experiment in a query engine, and the per-user totals that every metric is computed from.

clients/ab/report/load_pages.py fills the table `pages`; everything here is a GROUP BY over it, so a log larger than
memory becomes a few numbers per user.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from clients.ab.report.metrics import RatioMetric
from ranking.database import literal
from ranking.query_engine import QueryEngine, single_row


@dataclass
class ArmTotals:
    """Per-user sums of one metric, each [control, treatment], float [users].

    covariate: the pre-period numerator less its expectation, for CUPED; None without a pre-period.
    """

    numerator: list[np.ndarray]
    denominator: list[np.ndarray]
    covariate: list[np.ndarray] | None = None


@dataclass
class LeftOut:
    """What of the log is no part of the comparison. heavy: users with more pages than are allowed.

    early_pages: of the two arms before the start that was named, where the treatment had begun.
    """

    forced_pages: int = 0
    outside_pages: int = 0
    early_pages: int = 0
    heavy_users: int = 0
    heavy_pages: int = 0


@dataclass
class ExperimentPages:
    """One experiment's pages: a query engine with the table `pages`, and what was counted while it was filled.

    `pages` has a row per page of the two arms: user_no (dense int, a user of one arm), treatment (bool), pre (bool,
    before the experiment's start), slice (int, part of the time), the columns of metrics.PAGE_COLUMNS (NULL where not
    logged), query_words, platform, head (bool: one of the frequent queries that make up half of the pages).
    days: how long the experiment ran, a few pages dated far from all others not counted; dwell_cap: seconds;
    slice_ends: ISO times; columns: the PAGE_COLUMNS that this log can tell.
    """

    engine: QueryEngine
    experiment: str
    pages: int
    users: tuple[int, int]
    users_in_both_arms: int
    heaviest_user_share: float
    first: str
    last: str
    days: float
    slice_ends: list[str]
    dwell_cap: float
    columns: frozenset[str]
    has_pre_period: bool
    left_out: LeftOut
    model_versions: dict[str, int] = field(default_factory=dict)
    interleaved: tuple[np.ndarray, np.ndarray] | None = None  # pages won per user: (treatment's, control's)

    def totals(self, metric: RatioMetric) -> ArmTotals:
        """Per-user totals of a metric over the experiment, with the covariate where there is a pre-period."""
        if not self.has_pre_period:
            return self.totals_where(metric, "NOT pre")
        sums = {"n": metric.numerator, "d": metric.denominator}
        columns = [f"{sql} FILTER (NOT pre) AS {name}" for name, sql in sums.items()]
        columns += [f"coalesce({sql} FILTER (pre), 0) AS pre_{name}" for name, sql in sums.items()]
        rows = self._fetch(
            f"SELECT treatment, {', '.join(columns)} FROM pages GROUP BY treatment, user_no "
            "HAVING count(*) FILTER (NOT pre) > 0",
            metric,
        )
        before, base = rows["pre_n"].astype(np.float64), rows["pre_d"].astype(np.float64)
        overall = before.sum() / base.sum() if base.sum() else 0.0
        residual = before - overall * base  # 0 for users never seen before: they carry no information
        found = _by_arm(rows)
        found.covariate = [residual[side] for side in (~rows["treatment"], rows["treatment"])]
        return found

    def totals_where(self, metric: RatioMetric, condition: str) -> ArmTotals:
        """Per-user totals of a metric over the pages that match an SQL condition; users without such a page are
        absent."""
        return _by_arm(
            self._fetch(
                f"SELECT treatment, {metric.numerator} AS n, {metric.denominator} AS d FROM pages "
                f"WHERE {condition} GROUP BY treatment, user_no",
                metric,
            )
        )

    def values(self, column: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """(value, dense user) of every page that has the column, [control, treatment]: float [pages], int [pages]."""
        arms = []
        for treatment in ("false", "true"):
            rows = self._fetch(
                f"SELECT {column} AS value, user_no FROM pages "
                f"WHERE NOT pre AND {column} IS NOT NULL AND treatment = {treatment}"
            )
            users = np.unique(rows["user_no"], return_inverse=True)[1] if len(rows["user_no"]) else rows["user_no"]
            arms.append((rows["value"], users))
        return arms

    def by_slice(self, metric: RatioMetric) -> list[dict[str, np.ndarray]]:
        """Per time slice the arrays treatment, user_no, n and d of that slice's users."""
        return [
            self._fetch(
                f"SELECT treatment, user_no, {metric.numerator} AS n, {metric.denominator} AS d FROM pages "
                f"WHERE NOT pre AND slice = {number} GROUP BY treatment, user_no",
                metric,
            )
            for number in range(len(self.slice_ends))
        ]

    def segments(self) -> dict[str, list[tuple[str, str]]]:
        """Segment family -> [(label, SQL condition)], for the families that the log can tell apart."""
        families = {
            "query frequency": [("head queries", "head"), ("tail queries", "NOT head")],
            "query length": [
                ("1 or 2 words", "query_words <= 2"),
                ("3 or 4 words", "query_words BETWEEN 3 AND 4"),
                ("5 words and more", "query_words >= 5"),
            ],
        }
        names = self.engine.rows(
            "SELECT platform FROM pages WHERE NOT pre AND platform != '' "
            "GROUP BY platform ORDER BY count(*) DESC, platform LIMIT 6"
        )
        if len(names) > 1:
            families["platform"] = [(name, f"platform = {literal(name)}") for (name,) in names]
        told_apart = {}
        for family, conditions in families.items():
            counted = ", ".join(f"count(*) FILTER (NOT pre AND {condition})" for _, condition in conditions)
            # all pages in one: the log holds no words of queries, as with --queries hash or drop
            if sum(pages > 0 for pages in single_row(self.engine, f"SELECT {counted} FROM pages")) > 1:
                told_apart[family] = [(label, f"NOT pre AND {condition}") for label, condition in conditions]
        return told_apart

    def _fetch(self, query: str, metric: RatioMetric | None = None) -> dict[str, np.ndarray]:
        # asked of the metric: the query may hold a caller's text, which may hold anything
        capped = metric is not None and "$dwell_cap" in metric.numerator + metric.denominator
        parameters = {"dwell_cap": self.dwell_cap} if capped else {}
        return self.engine.columns(query, **parameters)


def _by_arm(rows: dict[str, np.ndarray]) -> ArmTotals:
    numerator, denominator = (np.nan_to_num(rows[name].astype(np.float64)) for name in ("n", "d"))
    sides = (~rows["treatment"], rows["treatment"])
    return ArmTotals([numerator[side] for side in sides], [denominator[side] for side in sides])
