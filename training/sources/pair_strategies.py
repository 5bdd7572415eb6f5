"""Which queries and documents of a pool are worth a label: the strategies of sample_candidates, as functions of scores.

A strategy gives every document of a query a usefulness of 0 or more, or spreads what it draws by vectors. Draws by
usefulness are random: the most useful pairs alone are near-duplicates of each other and outliers, which a batch that
is drawn in proportion to usefulness is not (stochastic batch acquisition, Kirsch et al., arXiv 2106.12059).
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from ranking.bm25 import words

LEXICAL_WIDTH = 512
LEAST_USEFULNESS = 1e-6  # of a pair that no ranker finds useful: it is drawn when nothing else is left
LEAST_DEVIATION = 0.1  # of rankers that agree to the last digit: they may still all be wrong
BLOCK_QUERIES = 8192  # of a k-centre search: its cost is quadratic, its memory one block


def read_bands(bands: Sequence[str]) -> list[tuple[float, int]]:
    """[(last rank, documents)] of "10:8", "50:8", "rest:4". ValueError names a band out of order or not a number."""
    found: list[tuple[float, int]] = []
    for band in bands:
        last, _, count = band.partition(":")
        try:
            rank = float("inf") if last == "rest" else int(last)
            found.append((rank, int(count)))
        except ValueError as problem:
            raise ValueError(f"bands: {band!r} is not LAST_RANK:DOCUMENTS or rest:DOCUMENTS") from problem
        if found[-1][1] < 0 or rank < 1 or (len(found) > 1 and rank <= found[-2][0]):
            raise ValueError(f"bands: {band!r} must have a higher rank than the band before and a count of 0 or more")
    if not sum(count for _, count in found):
        raise ValueError("bands: no document would be drawn")
    return found


def draw_from_bands(
    scores: NDArray[np.floating], bands: list[tuple[float, int]], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Rows drawn by rank band, best first. What a band cannot give is drawn from the ranks not drawn so far.

    scores: float [n], higher ranks first, ties in row order. Returns row numbers, at most the sum of all counts.
    """
    ranked = np.argsort(-scores, kind="stable")
    first, drawn = 0, np.zeros(len(ranked), dtype=bool)
    for last_rank, count in bands:
        last = int(min(last_rank, len(ranked)))
        drawn[first + rng.permutation(max(0, last - first))[:count]] = True
        first = max(first, last)
    missing = sum(count for _, count in bands) - int(drawn.sum())
    left = np.flatnonzero(~drawn)
    drawn[rng.permutation(left)[:missing]] = True
    return ranked[drawn]


def rank_disagreement(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """How far apart rankers place the documents of one query, in what a place is worth to NDCG: float64 [n] in 0..1.

    scores: [n, rankers], on any scales. The discount of a rank is 1 / log2(1 + rank), ties share their mean rank; the
    disagreement on a document is its highest discount less its lowest.
    """
    ranks = np.stack([rankdata(-column) for column in scores.T], axis=1)
    return np.ptp(1 / np.log2(1 + ranks), axis=1)


def misplacement(scores: NDArray[np.floating], top: int) -> NDArray[np.float64]:
    """The chance that a document of one query is on the wrong side of the cut below the first `top`: float64 [n].

    scores: [n, rankers], each brought to mean 0 and spread 1 over the query's documents. A document's score is taken
    as normal around its mean over rankers, with their deviation (1 where there is one ranker); the cut lies halfway
    between ranks top and top + 1, or at the middle of a shorter list.
    """
    spread = scores.std(axis=0)
    scaled = (scores - scores.mean(axis=0)) / np.where(spread > 0, spread, 1)
    mean = scaled.mean(axis=1)
    deviation = np.maximum(scaled.std(axis=1), LEAST_DEVIATION) if scores.shape[1] > 1 else np.ones(len(mean))
    ranked = -np.sort(-mean)
    first_below = top if top < len(ranked) else len(ranked) // 2
    cut = ranked[max(first_below - 1, 0) : first_below + 1].mean()
    return norm.cdf(-np.abs(mean - cut) / deviation)


def draw_by_usefulness(
    usefulness: NDArray[np.float64], count: int, power: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Rows drawn without replacement in proportion to usefulness to a power, in rising order; all if count is more.

    usefulness: [n], 0 or more; power: 0 draws all alike (Efraimidis and Spirakis 2006).
    """
    weight = np.maximum(usefulness, LEAST_USEFULNESS) ** power
    return np.sort(np.argsort(rng.exponential(size=len(weight)) / weight, kind="stable")[:count])


def k_centres(
    vectors: NDArray[np.float32], count: int, first: int = 0, covered: NDArray[np.float32] | None = None
) -> NDArray[np.int64]:
    """Rows chosen one by one, each the farthest from those before: the greedy k-centre core-set, int64 [count] at most.

    vectors: [n, width] of length 1; first: the row to begin with, unless there are vectors `covered` [m, width] that
    count as chosen before (Sener and Savarese, arXiv 1708.00489). Rows that repeat a chosen one come last.
    """
    nearest = np.full(len(vectors), -np.inf, np.float32)
    for start in range(0, 0 if covered is None else len(covered), BLOCK_QUERIES):
        nearest = np.maximum(nearest, (vectors @ covered[start : start + BLOCK_QUERIES].T).max(axis=1))  # type: ignore[index]
    chosen: list[int] = []
    for _ in range(min(count, len(vectors))):
        row = first if not chosen and not np.isfinite(nearest).any() else int(np.argmin(nearest))
        chosen.append(row)
        nearest = np.maximum(nearest, vectors @ vectors[row])
        nearest[row] = np.inf
    return np.array(chosen, np.int64)


def spread_out(
    vectors: NDArray[np.float32], count: int, rng: np.random.Generator, covered: NDArray[np.float32] | None = None
) -> NDArray[np.int64]:
    """k_centres of more rows than fit one search: random blocks give their share each, rising row numbers.

    Cost: n x (count of a block + covered) products; memory: the similarities of one block.
    """
    order = rng.permutation(len(vectors))
    blocks = np.array_split(order, max(1, -(-len(order) // BLOCK_QUERIES)))
    ends = np.round(np.cumsum([len(block) for block in blocks]) / max(len(order), 1) * count).astype(int)
    shares = np.diff(ends, prepend=0)
    chosen = [block[k_centres(vectors[block], share, 0, covered)] for block, share in zip(blocks, shares)]
    return np.sort(np.concatenate(chosen))


def lexical_vectors(texts: Sequence[str]) -> NDArray[np.float32]:
    """Hashed word counts (square roots, random signs), of length 1: float32 [texts, LEXICAL_WIDTH]; blank ones are 0.

    Feature hashing: Weinberger et al., arXiv 0902.2206. The words are BM25's.
    """
    vectors = np.zeros((len(texts), LEXICAL_WIDTH), np.float32)
    for row, text in enumerate(texts):
        counts: dict[str, int] = {}
        for word in words(text):
            counts[word] = counts.get(word, 0) + 1
        for word, count in counts.items():
            code = crc32(word.encode("utf-8", "replace"))
            vectors[row, code % LEXICAL_WIDTH] += count**0.5 * (1 if code & 0x80000000 else -1)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)
