"""The queue of pairs that wait for a score, which all servers draw from; the shards they belong to; the run's
counts."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field
from time import monotonic

import numpy as np
import pyarrow as pa

from clients.labelling.candidate_file import Refusal, RowRange


class ShardInHand:
    """A row range being labelled: its rows, the scores so far (NaN: none yet), the refusals, and how many are open."""

    def __init__(self, covered: RowRange, rows: pa.Table, refused: dict[int, str]):
        self.covered, self.rows = covered, rows
        self.scores = np.full(len(rows), np.nan, np.float32)
        self.refusals = [Refusal(position, "input", reason) for position, reason in refused.items()]
        self.open = len(rows) - len(refused)
        self.done = asyncio.Event()
        if not self.open:
            self.done.set()

    def sending_order(self) -> list[int]:
        """Positions to score, a query's candidates side by side, so that the prefix cache serves them."""
        settled = {refusal.position for refusal in self.refusals} | set(
            np.flatnonzero(np.isfinite(self.scores)).tolist()
        )
        by_query: dict[str, list[int]] = {}
        for position, query in enumerate(self.rows.column("query").to_pylist()):
            if position not in settled:
                by_query.setdefault(query, []).append(position)
        return [position for positions in by_query.values() for position in positions]

    def score(self, position: int, value: float) -> None:
        """Note the score of the row at that position."""
        self.scores[position] = value
        self._close_one()

    def refuse(self, position: int, reason: str) -> None:
        """Note that the teacher gave no score for the row at that position."""
        self.refusals.append(Refusal(position, "teacher", reason))
        self._close_one()

    def _close_one(self) -> None:
        self.open -= 1
        if not self.open:
            self.done.set()


@dataclass(slots=True, eq=False)
class Pair:
    """One pair to be scored: where its score goes, its texts as the teacher takes them, its own failures, lost streams,
    and whether a request that it shared with others failed.
    """

    shard: ShardInHand
    position: int
    texts: tuple[bytes, ...]
    failures: int = 0
    streams_lost: int = 0
    suspect: bool = False

    @property
    def trouble(self) -> int:
        """How often it has failed, or a stream has broken under it."""
        return self.failures + self.streams_lost + self.suspect


class WorkQueue:
    """The pairs that wait for an endpoint. Handed-back pairs go first: their shard waits for them."""

    def __init__(self) -> None:
        self._pairs: deque[Pair] = deque()
        self._filled = asyncio.Event()
        self._low = asyncio.Event()
        self._room = 0

    def __len__(self) -> int:
        return len(self._pairs)

    async def put(self, pairs: list[Pair], room: int) -> None:
        """Append pairs once fewer than `room` are waiting."""
        self._room = room
        while len(self._pairs) >= room:
            self._low.clear()
            await self._low.wait()
        self._pairs.extend(pairs)
        self._filled.set()

    def hand_back(self, pair: Pair) -> None:
        """Put a pair that got no score in front of the queue."""
        self._pairs.appendleft(pair)
        self._filled.set()

    async def get(self, most: int = 1, alone_after: int = 1, one_query: bool = True) -> list[Pair]:
        """The next pair, with those behind it, up to `most`; waits for the first.

        one_query: only those whose first text, the query, is the same. alone_after: a pair that has failed that often
        comes alone, so that it cannot take others with it.
        """
        while not self._pairs:
            self._filled.clear()
            await self._filled.wait()
        first = self._pairs.popleft()
        taken = [first]
        while self._pairs and len(taken) < most and first.trouble < alone_after:
            other = self._pairs[0]
            if (one_query and other.texts[0] != first.texts[0]) or other.trouble >= alone_after:
                break
            taken.append(self._pairs.popleft())
        if len(self._pairs) < self._room:
            self._low.set()
        return taken


@dataclass
class Tally:
    """Counts of one run, read by the progress bar and the metrics port while they grow."""

    total: int = 0  # pairs of the whole job
    already: int = 0  # of them, finished by earlier runs
    scored: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by cause
    retries: int = 0
    shards: int = 0
    by_endpoint: Counter[str] = field(default_factory=Counter)
    in_flight: Counter[str] = field(default_factory=Counter)
    windows: dict[str, int] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)  # times an endpoint was lost
    latency_seconds: float = 0.0  # summed over answers
    last_answer: float = field(default_factory=monotonic)
    last_problem: str = ""

    @property
    def done(self) -> int:
        """Pairs of this run that are scored or refused."""
        return self.scored + sum(self.refused.values())
