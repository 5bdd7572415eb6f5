"""Paired tests between two systems on the same queries: bootstrap intervals and randomisation p over queries.

Both work on per-query columns, so that one draw of queries serves a mean (NDCG, MRR) and a ratio of sums (PNR) alike,
and both are matrix products in blocks of bounded memory: no loop over resamples' queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

BLOCK_CELLS = 8_000_000  # resamples x queries held at once: 64 MB of float64


@dataclass(frozen=True)
class Interval:
    """A value and its percentile-bootstrap confidence interval."""

    value: float
    low: float
    high: float


def resampled_sums(columns: ArrayLike, resamples: int = 2000, seed: int = 0) -> NDArray[np.float64]:
    """Column sums of `resamples` bootstrap samples of the rows, float64 [resamples, m].

    columns: float [q, m], one row per query. The same seed draws the same queries whatever the columns are.
    """
    values = _columns(columns)
    rng = np.random.default_rng(seed)
    queries, sums = len(values), np.empty((resamples, values.shape[1]))
    for first, last in _blocks(resamples, queries):
        count = last - first
        drawn = rng.integers(0, queries, (count, queries)) + np.arange(count)[:, None] * queries
        times = np.bincount(drawn.ravel(), minlength=count * queries).reshape(count, queries)
        sums[first:last] = times @ values
    return sums


def p_text(p: float, sign: bool = False) -> str:
    """A p value to four digits, "< 0.0001" below; sign writes the equals sign too."""
    return "< 0.0001" if p < 0.0001 else f"{'= ' if sign else ''}{p:.4f}"


def paired_bootstrap(
    ours: ArrayLike, theirs: ArrayLike, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean per-query difference ours - theirs with its percentile interval (Efron and Tibshirani 1993, chapter 13).

    ours, theirs: float [q], the same queries in the same order. ValueError: lengths differ, no query, not finite.
    """
    difference = _difference(ours, theirs)
    means = resampled_sums(difference[:, None], resamples, seed)[:, 0] / len(difference)
    return interval(float(difference.mean()), means, confidence)


def seeds_bootstrap(
    differences: ArrayLike, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean difference with an interval for a recipe and not for the models at hand: training seeds are drawn anew too.

    differences: float [s, q], of each training seed and query. Seeds and queries are resampled independently (Owen
    2007, pigeonhole bootstrap). With few seeds it is rather too short than too long. ValueError: fewer than two seeds,
    no query.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2 or not values.shape[1] or not np.isfinite(values).all():
        raise ValueError(f"differences of shape {values.shape}: at least two seeds and a query, all finite, are needed")
    rng = np.random.default_rng(seed)
    seeds = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), resamples) / len(values)
    means = np.array(
        [weights @ values[:, rng.integers(0, values.shape[1], values.shape[1])].mean(1) for weights in seeds]
    )
    return interval(float(values.mean()), means, confidence)


def interval(value: float, resampled: NDArray[np.float64], confidence: float = 0.95) -> Interval:
    """value with the percentiles of its resampled values that leave (1 - confidence) / 2 on either side."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(value, float(low), float(high))


def randomisation_test(ours: ArrayLike, theirs: ArrayLike, *, permutations: int = 10000, seed: int = 0) -> float:
    """Two-sided p that the mean difference is zero, swapping the systems per query (Fisher; Smucker et al., CIKM 2007).

    ours, theirs: float [q], the same queries in the same order. The observed order counts as one permutation, so p > 0.
    """
    difference = _difference(ours, theirs)
    return float(randomisation_tests(difference[:, None], permutations=permutations, seed=seed)[0])


def randomisation_tests(differences: ArrayLike, *, permutations: int = 10000, seed: int = 0) -> NDArray[np.float64]:
    """randomisation_test of several metrics at once, float64 [m]. differences: float [q, m], ours - theirs."""
    values = _columns(differences)
    observed = np.abs(values.sum(0))
    values = values[(values != 0).any(1)]  # swapping equal values changes nothing
    if not len(values):
        return np.ones(len(observed))
    # a sum that equals the observed one up to rounding counts as as extreme
    extreme = np.abs(swapped_sums(values, permutations, seed)) >= observed * (1 - 1e-12) - 1e-12
    return (1 + extreme.sum(0)) / (1 + permutations)


def pnr_randomisation_test(
    ours: tuple[ArrayLike, ArrayLike],
    theirs: tuple[ArrayLike, ArrayLike],
    *,
    permutations: int = 10000,
    seed: int = 0,
) -> float:
    """Two-sided p that two systems' pooled PNR is equal, swapping their per-query pair counts.

    ours, theirs: (concordant, discordant), each int [q]. The statistic is the difference of log PNR, with half a pair
    added to each count so that a system without a discordant pair stays finite.
    """
    counts = np.stack([np.asarray(part, np.float64) for system in (ours, theirs) for part in system], axis=1)
    half_sum, half_gap = (counts[:, :2] + counts[:, 2:]).sum(0) / 2, (counts[:, :2] - counts[:, 2:]) / 2
    half_gap = half_gap[(half_gap != 0).any(1)]
    if not len(half_gap):
        return 1.0

    def log_ratio(gap: NDArray[np.float64]) -> NDArray[np.float64]:
        a, b = half_sum + gap + 0.5, half_sum - gap + 0.5
        return np.log(a[..., 0] / a[..., 1]) - np.log(b[..., 0] / b[..., 1])

    observed = abs(float(log_ratio(half_gap.sum(0)))) - 1e-12
    swapped = np.abs(log_ratio(swapped_sums(half_gap, permutations, seed)))
    return float((1 + np.count_nonzero(swapped >= observed)) / (1 + permutations))


def swapped_sums(columns: ArrayLike, permutations: int = 10000, seed: int = 0) -> NDArray[np.float64]:
    """Column sums under random signs per row, the same sign across a row's columns, float64 [permutations, m]."""
    values = _columns(columns)
    rng = np.random.default_rng(seed)
    queries, sums = len(values), np.empty((permutations, values.shape[1]))
    total = values.sum(0)
    for first, last in _blocks(permutations, queries):
        cells = (last - first) * queries
        bits = np.unpackbits(np.frombuffer(rng.bytes(cells // 8 + 1), np.uint8))[:cells].reshape(-1, queries)
        sums[first:last] = total - 2 * (bits.astype(np.float64) @ values)
    return sums


def _blocks(repeats: int, queries: int) -> list[tuple[int, int]]:
    size = max(1, BLOCK_CELLS // queries)
    return [(first, min(first + size, repeats)) for first in range(0, repeats, size)]


def _columns(columns: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(columns, np.float64)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"columns {values.shape}: one row per query and at least one query are needed")
    if not np.isfinite(values).all():
        raise ValueError("a per-query value is not finite")
    return values


def _difference(ours: ArrayLike, theirs: ArrayLike) -> NDArray[np.float64]:
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"ours {a.shape} and theirs {b.shape} must be the same queries in one dimension")
    return _columns((a - b)[:, None])[:, 0]
