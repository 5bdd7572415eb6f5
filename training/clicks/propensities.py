"""Examination propensities from a click log, by intervention harvesting.

The same (query, document) pair is shown at several positions as rankers and indexes change. Whatever its relevance r,
its click rate at position k is p_k r, so over the pairs shown at both k and k' the ratio of summed click rates is
p_k / p_k' (Agarwal et al., "Estimating position bias without intrusive interventions", WSDM 2019, AllPairs). Each pair
of positions gives one log ratio; weighted least squares over all of them gives log p, with p_1 = 1. Pairs are weighted
by n_k n_k' / (n_k + n_k'), which depends on impressions alone and so biases nothing. Unlike regression or EM, no
relevance is estimated, so pairs with two impressions help and their number cannot bias the estimate.

Assumes that examination depends on position alone (PBM) and that a pair's relevance does not drift with its position.

A log lists more than people look at. A position without a single click cannot have been looked at as far as the log
tells, so it counts as unseen: its impressions are no examinations. A position that was clicked but shares no clicked
pair with the ones above it has no ratio; it lies on the power law 1 / k^eta (Joachims, Swaminathan and Schnabel, WSDM
2017) of those that have one, or is cut.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ranking.errors import InputError
from ranking.query_engine import QueryEngine

LOGGER = logging.getLogger(__name__)
Unlinked = Literal["extrapolate", "cut"]
PARTS = 25  # groups of queries for the standard errors, by their number


@dataclass(frozen=True)
class Propensities:
    """Examination probability relative to position 1. values: position -> propensity, 0 where nobody looks.

    standard_errors: of the logs of the estimated ones; unseen: positions without a click; extrapolated, cut: clicked
    positions that the estimator could not reach.
    """

    values: dict[int, float]
    standard_errors: dict[int, float]
    source: str
    unseen: list[int] = field(default_factory=list)
    extrapolated: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)

    @classmethod
    def given(cls, values: list[float]) -> Propensities:
        """Known propensities of positions 1, 2, ..., as from a randomisation experiment."""
        return cls(dict(enumerate(values, 1)), {}, "given")

    def at(self, position: int) -> float:
        """The propensity of a position; positions below the last known one are as unlikely as that one."""
        return self.values.get(position, self.values[max(p for p in self.values)])

    def report(self) -> dict[str, Any]:
        """What the report of prepare_clicks says of the propensities."""
        errors = {str(k): round(v, 5) for k, v in self.standard_errors.items()}
        return {
            "source": self.source,
            "propensities": {str(k): round(v, 5) for k, v in self.values.items()},
            "standard_errors_of_log": errors,
            "positions_unseen": self.unseen,
            "positions_extrapolated": self.extrapolated,
            "positions_cut": self.cut,
        }


def estimate_propensities(
    engine: QueryEngine,
    impressions: str,
    events: int,
    sample_events: int,
    unlinked: Unlinked = "extrapolate",
) -> Propensities:
    """AllPairs on a relation with query_no, doc_id, position, clicked.

    events: its row count; above sample_events whole (query, document) pairs are sampled by hash, so that memory stays
    bounded. unlinked: what becomes of clicked positions that no chain of shared pairs links to the first clicked one.
    InputError if no position is linked to that one at all.
    """
    clicks = dict(engine.rows(f"SELECT position, count(*) FILTER (clicked) FROM {impressions} GROUP BY 1 ORDER BY 1"))
    # the others say nothing; where people scroll through thousands of positions, tables of all would fill the memory
    clicked = [position for position, count in clicks.items() if count] or list(clicks)[:2]
    share = min(1.0, sample_events / max(events, 1))
    # MD5 is the same in every engine; its first six digits are a number below 16 million
    pair = "md5(CAST(query_no AS VARCHAR) || ' ' || doc_id)"
    sampled = f"AND left({pair}, 6) < '{round(share * (1 << 24)):06x}'" if share < 1 else ""
    engine.table(
        "shown",
        f"""SELECT query_no, doc_id, position, count(*) AS n, count(*) FILTER (clicked) AS c
            FROM {impressions} WHERE position IN ({", ".join(map(str, clicked))}) {sampled} GROUP BY ALL""",
    )
    columns = engine.columns(f"""
        WITH paired AS (
            SELECT query_no % {PARTS} AS part, a.position AS k, b.position AS other,
                   a.n * b.n / (a.n + b.n) AS w, a.c / a.n AS rate, b.c / b.n AS other_rate, a.n AS n, b.n AS other_n
            FROM shown a JOIN shown b USING (query_no, doc_id) WHERE a.position < b.position)
        SELECT part, k, other, sum(w * rate) AS clicks, sum(w * other_rate) AS other_clicks,
               sum(w * w * rate / n) AS variance, sum(w * w * other_rate / other_n) AS other_variance
        FROM paired GROUP BY ALL ORDER BY part, k, other
    """)
    engine.drop("shown")
    index = {position: number for number, position in enumerate(clicked)}
    part, k, other, *sums = columns.values()
    # per part: [clicks at k, at other, their variances] of every two positions
    totals = np.zeros((PARTS, 4, len(clicked), len(clicked)))
    for which, column in enumerate(sums):
        totals[part.astype(int), which, [index[int(p)] for p in k], [index[int(p)] for p in other]] = column

    linked = _linked(totals.sum(0), 0)
    if linked.sum() < 2 and len(clicked) > 1:
        raise InputError(
            f"position bias cannot be estimated: no query-document pair was clicked both at position {clicked[0]} and "
            "at another one, as if every document kept its place; give --propensities, or --no-debias to count clicks "
            "as they are"
        )
    totals = totals[:, :, linked][:, :, :, linked]
    whole = totals.sum(0)
    logs = log_propensities(whole)
    # delete-one-part jackknife: a page's clicks enter many position pairs, so the fit's own errors would be too small
    rest = np.array([log_propensities(whole - one) for one in totals])
    errors = np.sqrt((PARTS - 1) / PARTS * ((rest - rest.mean(0)) ** 2).sum(0))
    reached = [position for position, there in zip(clicked, linked) if there]
    values = dict.fromkeys(clicks, 0.0) | dict(zip(reached, np.exp(logs).tolist()))
    missing = [position for position in clicks if clicks[position] and position not in reached]
    if unlinked == "extrapolate" and missing:
        values |= on_power_law(missing, {position: values[position] for position in reached})
    result = Propensities(
        values,
        dict(zip(reached, errors.tolist())),
        "AllPairs intervention harvesting (Agarwal et al. 2019)",
        [position for position in clicks if not clicks[position] and position not in reached],
        missing if unlinked == "extrapolate" else [],
        missing if unlinked == "cut" else [],
    )
    _say(result)
    return result


def on_power_law(positions: list[int], known: dict[int, float]) -> dict[int, float]:
    """Propensities of positions that have none: c / k^eta through the deepest known one, eta >= 0 fitted to all known.

    positions: from 1 on; known: position -> propensity above 0, at least two. Between two known positions the law runs
    through both.
    """
    places, logs = np.log(list(known)), np.log(list(known.values()))
    eta = max(0.0, float(-np.polyfit(places, logs, 1)[0]))
    depth = max(known)
    found = {}
    for position in positions:
        if position < depth:
            found[position] = float(np.exp(np.interp(np.log(position), places, logs)))
        else:
            found[position] = known[depth] * (depth / position) ** eta
    return found


def _say(found: Propensities) -> None:
    depth = max(found.standard_errors)
    for positions, what in (
        (found.unseen, "have no click and count as unseen"),
        (found.extrapolated, "share no clicked pair with those above and are extrapolated as 1 / position^eta"),
        (found.cut, "share no clicked pair with those above and are cut, with their clicks"),
    ):
        if positions:
            LOGGER.info(
                "position bias is estimated down to position %d; %d positions (%d to %d) %s",
                depth, len(positions), min(positions), max(positions), what,
            )  # fmt: skip


def log_propensities(sums: np.ndarray) -> np.ndarray:
    """Weighted least squares for log p_k - log p_k' = log(clicks at k / clicks at k'); log p of the first is 0.

    sums: [4, positions, positions], for k < k' the weighted click rates at k and at k' and their variances. Position
    pairs without clicks on both sides say nothing. Returns log p [positions].
    """
    if sums.shape[1] == 1:
        return np.zeros(1)
    k, other = np.nonzero((sums[0] > 0) & (sums[1] > 0))
    clicks, other_clicks, variance, other_variance = (part[k, other] for part in sums)
    scale = 1 / np.sqrt(variance / clicks**2 + other_variance / other_clicks**2)
    design = np.zeros((len(k), sums.shape[1]))
    design[np.arange(len(k)), k] = scale
    design[np.arange(len(k)), other] = -scale
    logs = np.linalg.lstsq(design[:, 1:], scale * (np.log(clicks) - np.log(other_clicks)), rcond=None)[0]
    return np.concatenate([[0.0], logs])


def _linked(sums: np.ndarray, top: int) -> np.ndarray:
    """bool [positions]: which ones a chain of position pairs with clicks on both sides links to the index `top`."""
    linked = (sums[0] > 0) & (sums[1] > 0)
    linked |= linked.T
    reached = np.zeros(len(linked), dtype=bool)
    reached[top] = True
    for _ in range(len(linked)):
        reached |= linked[reached].any(0)
    return reached
