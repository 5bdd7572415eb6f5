"""Examination propensities from a click log, by intervention harvesting.

The same (query, document) pair is shown at several positions as rankers and indexes change. Whatever its relevance r,
its click rate at position k is p_k r, so over the pairs shown at both k and k' the ratio of summed click rates is
p_k / p_k' (Agarwal et al., "Estimating position bias without intrusive interventions", WSDM 2019, AllPairs). Each pair
of positions gives one log ratio; weighted least squares over all of them gives log p, with p_1 = 1. Pairs are weighted
by n_k n_k' / (n_k + n_k'), which depends on impressions alone and so biases nothing. Unlike regression or EM, no
relevance is estimated, so pairs with two impressions help and their number cannot bias the estimate.

Assumes that examination depends on position alone (PBM) and that a pair's relevance does not drift with its position.
"""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np

from ranking.errors import InputError

PARTS = 25  # groups of queries for the standard errors


@dataclass(frozen=True)
class Propensities:
    """Examination probability relative to position 1. values: position -> propensity; standard_errors of their logs."""

    values: dict[int, float]
    standard_errors: dict[int, float]
    source: str

    @classmethod
    def given(cls, values: list[float]) -> Propensities:
        """Known propensities of positions 1, 2, ..., as from a randomisation experiment."""
        return cls(dict(enumerate(values, 1)), {}, "given")

    def at(self, position: int) -> float:
        """The propensity of a position; positions below the last known one are as unlikely as that one."""
        return self.values.get(position, self.values[max(p for p in self.values)])

    def report(self) -> dict:
        """What the report of prepare_clicks says of the propensities."""
        errors = {str(k): round(v, 5) for k, v in self.standard_errors.items()}
        return {
            "source": self.source,
            "propensities": {str(k): round(v, 5) for k, v in self.values.items()},
            "standard_errors_of_log": errors,
        }


def estimate_propensities(
    connection: duckdb.DuckDBPyConnection, impressions: str, events: int, sample_events: int
) -> Propensities:
    """AllPairs on a relation with query_no, doc_id, position, clicked.

    events: its row count; above sample_events whole (query, document) pairs are sampled by hash, so that memory stays
    bounded. InputError names the positions that no chain of shared pairs links to position 1.
    """
    share = min(1.0, sample_events / max(events, 1))
    sampled = f"WHERE hash(query_no, doc_id) % 1000000 < {round(share * 1_000_000)}" if share < 1 else ""
    connection.execute(f"""
        CREATE TABLE shown AS
        SELECT query_no, doc_id, position, count(*) AS n, count(*) FILTER (clicked) AS c
        FROM {impressions} {sampled} GROUP BY ALL
    """)
    positions = [p for (p,) in connection.execute("SELECT DISTINCT position FROM shown ORDER BY 1").fetchall()]
    columns = connection.execute(f"""
        WITH paired AS (
            SELECT hash(query_no) % {PARTS} AS part, a.position AS k, b.position AS other,
                   a.n * b.n / (a.n + b.n) AS w, a.c / a.n AS rate, b.c / b.n AS other_rate, a.n AS n, b.n AS other_n
            FROM shown a JOIN shown b USING (query_no, doc_id) WHERE a.position < b.position)
        SELECT part, k, other, sum(w * rate), sum(w * other_rate),
               sum(w * w * rate / n), sum(w * w * other_rate / other_n)
        FROM paired GROUP BY ALL ORDER BY ALL
    """).fetchnumpy()
    connection.execute("DROP TABLE shown")
    index = {position: number for number, position in enumerate(positions)}
    part, k, other, *sums = (np.ma.filled(column, 0) for column in columns.values())
    # per part: [clicks at k, at other, their variances] of every two positions
    totals = np.zeros((PARTS, 4, len(positions), len(positions)))
    for which, column in enumerate(sums):
        totals[part.astype(int), which, [index[int(p)] for p in k], [index[int(p)] for p in other]] = column

    whole = totals.sum(0)
    _require_linked(positions, whole)
    logs = log_propensities(whole)
    # delete-one-part jackknife: a page's clicks enter many position pairs, so the fit's own errors would be too small
    rest = np.array([log_propensities(whole - one) for one in totals])
    errors = np.sqrt((PARTS - 1) / PARTS * ((rest - rest.mean(0)) ** 2).sum(0))
    return Propensities(
        {position: float(p) for position, p in zip(positions, np.exp(logs))},
        {position: float(e) for position, e in zip(positions, errors)},
        "AllPairs intervention harvesting (Agarwal et al. 2019)",
    )


def log_propensities(sums: np.ndarray) -> np.ndarray:
    """Weighted least squares for log p_k - log p_k' = log(clicks at k / clicks at k'); log p of the first is 0.

    sums: [4, positions, positions], for k < k' the weighted click rates at k and at k' and their variances. Position
    pairs without clicks on both sides say nothing. Returns log p [positions].
    """
    k, other = np.nonzero((sums[0] > 0) & (sums[1] > 0))
    clicks, other_clicks, variance, other_variance = (part[k, other] for part in sums)
    scale = 1 / np.sqrt(variance / clicks**2 + other_variance / other_clicks**2)
    design = np.zeros((len(k), sums.shape[1]))
    design[np.arange(len(k)), k] = scale
    design[np.arange(len(k)), other] = -scale
    logs = np.linalg.lstsq(design[:, 1:], scale * (np.log(clicks) - np.log(other_clicks)), rcond=None)[0]
    return np.concatenate([[0.0], logs])


def _require_linked(positions: list[int], sums: np.ndarray) -> None:
    linked = (sums[0] > 0) & (sums[1] > 0)
    linked |= linked.T
    reached = np.zeros(len(positions), dtype=bool)
    reached[0] = True
    for _ in positions:
        reached |= linked[reached].any(0)
    if lost := [position for position, there in zip(positions, reached) if not there]:
        raise InputError(
            f"position bias cannot be estimated: no query-document pair clicked both at position {lost[0]} and nearer "
            f"the top ({len(lost)} such positions); give --propensities, or --no-debias to count clicks as they are"
        )
