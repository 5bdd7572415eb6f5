"""Judgments and labelled candidates as the groups that students and baselines train on, and how groups are sampled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from ranking.errors import InputError
from ranking.labels import DISAGREEMENT, iter_labelled
from ranking.schema import read_judgments
from ranking.text import EncodedPair, StudentFormat
from training.sources.held_out import outside_held_out
from training.trainer.group_batches import GroupSampler, RankingGroups, group_rows, sample_up_to
from training.trainer.token_store import TokenStore

LOGGER = logging.getLogger(__name__)

Sampling = Literal["stratified", "uniform", "top"]


def judged_groups(path: str | Path, text_format: StudentFormat) -> RankingGroups:
    """The groups of a judgments file; targets are the grades."""
    return groups_of([read_judgments(path)], "grade", text_format)


def labelled_groups(
    candidates: str | Path, labels: str | Path, text_format: StudentFormat, data: Path | None = None
) -> RankingGroups:
    """The groups of the labelled candidates; targets are the teacher's raw scores.

    Rejected candidates are left out, and those of queries near-identical to a dev or test query of the dataset `data`.
    """
    return groups_of(_labelled_rows(candidates, labels, data), "teacher_score", text_format)


def _labelled_rows(candidates: str | Path, labels: str | Path, data: Path | None) -> Iterator[pa.Table]:
    rows = iter_labelled(candidates, labels)
    return rows if data is None else outside_held_out(rows, data)


def confidence_weights(candidates: str | Path, labels: str | Path, data: Path | None = None) -> np.ndarray:
    """Weights of labels by their disagreement d: 1 / (1 + (d / mean d)^2), float32 [documents] with mean 1.

    They stand in the order of labelled_groups. A label on which its teachers are as far apart as on the average one
    counts half of one on which they agree. InputError if the labels do not say how far their teachers disagree.
    """
    query_ids: list[str] = []
    apart: list[np.ndarray] = []
    for rows in _labelled_rows(candidates, labels, data):
        if DISAGREEMENT not in rows.column_names:
            raise InputError(f"{labels}: no column {DISAGREEMENT}; labels of several teachers have one (blend_labels)")
        query_ids.extend(rows.column("query_id").to_pylist())
        apart.append(rows.column(DISAGREEMENT).to_numpy())
    distance = np.concatenate(apart)[group_rows(query_ids)[1]].astype(np.float64)
    if not np.isfinite(distance).all() or (distance < 0).any():
        raise InputError(f"{labels}: column {DISAGREEMENT} has a value that is negative or not finite")
    weights = 1 / (1 + np.square(distance / max(distance.mean(), 1e-9)))
    return (weights / weights.mean()).astype(np.float32)


def weighted(groups: RankingGroups, weights: np.ndarray) -> RankingGroups:
    """The groups with targets [documents, 3]: the target, the set it came from (see joined), and its weight.

    weights: of the first documents, as many as there are labels; judged documents behind them count 1.
    """
    columns = groups.targets.reshape(len(groups.targets), -1)
    source = columns[:, 1] if columns.shape[1] > 1 else np.zeros(len(columns), np.float32)
    judged = np.ones(len(columns) - len(weights), np.float32)
    targets = np.stack([columns[:, 0], source, np.concatenate([weights, judged])], axis=1).astype(np.float32)
    return replace(groups, targets=targets)


def groups_of(pieces: Iterable[pa.Table], target: str, text_format: StudentFormat) -> RankingGroups:
    """Tokenise tables with query_id, query, title, summary and a target column, piece by piece.

    A document in chunks has all of them. Memory: the token ids (4 bytes each) of all rows, the texts of one piece.
    InputError if there is no row.
    """
    query_ids: list[str] = []
    targets: list[np.ndarray] = []
    chunks: list[np.ndarray] = []  # how many each document has

    def pairs() -> Iterator[EncodedPair]:
        for rows in pieces:
            query_ids.extend(rows.column("query_id").to_pylist())
            targets.append(rows.column(target).to_numpy().astype(np.float32))
            fields = (rows.column(name).to_pylist() for name in ("query", "title", "summary"))
            documents = text_format.encode_documents(*fields)
            chunks.append(np.diff(documents.starts))
            yield from documents.pairs

    store = TokenStore.of_pairs(pairs())
    if not len(store):
        raise InputError("there is no judged or labelled document to train on")
    starts = None
    if text_format.chunking.most > 1:
        starts = np.concatenate([[0], np.cumsum(np.concatenate(chunks))]).astype(np.int64)
    return RankingGroups.of_rows(query_ids, np.concatenate(targets), store, starts, text_format.chunking.pooling)


def first_queries(groups: RankingGroups, share: float, seed: int) -> RankingGroups:
    """A random share of the queries with all their documents, the same for the same seed."""
    count = max(1, round(share * len(groups)))
    return select_queries(groups, np.sort(np.random.default_rng(seed).permutation(len(groups))[:count]))


def with_different_targets(groups: RankingGroups) -> RankingGroups:
    """The queries whose documents do not all have one target: the others are no pair. InputError if none is left."""
    starts = groups.group_starts[:-1]
    differ = np.maximum.reduceat(groups.targets, starts) > np.minimum.reduceat(groups.targets, starts)
    if not differ.any():
        raise InputError("no query has two documents with different targets: there is nothing to learn an order from")
    return groups if differ.all() else select_queries(groups, np.flatnonzero(differ))


def select_queries(groups: RankingGroups, chosen: Iterable[int]) -> RankingGroups:
    """The groups of the chosen queries (indices), in that order."""
    chosen = [int(query) for query in chosen]
    rows = np.concatenate([np.arange(groups.group_starts[q], groups.group_starts[q + 1]) for q in chosen])
    sizes = [groups.group_starts[q + 1] - groups.group_starts[q] for q in chosen]
    group_starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return groups.take(rows, group_starts, [groups.query_ids[q] for q in chosen])


def joined(first: RankingGroups, second: RankingGroups) -> RankingGroups:
    """Both sets' groups in one, with targets [documents, 2]: the target, and 0 or 1 for the set it came from.

    A query id that stands in both stays two groups: a teacher's score and a grade are no pair.
    """
    store = TokenStore.build(
        (s[row] for s in (first.store, second.store) for row in range(len(s))),
        np.concatenate([_document_starts(first), _document_starts(second)]),
    )
    source = np.repeat([0.0, 1.0], [len(first.targets), len(second.targets)])
    targets = np.stack([np.concatenate([first.targets, second.targets]), source], axis=1).astype(np.float32)
    group_starts = np.concatenate([first.group_starts, first.group_starts[-1] + second.group_starts[1:]])
    chunk_starts = None
    if first.chunk_starts is not None and second.chunk_starts is not None:  # of one text format: both or neither
        chunk_starts = np.concatenate([first.chunk_starts, first.chunk_starts[-1] + second.chunk_starts[1:]])
    query_ids = first.query_ids + second.query_ids
    return RankingGroups(store, targets, group_starts, query_ids, chunk_starts, first.pooling)


def _document_starts(groups: RankingGroups) -> np.ndarray:
    assert groups.store.document_starts is not None, "a student's texts are pairs of a query and a document"
    return groups.store.document_starts


def sampler(kind: Sampling, documents: int) -> GroupSampler | None:
    """How a query's documents are drawn each epoch, at most `documents` of them; 0 takes all.

    stratified: one of each of `documents` equal score ranges between the query's lowest and highest score, then more at
    random: a group shows the whole range, although most candidates of a query score alike. uniform: at random.
    top: the highest scores, always the same.
    """
    if documents == 0:
        return None
    draw: Callable = {"stratified": _stratified, "uniform": _uniform, "top": _top}[kind]

    def sample(targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if len(targets) <= documents:
            return np.arange(len(targets))
        return draw(targets if targets.ndim == 1 else targets[:, 0], documents, rng)

    return sample


def graded_sampler(documents: int) -> GroupSampler | None:
    """At most `documents` of a judged query, every grade kept; 0 takes all."""
    return sample_up_to(documents) if documents else None


def _stratified(scores: np.ndarray, documents: int, rng: np.random.Generator) -> np.ndarray:
    low, high = scores.min(), scores.max()
    stratum = np.minimum(((scores - low) / max(high - low, 1e-9) * documents).astype(np.int64), documents - 1)
    shuffled = rng.permutation(len(scores))
    _, firsts = np.unique(stratum[shuffled], return_index=True)
    one_each = shuffled[firsts]
    rest = np.setdiff1d(shuffled, one_each)
    return np.concatenate([one_each, rng.permutation(rest)])[:documents]


def _uniform(scores: np.ndarray, documents: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(len(scores))[:documents]


def _top(scores: np.ndarray, documents: int, _: np.random.Generator) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:documents]
