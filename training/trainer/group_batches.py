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

from training.trainer.token_store import TokenStore, split_by_tokens

# (targets of one query's documents [m] or [m, k], random generator) -> indices of the documents to use this epoch
GroupSampler = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass
class RankingGroups:
    """Documents ordered by query.

    store: one text per document; targets: float32 [documents] (grade or teacher score) or [documents, k] where a loss
    wants several (the first column is the one that pair accuracy and NDCG are taken on); group_starts: int [queries +
    1], query q has the documents group_starts[q]..group_starts[q + 1]; query_ids: one name per query.
    """

    store: TokenStore
    targets: np.ndarray
    group_starts: np.ndarray
    query_ids: list[str]

    def __post_init__(self):
        if len(self.store) != len(self.targets) or self.group_starts[-1] != len(self.targets):
            raise ValueError(
                f"{len(self.store)} texts, {len(self.targets)} targets, groups up to "
                f"{self.group_starts[-1]}: must be equal"
            )

    @classmethod
    def of_rows(cls, query_ids: Sequence[str], targets: np.ndarray, store: TokenStore) -> RankingGroups:
        """Group rows in any order by query id; queries and documents keep the order of their first row.

        query_ids, targets and the store's texts: one per row.
        """
        names, order, group_starts = group_rows(query_ids)
        return cls(store.take(order), np.asarray(targets, np.float32)[order], group_starts, names)

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
      "normaliser": documents of the global batch on all processes, by which the loss is divided }.
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
        shares = deal([int(lengths[d].sum()) for d in documents], self.process_count)
        plans = []
        for share in shares:
            mine = np.concatenate([documents[i] for i in share]) if share else np.empty(0, np.int64)
            plans.append([mine[chunk] for chunk in split_by_tokens(lengths[mine], self.forward_tokens)])
        forwards = plans[self.process_index]
        rows = [len(forward) for forward in forwards]
        everything = np.concatenate(documents)
        filler = everything[np.argmin(lengths[everything])][None]
        missing = max(map(len, plans)) - len(forwards)
        mine = np.concatenate(forwards) if forwards else np.empty(0, np.int64)
        return {
            "forwards": [
                self.groups.store.pad(chunk, self.pad_id, self.token_types)
                for chunk in [*forwards, *[filler] * missing]
            ],
            "rows": rows + [0] * missing,
            "targets": torch.from_numpy(self.groups.targets[mine]),
            "groups": torch.from_numpy(np.searchsorted(self.groups.group_starts, mine, side="right") - 1),
            "normaliser": len(everything),
        }


def deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Indices of sizes in `hands` lists of about equal sum: largest first, each to the list with the least so far."""
    shares: list[list[int]] = [[] for _ in range(hands)]
    sums = [0] * hands
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = min(range(hands), key=lambda hand: (sums[hand], hand))
        shares[least].append(i)
        sums[least] += sizes[i]
    return shares
