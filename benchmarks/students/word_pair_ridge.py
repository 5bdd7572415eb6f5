"""Rankers that are linear in pairs of a query word and a document word: fitted in a second, for hundreds of students.

score = sum over query words a and document words b of w[a, b], plus a weight for words that both have. The weights
minimise the margin MSE to the teacher's scores (Hofstätter et al., arXiv 2010.02666) and a ridge penalty, exactly: over
all pairs of a query the margin error is the squared error of scores that are centred within the query. Such a ranker
learns which words mean the same, which is what the built-in world asks for, from nothing else than its labels.
"""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import lsmr

from benchmarks.students.runs import judged_ranking, query_numbers, text_columns
from ranking.bm25 import words
from ranking.metrics import mean

LOGGER = logging.getLogger(__name__)
BUCKETS = 1 << 20  # of hashed pairs
MATCH_SCALE = 3.0  # of the count of shared words, so that the penalty weighs little on it
PENALTIES = (3.0, 30.0, 300.0)
STEPS = 40  # of the least-squares solver


def pair_features(rows: pa.Table) -> sparse.csr_matrix:
    """[rows, BUCKETS + 1]: which pairs of a query word and a document word a row has, and how many words both have."""
    queries, titles, summaries = text_columns(rows)
    known: dict[str, int] = {}

    def numbers(text: str) -> NDArray[np.int64]:
        found = dict.fromkeys(words(text))
        return np.fromiter((known.setdefault(word, len(known)) for word in found), np.int64, len(found))

    def hashes(text: str) -> NDArray[np.int64]:
        # of the word's own letters, not of its number here: the same in every table
        return np.fromiter((hash_of(word) for word in dict.fromkeys(words(text))), np.int64)

    of_query = {query: (numbers(query), hashes(query)) for query in dict.fromkeys(queries)}
    documents = [f"{title} {summary}" for title, summary in zip(titles, summaries)]
    of_document = {document: (numbers(document), hashes(document)) for document in dict.fromkeys(documents)}
    columns, values, ends = [], [], [0]
    for query, document in zip(queries, documents):
        (asked, asked_hash), (written, written_hash) = of_query[query], of_document[document]
        pairs = (asked_hash[:, None] * 1_000_003 + written_hash[None, :]).ravel() % BUCKETS
        shared = MATCH_SCALE * np.isin(asked, written).sum()
        columns.append(np.append(pairs, BUCKETS))
        values.append(np.append(np.ones(len(pairs)), shared))
        ends.append(ends[-1] + len(pairs) + 1)
    return sparse.csr_matrix(
        (np.concatenate(values), np.concatenate(columns), np.array(ends)), shape=(len(queries), BUCKETS + 1)
    )


def hash_of(word: str) -> int:
    """A number of 31 bits from a word's letters (FNV-1a), the same in every process."""
    code = 2166136261
    for byte in word.encode("utf-8", "replace"):
        code = (code ^ byte) * 16777619 & 0xFFFFFFFF
    return code >> 1


def fit(
    features: sparse.csr_matrix,
    targets: NDArray[np.floating],
    groups: NDArray[np.integer],
    dev: tuple[sparse.csr_matrix, pa.Table],
    counts: NDArray[np.floating] | None = None,
) -> NDArray[np.float64]:
    """Weights [BUCKETS + 1] that minimise the margin MSE and the penalty with which dev NDCG@5 is best.

    features: of n rows; targets, groups: [n]; counts: how often each row counts, one for each if left out; dev: its
    features and judgments.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    centring = sparse.csr_matrix((1 / sizes[group], (group, np.arange(len(group)))), shape=(len(sizes), len(group)))
    spread = sparse.csr_matrix((np.ones(len(group)), (np.arange(len(group)), group)), shape=(len(group), len(sizes)))
    scale = np.ones(len(group)) if counts is None else np.sqrt(counts)
    weighing = sparse.diags(scale)
    # the centred matrix is dense within a query, so it is applied in two sparse products instead of being formed
    operator = sparse.linalg.LinearOperator(
        features.shape,
        matvec=lambda w: weighing @ _centred(features @ w, centring, spread),
        rmatvec=lambda r: features.T @ _centred(weighing @ r, centring, spread),
        dtype=np.float64,
    )
    wanted = weighing @ _centred(targets.astype(np.float64), centring, spread)
    best: tuple[float, NDArray[np.float64]] = (-1.0, np.zeros(features.shape[1]))
    for penalty in PENALTIES:
        weights = lsmr(operator, wanted, damp=penalty**0.5, maxiter=STEPS)[0]
        quality = mean(judged_ranking(dev[1], (dev[0] @ weights).astype(np.float32)).ndcg(5))
        if quality > best[0]:
            best = quality, weights
    return best[1]


def _centred(
    values: NDArray[np.float64], centring: sparse.csr_matrix, spread: sparse.csr_matrix
) -> NDArray[np.float64]:
    return values - spread @ (centring @ values)


def resampled_counts(rows: pa.Table, seed: int) -> NDArray[np.float64]:
    """How often each row counts when its query is drawn with replacement among all (bagging, Breiman 1996)."""
    numbers = query_numbers(rows)
    queries = int(numbers.max()) + 1
    return np.random.default_rng(seed).multinomial(queries, np.full(queries, 1 / queries))[numbers].astype(np.float64)
