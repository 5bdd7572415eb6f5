"""What a reranking service costs: prices, the budget of a run, and the forecast of --dry-run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic

import pyarrow as pa
import pyarrow.compute as pc

from clients.labelling.candidate_file import CandidateFile
from clients.labelling.http_teacher import CharacterLimits
from ranking.errors import InputError

CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Prices:
    """What a service bills; both parts are added.

    Args:
        per_1000_requests: money for 1000 requests (Cohere's search units: a request of up to 100 documents)
        per_million_tokens: money for 1,000,000 tokens, counted as one per four characters
    """

    per_1000_requests: float = 0.0
    per_million_tokens: float = 0.0

    def __post_init__(self) -> None:
        for name in ("per_1000_requests", "per_million_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: a price is not below 0")

    def cost(self, requests: int, tokens: float) -> float:
        """Money for that many requests with that many tokens in all."""
        return requests * self.per_1000_requests / 1e3 + tokens * self.per_million_tokens / 1e6


def tokens_of(texts: Sequence[tuple[bytes, ...]]) -> float:
    """About how many tokens a service counts for pairs: it reads the query with each document."""
    return sum(len(text.decode()) for pair in texts for text in pair) / CHARACTERS_PER_TOKEN


class Budget:
    """Money and pace of the whole run, shared by its endpoints.

    limit: money that the requests of this run may cost, None for no limit; requests_per_minute: None for no limit.
    Every request counts, answered or not: nobody knows what a service bills for a failed one.
    """

    def __init__(self, prices: Prices, limit: float | None, requests_per_minute: float | None):
        self.prices, self.limit = prices, limit
        self.requests, self.spent = 0, 0.0
        self._pause = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0
        self._open = 0
        self._none_open = asyncio.Event()

    @asynccontextmanager
    async def request(self, tokens: float) -> AsyncIterator[None]:
        """Around one request: wait for the pace and count it.

        InputError if it would cost more than is left, once the requests under way have been answered: they are paid
        for.
        """
        cost = self.prices.cost(1, tokens)
        if self.limit is not None and self.spent + cost > self.limit:
            while self._open:
                self._none_open.clear()
                await self._none_open.wait()
            raise InputError(
                f"the budget of {self.limit:g} is spent: {self.requests} requests cost about {self.spent:.2f}; what "
                "was answered is kept, run again to go on with a new budget"
            )
        self.requests += 1
        self.spent += cost
        wait = self._next - monotonic()
        self._next = max(self._next, monotonic()) + self._pause
        self._open += 1
        try:
            if wait > 0:
                await asyncio.sleep(wait)
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._none_open.set()


def forecast_cost(
    candidates: CandidateFile,
    shard_rows: int,
    limits: CharacterLimits,
    documents: int,
    prices: Prices,
    requests_per_minute: float | None,
) -> str:
    """Pairs, requests, tokens, time and money of a run over the whole file, as text; no row is sent.

    shard_rows, documents: as the run is given them, since a request holds documents of one query and one shard.
    """
    pairs = requests = characters = 0
    for _, rows, refused in candidates.read(candidates.ranges(shard_rows)):
        sound = rows.take(pa.array([index for index in range(len(rows)) if index not in refused], pa.int64()))
        pairs += len(sound)
        by_query = sound.group_by("query").aggregate([("query", "count")])
        requests += sum(-(-count // documents) for count in by_query.column("query_count").to_pylist())
        for name in ("query", "title", "summary"):
            lengths = pc.utf8_length(sound.column(name))
            characters += pc.sum(pc.min_element_wise(lengths, getattr(limits, name))).as_py() or 0
    tokens = characters / CHARACTERS_PER_TOKEN
    lines = [
        f"pairs     {pairs}",
        f"requests  {requests} of up to {documents} documents",
        f"tokens    about {tokens:.0f}",
        f"cost      about {prices.cost(requests, tokens):.2f}",
    ]
    if requests_per_minute is not None:
        lines.insert(3, f"time      at least {requests / requests_per_minute / 60:.2f} hours")
    return "\n".join(lines)
