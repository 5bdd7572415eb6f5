"""Ranking metrics over flat arrays: PNR, NDCG@k with either gain, MRR, without a Python loop over queries.

    judged = JudgedRanking(scores, grades, groups)   # float [n], int [n], int [n]
    judged.ndcg(5).mean(), judged.ndcg(5, gain="exponential").mean(), judged.mrr().mean(), judged.pairs().pnr

Ties in score break by document order (the order of the rows), stably. A query without a relevant document scores 0 in
NDCG and MRR, as in trec_eval, and stays in the mean: leaving such queries out would flatter every system.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Gain = Literal["linear", "exponential"]
SHORT_LIST = 1000  # documents of a query whose pairs are formed: a table of 10,000 documents' pairs takes a gigabyte


@dataclass(frozen=True)
class PairCounts:
    """Document pairs with different grades, per query, int64 [q]: ordered right, ordered wrong, with equal scores."""

    concordant: NDArray[np.int64]
    discordant: NDArray[np.int64]
    tied: NDArray[np.int64]

    @property
    def pnr(self) -> float:
        """Positive-negative ratio over all pairs: concordant / discordant. inf if none is wrong, nan without pairs."""
        return pair_ratio(float(self.concordant.sum()), float(self.discordant.sum()))

    @property
    def tie_share(self) -> float:
        """Share of the pairs whose two scores are equal; nan if there is no pair."""
        pairs = self.concordant.sum() + self.discordant.sum() + self.tied.sum()
        return float(self.tied.sum() / pairs) if pairs else float("nan")


def pair_ratio(concordant: float, discordant: float) -> float:
    """concordant / discordant; inf where only concordant pairs exist, nan where there are none of either."""
    if discordant:
        return concordant / discordant
    return float("inf") if concordant else float("nan")


class JudgedRanking:
    """The judged documents of many queries, ranked by a system's scores. All metrics return one value per query.

    scores: float [n], finite; higher ranks first. grades: int [n], not negative. groups: int [n], the query of each
    row, rows of a query need not be adjacent. n_queries: with it, groups must be 0..n_queries-1 and a query without any
    row counts (as 0, with no pairs); without it, the queries are the distinct groups in ascending order.
    ValueError: lengths differ, a score is not finite, a grade is negative, a group is out of range.
    """

    def __init__(self, scores: ArrayLike, grades: ArrayLike, groups: ArrayLike, n_queries: int | None = None):
        scores, grades, groups = np.asarray(scores), np.asarray(grades), np.asarray(groups)
        if not (scores.ndim == 1 and scores.shape == grades.shape == groups.shape):
            raise ValueError(
                f"scores {scores.shape}, grades {grades.shape} and groups {groups.shape} must be 1-d of one length"
            )
        if bad := _first(~np.isfinite(scores)):
            raise ValueError(f"score of row {bad} is not finite")
        if bad := _first(grades < 0):
            raise ValueError(f"grade of row {bad} is negative")
        if n_queries is None:
            self.queries, codes = np.unique(groups, return_inverse=True)
        else:
            if bad := _first((groups < 0) | (groups >= n_queries)):
                raise ValueError(f"group of row {bad} is outside 0 to {n_queries - 1}")
            self.queries, codes = np.arange(n_queries), groups.astype(np.int64)
        self.sizes = np.bincount(codes, minlength=len(self.queries))
        self._starts = np.cumsum(self.sizes) - self.sizes
        # lexsort is stable, so equal scores keep document order; `-scores` of an unsigned or integer array would wrap
        self.order = np.lexsort((-scores.astype(np.float64), codes))
        self._codes = codes[self.order]
        self._scores = scores[self.order]
        self._grades = grades[self.order].astype(np.int64)
        self.places = np.arange(len(scores)) - self._starts[self._codes]  # of row order[i], 0-based, within its query

    def __len__(self) -> int:
        return len(self.queries)

    @cached_property
    def has_relevant(self) -> NDArray[np.bool_]:
        """bool [q]: whether any document of the query has a grade above 0."""
        return self._per_query((self._grades > 0).astype(np.float64)) > 0

    def ndcg(self, k: int | None = None, gain: Gain = "linear") -> NDArray[np.float64]:
        """NDCG@k per query, float64 [q] (Järvelin and Kekäläinen, TOIS 2002; k=None takes the whole list).

        gain "linear" is the grade itself (trec_eval, ir-measures), "exponential" is 2^grade - 1 (Burges et al., ICML
        2005); the discount is 1 / log2(place + 1). The ideal order is that of the judged documents given.
        """
        if gain not in ("linear", "exponential"):
            raise ValueError(f"gain {gain!r}: linear or exponential")
        dcg = self._dcg(self._grades, k, gain)
        ideal = self._dcg(self._grades[self._ideal_order], k, gain)
        return np.divide(dcg, ideal, out=np.zeros(len(self)), where=ideal > 0)

    def mrr(self, k: int | None = None, relevant_from: int = 1) -> NDArray[np.float64]:
        """Reciprocal rank per query, float64 [q]: 1 / place of the first grade of relevant_from or more, else 0."""
        hit = self._grades >= relevant_from
        if k is not None:
            hit &= self.places < k
        reciprocal = np.zeros(len(self))
        np.maximum.at(reciprocal, self._codes[hit], 1.0 / (self.places[hit] + 1))
        return reciprocal

    def pairs(self) -> PairCounts:
        """Pair counts per query, in O(n * distinct grades): each row meets the lower grades around it."""
        concordant, discordant, tied = (np.zeros(len(self), np.int64) for _ in range(3))
        if not len(self._grades):
            return PairCounts(concordant, discordant, tied)
        # runs of rows with equal query and score; rows are in descending score order within a query
        fresh = np.ones(len(self._codes), bool)
        fresh[1:] = (self._codes[1:] != self._codes[:-1]) | (self._scores[1:] != self._scores[:-1])
        run_start = np.maximum.accumulate(np.where(fresh, np.arange(len(fresh)), 0))
        run_end = np.append(np.flatnonzero(fresh)[1:], len(fresh))[np.cumsum(fresh) - 1]
        first, end = self._starts[self._codes], (self._starts + self.sizes)[self._codes]
        for grade in np.unique(self._grades)[1:]:
            lower_before = np.concatenate([[0], np.cumsum(self._grades < grade)])
            at = np.flatnonzero(self._grades == grade)
            start, stop, query = run_start[at], run_end[at], self._codes[at]
            _add(concordant, query, lower_before[end[at]] - lower_before[stop])
            _add(discordant, query, lower_before[start] - lower_before[first[at]])
            _add(tied, query, lower_before[stop] - lower_before[start])
        return PairCounts(concordant, discordant, tied)

    def _per_query(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(self._codes, weights=values, minlength=len(self)).astype(np.float64)

    @cached_property
    def _ideal_order(self) -> NDArray[np.int64]:
        return np.lexsort((-self._grades, self._codes))

    def _dcg(self, grades: NDArray[np.int64], k: int | None, gain: Gain) -> NDArray[np.float64]:
        gains = np.exp2(grades) - 1.0 if gain == "exponential" else grades.astype(np.float64)
        terms = gains / np.log2(self.places + 2.0)
        return self._per_query(terms if k is None else np.where(self.places < k, terms, 0.0))


def ndcg(scores: ArrayLike, grades: ArrayLike, groups: ArrayLike, k: int | None = None, gain: Gain = "linear") -> float:
    """Mean NDCG@k over queries; see JudgedRanking.ndcg. nan if there is no query."""
    return mean(JudgedRanking(scores, grades, groups).ndcg(k, gain))


def mrr(scores: ArrayLike, grades: ArrayLike, groups: ArrayLike, k: int | None = None) -> float:
    """Mean reciprocal rank of the first document with a grade above 0 (JudgedRanking.mrr). nan without a query."""
    return mean(JudgedRanking(scores, grades, groups).mrr(k))


def pnr(scores: ArrayLike, grades: ArrayLike, groups: ArrayLike) -> float:
    """Concordant / discordant pairs, pooled over queries; score ties are neither (JudgedRanking.pairs counts them)."""
    return JudgedRanking(scores, grades, groups).pairs().pnr


def kendall_tau(scores: ArrayLike, reference: ArrayLike, groups: ArrayLike) -> NDArray[np.float64]:
    """Kendall's tau-b per query between two systems' scores, float64 [q]; nan where either has no untied pair.

    scores, reference: float [n]; groups: int [n]. The reference's order is turned into dense ranks, which serve as
    grades; lists of up to SHORT_LIST documents are compared together by [m, m] tables, a longer one takes O(m log m).
    """
    scores, reference, groups = (np.asarray(a) for a in (scores, reference, groups))
    if not scores.shape == reference.shape == groups.shape:
        raise ValueError(f"scores {scores.shape}, reference {reference.shape} and groups {groups.shape} must be equal")
    queries, codes = np.unique(groups, return_inverse=True)
    sizes = np.bincount(codes, minlength=len(queries))
    by_query = np.argsort(codes, kind="stable")
    starts = np.cumsum(sizes) - sizes
    tau = np.full(len(queries), np.nan)
    for size in np.unique(sizes):  # queries of one list length are compared together, in blocks of bounded memory
        members = np.flatnonzero(sizes == size)
        if size > SHORT_LIST:
            from scipy.stats import kendalltau  # takes a second to import, and few lists are so long

            for query in members:
                rows = by_query[starts[query] : starts[query] + size]
                tau[query] = kendalltau(scores[rows], reference[rows]).statistic
            continue
        for block in np.array_split(members, max(1, len(members) * size * size // 4_000_000)):
            rows = by_query[starts[block, None] + np.arange(size)]
            a, b = (np.sign(s[rows][:, :, None] - s[rows][:, None, :]) for s in (scores, reference))
            untied = np.sqrt((a != 0).sum((1, 2), dtype=float) * (b != 0).sum((1, 2), dtype=float))
            np.divide((a * b).sum((1, 2), dtype=float), untied, out=untied, where=untied > 0)
            tau[block] = np.where((a != 0).any((1, 2)) & (b != 0).any((1, 2)), untied, np.nan)
    return tau


def mean(values: NDArray[np.float64]) -> float:
    """Mean of per-query values; nan, without NumPy's warning, if there is no query."""
    return float(values.mean()) if len(values) else float("nan")


def _add(total: NDArray[np.int64], index: NDArray[np.int64], values: NDArray[np.int64]) -> None:
    # bincount's weights are float64: exact for counts below 2^53
    total += np.bincount(index, weights=values, minlength=len(total)).astype(np.int64)


def _first(bad: NDArray[np.bool_]) -> int:
    """1-based number of the first bad row, 0 if there is none."""
    return int(np.argmax(bad)) + 1 if bad.any() else 0
