"""Rank documents for a query over one or several Triton servers: the first that answers within the deadline counts.

    with Reranker(["grpc://localhost:8001", "grpc://standby:8001"], deadline_ms=200) as ranker:
        ranked = ranker.rank("night train", titles, summaries)
        best = ranked.order[0]

`AsyncReranker` is the same with `await`. A request that a server refuses or does not answer goes to the next URL while
the deadline lasts; one that is itself wrong is not sent twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.triton.connection import Credentials, TritonConnection
from clients.triton.scoring import AsyncScoringClient, ModelScores, PageTensors, ScoringClient, ScoringFailure
from ranking.errors import InputError
from ranking.request_tensors import descending, request_tensors


class RerankError(InputError):
    """No ranking; the text says what each URL answered. bad_request: the request itself was refused."""

    def __init__(self, message: str, bad_request: bool = False):
        super().__init__(message)
        self.bad_request = bad_request


@dataclass(frozen=True)
class RankedDocuments:
    """Scores in document order, float32 [n], and the documents' order, best first, int [n] (ties keep document order).

    model, version, url: what answered; probabilities: that a document is relevant, float32 [n] in document order; None
    from a model that has no calibration.
    """

    scores: NDArray[np.float32]
    order: NDArray[np.intp]
    model: str
    version: str
    url: str
    probabilities: NDArray[np.float32] | None = None


class _Servers:
    """The URLs, the one that answered last first, and one ranking's attempts at them."""

    def __init__(
        self, urls: Sequence[str], model: str, deadline_ms: float, credentials: Credentials | None, make: Callable
    ):
        if not urls:
            raise InputError("no server URL given")
        if deadline_ms <= 0:
            raise InputError(f"deadline_ms is {deadline_ms}: milliseconds above 0 are needed")
        self.connections = [TritonConnection(url, credentials) for url in urls]
        self.model, self.deadline_ms = model, deadline_ms
        self._make, self._first = make, 0
        self.clients: dict[int, Any] = {}

    def attempts(self) -> Iterator[tuple[int, Any, float]]:
        """Servers to try, the last good one first: number, client, and the milliseconds the attempt may take.

        Each gets an even part of what is left of the deadline, so that a silent server leaves time for the next.
        """
        end, count, first = time.monotonic() + self.deadline_ms / 1000, len(self.connections), self._first
        for tried in range(count):
            remaining_ms = (end - time.monotonic()) * 1000 / (count - tried)
            if remaining_ms <= 0:
                return
            number = (first + tried) % count
            if number not in self.clients:
                self.clients[number] = self._make(self.connections[number], self.deadline_ms, count)
            yield number, self.clients[number], remaining_ms

    def answered(self, number: int, scored: ModelScores) -> RankedDocuments:
        self._first = number
        order = descending(scored.values)
        url = str(self.connections[number])
        return RankedDocuments(scored.values, order, self.model, scored.version, url, scored.probabilities)

    def failed(self, number: int, failure: ScoringFailure) -> str:
        """What to say of a failed attempt; RerankError at once if another server would say the same."""
        told = f"{self.connections[number]}: {failure}"
        if failure.refused:
            raise RerankError(told, bad_request=True) from failure
        return told

    def no_answer(self, failures: list[str]) -> RerankError:
        told = "; ".join(failures) or "the deadline passed"
        return RerankError(f"no server answered within {self.deadline_ms:g} ms: {told}")


class _OverServers:
    """What Reranker and AsyncReranker share: the servers, and how they are asked."""

    _make_client: Callable[[TritonConnection, float, int], Any]  # of a server, the deadline, how many servers there are

    def __init__(
        self,
        urls: Sequence[str],
        model: str = "student",
        deadline_ms: float = 2000.0,
        credentials: Credentials | None = None,
    ):
        self._servers = _Servers(urls, model, deadline_ms, credentials, type(self)._make_client)


class Reranker(_OverServers):
    """Synchronous client. Over HTTP it is not for use by several threads at once: give each its own."""

    @staticmethod
    def _make_client(connection: TritonConnection, deadline_ms: float, servers: int) -> ScoringClient:
        # over HTTP a socket has one limit for all requests: of the whole deadline nothing would be left for the next
        return ScoringClient(connection, deadline_ms / servers)

    def rank(
        self,
        query: str,
        titles: Sequence[str],
        summaries: Sequence[str],
        version: str = "",
        priors: Sequence[float | None] = (),
        max_chunks: int | None = None,
    ) -> RankedDocuments:
        """The documents' scores and order. RerankError if no server answers in time or the request is wrong.

        priors: the first stage's score of each document, None where it has none; left out, the model ranks alone.
        max_chunks: of a long document, read so many chunks at most; only for models that read several.
        """
        page = _page(query, titles, summaries, priors, max_chunks)
        failures: list[str] = []
        for number, client, remaining_ms in self._servers.attempts():
            try:
                return self._servers.answered(number, client.score(self._servers.model, page, remaining_ms, version))
            except ScoringFailure as failure:
                failures.append(self._servers.failed(number, failure))
        raise self._servers.no_answer(failures)

    def close(self) -> None:
        """Close all connections."""
        for client in self._servers.clients.values():
            client.close()

    def __enter__(self) -> Reranker:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class AsyncReranker(_OverServers):
    """The same for asyncio; any number of rankings may be under way at once."""

    @staticmethod
    def _make_client(connection: TritonConnection, deadline_ms: float, servers: int) -> AsyncScoringClient:
        return AsyncScoringClient(connection, deadline_ms)

    async def rank(
        self,
        query: str,
        titles: Sequence[str],
        summaries: Sequence[str],
        version: str = "",
        priors: Sequence[float | None] = (),
        max_chunks: int | None = None,
    ) -> RankedDocuments:
        """As Reranker.rank."""
        page = _page(query, titles, summaries, priors, max_chunks)
        failures: list[str] = []
        for number, client, remaining_ms in self._servers.attempts():
            try:
                scored = await client.score(self._servers.model, page, remaining_ms, version)
                return self._servers.answered(number, scored)
            except ScoringFailure as failure:
                failures.append(self._servers.failed(number, failure))
        raise self._servers.no_answer(failures)

    async def close(self) -> None:
        """Close all connections."""
        for client in self._servers.clients.values():
            await client.close()

    async def __aenter__(self) -> AsyncReranker:
        return self

    async def __aexit__(self, *_) -> None:
        await self.close()


def _page(
    query: str,
    titles: Sequence[str],
    summaries: Sequence[str],
    priors: Sequence[float | None],
    max_chunks: int | None,
) -> PageTensors:
    try:
        return PageTensors(request_tensors(query, titles, summaries, priors, max_chunks))
    except ValueError as problem:
        raise RerankError(str(problem), bad_request=True) from problem
