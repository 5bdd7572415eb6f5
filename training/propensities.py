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


@dataclass(frozen=True)
class Propensities:
    """Examination probability relative to position 1. values: position -> propensity; standard_errors of their logs."""

    values: dict[int, float]
    standard_errors: dict[int, float]
    source: str

    @classmethod
    def given(cls, values: list[float]) -> Propensities:
        return cls(dict(enumerate(values, 1)), {}, "given")

    def at(self, position: int) -> float:
        """The propensity of a position; positions below the last known one are as unlikely as that one."""
        return self.values.get(position, self.values[max(p for p in self.values)])

    def report(self) -> dict:
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
    rows = connection.execute("""
        WITH paired AS (
            SELECT a.position AS k, b.position AS other, a.n * b.n / (a.n + b.n) AS w,
                   a.c / a.n AS rate, b.c / b.n AS other_rate, a.n AS n, b.n AS other_n
            FROM shown a JOIN shown b USING (query_no, doc_id) WHERE a.position < b.position)
        SELECT k, other, sum(w * rate), sum(w * other_rate), sum(w * w * rate / n), sum(w * w * other_rate / other_n)
        FROM paired GROUP BY k, other HAVING sum(rate) > 0 AND sum(other_rate) > 0 ORDER BY k, other
    """).fetchnumpy()
    connection.execute("DROP TABLE shown")
    k, other, clicks, other_clicks, variance, other_variance = (
        np.ma.filled(column, 0).astype(np.float64) for column in rows.values()
    )
    _require_linked(positions, list(zip(k.astype(int), other.astype(int))))
    log_ratio = np.log(clicks) - np.log(other_clicks)
    precision = 1 / (variance / clicks**2 + other_variance / other_clicks**2)
    values, errors = least_squares_logs(positions, k, other, log_ratio, precision)
    return Propensities(values, errors, "AllPairs intervention harvesting (Agarwal et al. 2019)")


def least_squares_logs(
    positions: list[int], k: np.ndarray, other: np.ndarray, log_ratio: np.ndarray, precision: np.ndarray
) -> tuple[dict[int, float], dict[int, float]]:
    """Weighted least squares for log p_k - log p_other = log_ratio with log p of the first position fixed at 0.

    k, other, log_ratio, precision: [position pairs]. Returns p and the standard error of log p by position.
    """
    index = {position: i for i, position in enumerate(positions)}
    design = np.zeros((len(k), len(positions)))
    design[np.arange(len(k)), [index[int(p)] for p in k]] = 1
    design[np.arange(len(k)), [index[int(p)] for p in other]] -= 1
    design = design[:, 1:]  # the first position is the unit
    normal = design.T @ (precision[:, None] * design)
    logs = np.linalg.solve(normal, design.T @ (precision * log_ratio)) if len(positions) > 1 else np.empty(0)
    errors = np.sqrt(np.diag(np.linalg.inv(normal))) if len(positions) > 1 else np.empty(0)
    values = np.exp(np.concatenate([[0.0], logs]))
    return (
        {position: float(p) for position, p in zip(positions, values)},
        {position: float(e) for position, e in zip(positions, np.concatenate([[0.0], errors]))},
    )


def _require_linked(positions: list[int], links: list[tuple[int, int]]) -> None:
    reached, frontier = {positions[0]}, [positions[0]]
    while frontier:
        here = frontier.pop()
        near = {b for a, b in links if a == here} | {a for a, b in links if b == here}
        frontier += near - reached
        reached |= near
    if lost := sorted(set(positions) - reached):
        raise InputError(
            f"position bias cannot be estimated: no query-document pair clicked both at position {lost[0]} and nearer the "
            f"top ({len(lost)} such positions); give --propensities, or --no-debias to count clicks as they are"
        )
