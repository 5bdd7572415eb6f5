"""Cut the pairs of a request into calls of the encoder: by length where calls are padded, by size where packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bucket:
    """One call of the encoder: row numbers of the request and the length that they are padded to."""

    rows: list[int]
    length: int


def cut(
    lengths: Sequence[int], edges: Sequence[int], max_batch: int, batch_tokens: int, call_tokens: int
) -> list[Bucket]:
    """The buckets that cost least: padded tokens, plus call_tokens for every call of the encoder.

    lengths: tokens of each pair; edges: ascending padded lengths that the encoder has kernels or profiles for, the last
    one at least as long as any pair; max_batch, batch_tokens: limits of one call (a single row always passes).
    Exact for the choice of edges, by dynamic programming over the (few) edges in use; then each bucket is split evenly.

        >>> cut([9, 30, 12, 31], edges=[16, 32], max_batch=8, batch_tokens=512, call_tokens=8)
        [Bucket(rows=[0, 2], length=16), Bucket(rows=[1, 3], length=32)]
        >>> cut([9, 30, 12, 31], edges=[16, 32], max_batch=8, batch_tokens=512, call_tokens=100)
        [Bucket(rows=[0, 2, 1, 3], length=32)]
    """
    if not lengths:
        return []
    by_edge: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        edge = next(edge for edge in edges if edge >= lengths[row])
        by_edge.setdefault(edge, []).append(row)
    used = list(by_edge)
    counts = [len(by_edge[edge]) for edge in used]
    # best[i]: cheapest way to cover the first i used edges; start[i]: where its last bucket begins
    best, start = [0.0], [0]
    for end in range(1, len(used) + 1):
        options = [(best[first] + sum(counts[first:end]) * used[end - 1] + call_tokens, first) for first in range(end)]
        cheapest, first = min(options)
        best.append(cheapest)
        start.append(first)
    buckets: list[Bucket] = []
    end = len(used)
    while end:
        first = start[end]
        rows = [row for edge in used[first:end] for row in by_edge[edge]]
        buckets = _split(rows, used[end - 1], max_batch, batch_tokens) + buckets
        end = first
    return buckets


def _split(rows: list[int], length: int, max_batch: int, batch_tokens: int) -> list[Bucket]:
    largest = max(1, min(max_batch, batch_tokens // length))
    calls = -(-len(rows) // largest)
    size = -(-len(rows) // calls)
    return [Bucket(rows[i : i + size], length) for i in range(0, len(rows), size)]


def fill(lengths: Sequence[int], max_batch: int, batch_tokens: int) -> list[list[int]]:
    """Rows of each call where pairs are packed without padding: in order, as many as the limits of one call allow.

    lengths: tokens of each pair. A single row always passes.

        >>> fill([9, 30, 12, 31], max_batch=8, batch_tokens=52)
        [[0, 1, 2], [3]]
    """
    calls: list[list[int]] = []
    tokens = 0
    for row, length in enumerate(lengths):
        if not calls or len(calls[-1]) == max_batch or tokens + length > batch_tokens:
            calls.append([])
            tokens = 0
        calls[-1].append(row)
        tokens += length
    return calls
