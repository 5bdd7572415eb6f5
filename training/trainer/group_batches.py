"""Queries with their documents, and the batches made of them: whole groups, each document encoded once a step.

The order of queries and the documents sampled for each are pure functions of (seed, epoch, query), so a resumed run
sees what an uninterrupted one would have, whatever the number of processes or data loader workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ranking.chunks import Pooling, pool
from training.trainer.token_store import TokenStore, split_by_tokens

# (targets of one query's documents [m] or [m, k], random generator) -> indices of the documents to use this epoch
GroupSampler = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass
class RankingGroups:
    """Documents ordered by query.

    store: one text per document, or one per chunk of each document; targets: float32 [documents] (grade or teacher
    score) or [documents, k] where a loss wants several (the first column is the one that pair accuracy and NDCG are
    taken on); group_starts: int [queries + 1], query q has the documents group_starts[q]..group_starts[q + 1];
    query_ids: one name per query; chunk_starts: int64 [documents + 1], document d has the texts
    chunk_starts[d]..chunk_starts[d + 1], None where each has one; pooling: how a document's score is made of its
    chunks' scores.
    """

    store: TokenStore
    targets: np.ndarray
    group_starts: np.ndarray
    query_ids: list[str]
    chunk_starts: np.ndarray | None = None
    pooling: Pooling = "max"

    def __post_init__(self):
        documents = len(self.store) if self.chunk_starts is None else len(self.chunk_starts) - 1
        if documents != len(self.targets) or self.group_starts[-1] != len(self.targets):
            raise ValueError(
                f"{documents} documents, {len(self.targets)} targets, groups up to "
                f"{self.group_starts[-1]}: must be equal"
            )
        if not np.isfinite(self.targets).all():
            document = int(np.argwhere(~np.isfinite(self.targets))[0][0])
            raise ValueError(f"targets of document {document} are {self.targets[document]}: must be finite")
        if self.chunk_starts is not None and self.chunk_starts[-1] != len(self.store):
            raise ValueError(f"{len(self.store)} texts, chunks up to {self.chunk_starts[-1]}: must be equal")

    @classmethod
    def of_rows(
        cls,
        query_ids: Sequence[str],
        targets: np.ndarray,
        store: TokenStore,
        chunk_starts: np.ndarray | None = None,
        pooling: Pooling = "max",
    ) -> RankingGroups:
        """Group rows in any order by query id; queries and documents keep the order of their first row.

        query_ids, targets and the store's texts (or, with chunk_starts, its stretches of texts): one per row.
        """
        names, order, group_starts = group_rows(query_ids)
        targets = np.asarray(targets, np.float32)
        ungrouped = cls(store, targets, np.asarray([0, len(targets)]), [""], chunk_starts, pooling)
        return ungrouped.take(order, group_starts, names)

    def take(self, documents: np.ndarray, group_starts: np.ndarray, query_ids: list[str]) -> RankingGroups:
        """The chosen documents (indices) in that order, as the groups that group_starts and query_ids say."""
        texts, chunk_starts = self.texts_of(documents)
        chunks = None if self.chunk_starts is None else chunk_starts
        return RankingGroups(
            self.store.take(texts), self.targets[documents], group_starts, query_ids, chunks, self.pooling
        )

    def texts_of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The store's rows of the chosen documents, document after document, and where each one's start [n + 1]."""
        if self.chunk_starts is None:
            return documents, np.arange(len(documents) + 1)
        sizes = np.diff(self.chunk_starts)[documents]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
        return np.repeat(self.chunk_starts[documents], sizes) + within, starts

    def pool(self, scores: np.ndarray) -> np.ndarray:
        """float32 [documents]: the documents' scores, of one score for each of the store's texts."""
        return scores if self.chunk_starts is None else pool(scores, self.chunk_starts, self.pooling)

    def __len__(self) -> int:
        return len(self.query_ids)

    def group_of_document(self) -> np.ndarray:
        """int64 [documents]: the query's index of every document."""
        return np.repeat(np.arange(len(self)), np.diff(self.group_starts))


def group_rows(query_ids: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(query ids in order of first row, row order that puts each query's rows together, group starts [queries + 1])."""
    numbers: dict[str, int] = {}
    group = np.fromiter((numbers.setdefault(q, len(numbers)) for q in query_ids), np.int64, len(query_ids))
    group_starts = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=len(numbers)))]).astype(np.int64)
    return list(numbers), np.argsort(group, kind="stable"), group_starts


def sample_up_to(limit: int) -> GroupSampler:
    """At most limit documents of a query, every target value keeping a share: a pair needs two different ones.

    Rounds over the distinct values, one random document of each a round, until limit is reached.
    """

    def sample(targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if len(targets) <= limit:
            return np.arange(len(targets))
        first = targets if targets.ndim == 1 else targets[:, 0]
        shuffled = rng.permutation(len(first))
        _, level = np.unique(first[shuffled], return_inverse=True)
        by_level = np.argsort(level, kind="stable")
        sizes = np.bincount(level)
        turn = np.empty(len(first), np.int64)
        turn[by_level] = np.concatenate([np.arange(size) for size in sizes])
        # ties between values of the last round are settled at random, so that no grade is always left out
        return shuffled[np.lexsort((rng.random(len(first)), turn))[:limit]]

    return sample


class GroupBatches(Dataset):
    """The batches of one epoch, as this process sees them: item i is its share of global batch i.

    A global batch is batch_groups whole queries, the same whatever the number of processes; its queries are dealt to
    the processes by their tokens. A share is encoded in a few forwards, documents sorted by length and each forward
    within forward_tokens padded tokens, so padding stays small although groups mix lengths. Every process makes the
    same number of forwards (FSDP gathers weights in each): missing ones are filled with one document that counts for
    nothing.

    An item is {
      "forwards": list of model inputs (TokenStore.pad),
      "rows": list of ints, how many of the scores of each forward count (0 in a filler),
      "targets": float [n] or [n, k] and "groups": int64 [n], in the order of the counting scores,
      "normaliser": documents of the global batch on all processes, by which the loss is divided },
    and where documents have chunks also "documents": int64 [scores], the place in targets and groups of the document
    that each counting score is a chunk's of.
    """

    def __init__(
        self,
        groups: RankingGroups,
        *,
        batch_groups: int,
        forward_tokens: int,
        pad_id: int,
        seed: int,
        token_types: bool = False,
        sample_group: GroupSampler | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.groups, self.batch_groups, self.forward_tokens = groups, batch_groups, forward_tokens
        self.pad_id, self.seed, self.token_types = pad_id, seed, token_types
        self.sample_group = sample_group
        self.process_index, self.process_count = process_index, process_count
        self.examples = len(groups)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of the queries, and from now on the sampled documents, for an epoch."""
        self.epoch = epoch
        self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.groups))

    def __len__(self) -> int:
        return -(-len(self.groups) // self.batch_groups)

    def documents_of(self, query: int) -> np.ndarray:
        """Document indices sampled for a query in this epoch."""
        start, end = self.groups.group_starts[query], self.groups.group_starts[query + 1]
        if self.sample_group is None:
            return np.arange(start, end)
        rng = np.random.default_rng([self.seed, self.epoch, query])
        return start + np.sort(self.sample_group(self.groups.targets[start:end], rng))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        queries = self.order[index * self.batch_groups : (index + 1) * self.batch_groups]
        documents = [self.documents_of(query) for query in queries]
        lengths = self.groups.store.lengths
        sizes = [int(lengths[self.groups.texts_of(each)[0]].sum()) for each in documents]
        shares = deal(sizes, self.process_count)
        plans = []
        for share in shares:
            mine = np.concatenate([documents[i] for i in share]) if share else np.empty(0, np.int64)
            texts, _ = self.groups.texts_of(mine)
            plans.append([texts[piece] for piece in split_by_tokens(lengths[texts], self.forward_tokens)])
        forwards = plans[self.process_index]
        rows = [len(forward) for forward in forwards]
        everything, _ = self.groups.texts_of(np.concatenate(documents))
        filler = everything[np.argmin(lengths[everything])][None]
        missing = max(map(len, plans)) - len(forwards)
        texts = np.concatenate(forwards) if forwards else np.empty(0, np.int64)
        mine, place = texts, None
        if self.groups.chunk_starts is not None:
            mine, place = np.unique(
                np.searchsorted(self.groups.chunk_starts, texts, side="right") - 1, return_inverse=True
            )
        item = {
            "forwards": [
                self.groups.store.pad(piece, self.pad_id, self.token_types)
                for piece in [*forwards, *[filler] * missing]
            ],
            "rows": rows + [0] * missing,
            "targets": torch.from_numpy(self.groups.targets[mine]),
            "groups": torch.from_numpy(np.searchsorted(self.groups.group_starts, mine, side="right") - 1),
            "normaliser": sum(map(len, documents)),
        }
        return item if place is None else item | {"documents": torch.from_numpy(place)}


def deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Indices of sizes in `hands` lists of about equal sum: largest first, each to the list with the least so far."""
    shares: list[list[int]] = [[] for _ in range(hands)]
    sums = [0] * hands
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = min(range(hands), key=lambda hand: (sums[hand], hand))
        shares[least].append(i)
        sums[least] += sizes[i]
    return shares
