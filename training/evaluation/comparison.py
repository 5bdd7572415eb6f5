"""Ranking systems compared on the same judged documents: metrics with intervals, paired tests, retention, agreement.

    report = compare({"bm25": scores, "student": other}, judgments)    # scores: float [n], in the table's row order

The first system is the one that the others are tested against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from ranking.calibration import ece, probability
from ranking.errors import InputError
from ranking.metrics import Gain, JudgedRanking, PairCounts, kendall_tau, pair_ratio
from ranking.significance import interval, pnr_randomisation_test, randomisation_tests, resampled_sums

CUTOFFS = (1, 5, 10)
PNR = "pnr"


@dataclass(frozen=True)
class Judgments:
    """A judgments table as arrays: int [n] grades, int [n] query numbers, and the id and text of query number i."""

    table: pa.Table
    grades: NDArray[np.int64]
    groups: NDArray[np.int64]
    query_ids: list[str]

    @classmethod
    def of_table(cls, table: pa.Table) -> Judgments:
        """The arrays of a judgments table. InputError if it has no row."""
        if not len(table):
            raise InputError("there is no judged document to evaluate on")
        ids = table.column("query_id").combine_chunks().dictionary_encode()
        groups = ids.indices.to_numpy().astype(np.int64)
        return cls(table, table.column("grade").to_numpy().astype(np.int64), groups, ids.dictionary.to_pylist())

    def texts(self) -> tuple[list[str], list[str], list[str]]:
        """(queries, titles, summaries), one per row of the table."""
        queries, titles, summaries = (self.table.column(name).to_pylist() for name in ("query", "title", "summary"))
        return queries, titles, summaries

    def ranking(self, scores: ArrayLike) -> JudgedRanking:
        """The judged documents ranked by scores, float [n]."""
        return JudgedRanking(scores, self.grades, self.groups, n_queries=len(self.query_ids))


@dataclass
class SystemResult:
    """One system: metric name -> value, its interval, difference from the first system and p; and per-query columns."""

    values: dict[str, float]
    per_query: dict[str, NDArray[np.float64]]
    pairs: PairCounts
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    against_first: dict[str, dict[str, float]] = field(default_factory=dict)
    retention: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None
    calibration: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """What evaluation.json holds for the system: finite numbers, and null where a value is undefined."""
        content: dict[str, Any] = {
            "metrics": self.values,
            "interval_95": self.intervals,
            "against_first": self.against_first,
            "retention": self.retention,
            "kendall_tau": self.agreement,
            "ece": self.calibration,
        }
        return _finite(content)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def measure(judged: JudgedRanking) -> SystemResult:
    """All metrics of one system: NDCG@1/5/10 with both gains ("ndcg@5", "ndcg_exp@5"), MRR, PNR, share of ties."""
    gains: dict[str, Gain] = {"ndcg": "linear", "ndcg_exp": "exponential"}
    per_query = {f"{name}@{k}": judged.ndcg(k, gain) for name, gain in gains.items() for k in CUTOFFS}
    per_query["mrr"] = judged.mrr()
    pairs = judged.pairs()
    values = {name: float(column.mean()) for name, column in per_query.items()}
    return SystemResult(values | {PNR: pairs.pnr, "ties": pairs.tie_share}, per_query, pairs)


def compare(
    systems: Mapping[str, ArrayLike],
    judgments: Judgments,
    *,
    teacher: str | None = None,
    calibrations: Mapping[str, dict[str, Any] | None] | None = None,
    relevant_from: int = 1,
    resamples: int = 2000,
    permutations: int = 10000,
    seed: int = 0,
) -> dict[str, SystemResult]:
    """Measure systems on the same documents and test each against the first.

    systems: name -> float [n] scores in the table's row order; teacher: the system that retention and agreement refer
    to; calibrations: name -> the card's calibration (None: the plain logistic function) for systems whose scores are
    logits; relevant_from: the grade from which a document counts as relevant in calibration.
    """
    results = {name: measure(judgments.ranking(scores)) for name, scores in systems.items()}
    _add_intervals(results, resamples, seed)
    names = list(results)
    for name in names[1:]:
        _add_tests(results[name], results[names[0]], permutations, seed)
    if teacher is not None:
        for name in names:
            best = results[teacher].values
            results[name].retention = {
                # a perfect teacher has no finite PNR to keep a share of
                metric: value / best[metric] if 0 < best[metric] < np.inf else float("nan")
                for metric, value in results[name].values.items()
                if metric != "ties"
            }
            taus = kendall_tau(np.asarray(systems[name]), np.asarray(systems[teacher]), judgments.groups)
            results[name].agreement = float(np.nanmean(taus)) if np.isfinite(taus).any() else None
    relevant = judgments.grades >= relevant_from
    for name, calibration in (calibrations or {}).items():
        results[name].calibration = {"before": ece(probability(systems[name], None), relevant)}
        if calibration is not None:
            results[name].calibration["after"] = ece(probability(systems[name], calibration), relevant)
    return results


def _add_intervals(results: dict[str, SystemResult], resamples: int, seed: int) -> None:
    """One draw of queries serves all systems and metrics, so differences are paired."""
    metrics = list(next(iter(results.values())).per_query)
    columns = [c for r in results.values() for c in (*r.per_query.values(), r.pairs.concordant, r.pairs.discordant)]
    sums = resampled_sums(np.stack(columns, axis=1), resamples, seed)
    queries, width = len(columns[0]), len(metrics) + 2
    drawn: dict[str, dict[str, NDArray[np.float64]]] = {}
    for i, name in enumerate(results):
        own = sums[:, i * width : (i + 1) * width]
        drawn[name] = {metric: own[:, j] / queries for j, metric in enumerate(metrics)}
        # a resample without a discordant pair would be infinite; half a pair keeps percentiles defined
        drawn[name][PNR] = own[:, -2] / np.maximum(own[:, -1], 0.5)
    first = next(iter(results))
    for name, result in results.items():
        for metric, values in drawn[name].items():
            found = interval(result.values[metric], values)
            result.intervals[metric] = (found.low, found.high)
            if name != first:
                value = result.values[metric] - results[first].values[metric]
                found = interval(value, values - drawn[first][metric])
                result.against_first[metric] = {"difference": value, "low": found.low, "high": found.high}


def _add_tests(ours: SystemResult, theirs: SystemResult, permutations: int, seed: int) -> None:
    differences = np.stack([ours.per_query[m] - theirs.per_query[m] for m in ours.per_query], axis=1)
    for metric, p in zip(ours.per_query, randomisation_tests(differences, permutations=permutations, seed=seed)):
        ours.against_first[metric]["p"] = float(p)
    counts = [(r.pairs.concordant, r.pairs.discordant) for r in (ours, theirs)]
    ours.against_first[PNR]["p"] = pnr_randomisation_test(counts[0], counts[1], permutations=permutations, seed=seed)


def per_query_table(results: Mapping[str, SystemResult], judgments: Judgments) -> pa.Table:
    """Long table, one row per system and query: metrics, pair counts, documents."""
    sizes = np.bincount(judgments.groups, minlength=len(judgments.query_ids))
    pieces = []
    for name, result in results.items():
        columns: dict[str, Any] = {
            "system": pa.array([name] * len(sizes), pa.string()),
            "query_id": pa.array(judgments.query_ids, pa.string()),
            "documents": sizes,
            **result.per_query,
            "concordant": result.pairs.concordant,
            "discordant": result.pairs.discordant,
            "tied": result.pairs.tied,
        }
        ratios = [pair_ratio(float(c), float(d)) for c, d in zip(result.pairs.concordant, result.pairs.discordant)]
        pieces.append(pa.table(columns | {PNR: ratios}))
    return pa.concat_tables(pieces)
