"""Ask a served student to rank documents for a query: library and command.

    python clients/rerank.py --query "night train" --documents documents.jsonl

    with Reranker(["grpc://localhost:8001", "grpc://standby:8001"], deadline=0.2) as ranker:
        ranking = ranker.rank("night train", titles, summaries)
        best = ranking.order[0]

`AsyncReranker` is the same with `await`. A URL's scheme picks the protocol: grpc, grpcs, http, https (none means grpc). A
request that a server refuses or does not answer goes to the next URL while the deadline lasts; one that is itself wrong is not
sent twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from clients.triton.connection import Connection, async_client, split_url, sync_client
from ranking.errors import DataError, InputError
from ranking.program import run

TOKEN_VARIABLE = "DISRANKER_TOKEN"
_REFUSED = (
    "StatusCode.INVALID_ARGUMENT",
    "400",
    "StatusCode.UNAUTHENTICATED",
    "401",
    "StatusCode.PERMISSION_DENIED",
    "403",
)


class RerankError(InputError):
    """No ranking. `retried` says what each URL answered; `bad_request` that the request itself was refused."""

    def __init__(self, message: str, bad_request: bool = False):
        super().__init__(message)
        self.bad_request = bad_request


@dataclass(frozen=True)
class Ranking:
    """Scores in document order, float32 [n], and the documents' order, best first, int [n] (ties keep document order)."""

    scores: NDArray[np.float32]
    order: NDArray[np.intp]
    model: str
    version: str
    url: str


class _Endpoints:
    """The URLs, the one that answered last first, and what a request looks like for each protocol."""

    def __init__(
        self, urls: Sequence[str], model: str, deadline: float, connection: Connection, make: Callable[..., Any]
    ):
        if not urls:
            raise InputError("no server URL given")
        if deadline <= 0:
            raise InputError(f"deadline is {deadline}: seconds above 0 are needed")
        self.urls = [split_url(url) for url in urls]
        self.model, self.deadline, self.connection = model, deadline, connection
        self._make, self._first = make, 0
        self._clients: dict[int, Any] = {}

    def attempts(self) -> Iterator[tuple[int, float]]:
        """Servers to try, the last good one first, each with the seconds it may take.

        Each gets an even part of what is left of the deadline, so that a silent server leaves time for the next.
        """
        end, count, first = time.monotonic() + self.deadline, len(self.urls), self._first
        for tried in range(count):
            remaining = (end - time.monotonic()) / (count - tried)
            if remaining <= 0:
                return
            yield (first + tried) % count, remaining

    def client(self, index: int):
        if index not in self._clients:
            scheme, address = self.urls[index]
            self._clients[index] = self._make(scheme, address, self.deadline, self.connection)
        return self._clients[index]

    def arguments(self, index: int, fields: dict[str, NDArray], remaining: float, version: str) -> dict[str, Any]:
        scheme, _ = self.urls[index]
        if scheme in ("grpc", "grpcs"):
            import tritonclient.grpc as protocol
        else:
            import tritonclient.http as protocol
        inputs = []
        for name, values in fields.items():
            tensor = protocol.InferInput(name, list(values.shape), "BYTES")
            tensor.set_data_from_numpy(values)
            inputs.append(tensor)
        more = {"client_timeout": remaining} if scheme in ("grpc", "grpcs") else {}
        # the server drops a request that is still queued at the deadline: nobody waits for it any more
        return {
            "model_name": self.model,
            "model_version": version,
            "inputs": inputs,
            "headers": self.connection.headers(),
            "timeout": max(1, int(remaining * 1e6)),
            **more,
        }

    def ranking(self, index: int, answer) -> Ranking:
        self._first = index
        scores = answer.as_numpy("score")
        answered = (
            answer.get_response(as_json=True) if self.urls[index][0].startswith("grpc") else answer.get_response()
        )
        order = np.argsort(-scores, kind="stable")
        return Ranking(scores, order, self.model, answered.get("model_version", ""), "://".join(self.urls[index]))

    def failed(self, index: int, problem: Exception, failures: list[str]) -> None:
        """Note a failure; RerankError at once if another server would say the same."""
        reason = " ".join(str(problem).split()) or type(problem).__name__
        url = "://".join(self.urls[index])
        if isinstance(problem, InferenceServerException):
            reason = " ".join(str(problem.message()).split())
            if problem.status() in _REFUSED:
                raise RerankError(f"{url}: {reason}", bad_request=True) from problem
        failures.append(f"{url}: {reason}")


class Reranker:
    """Synchronous client. Not for use by several threads at once over HTTP: give each its own."""

    def __init__(
        self, urls: Sequence[str], model: str = "student", deadline: float = 2.0, connection: Connection | None = None
    ):
        self._ends = _Endpoints(urls, model, deadline, connection or Connection(), sync_client)

    def rank(self, query: str, titles: Sequence[str], summaries: Sequence[str], version: str = "") -> Ranking:
        """The documents' scores and order. RerankError if no server answers within the deadline or the request is wrong."""
        fields = as_fields(query, titles, summaries)
        failures: list[str] = []
        for index, remaining in self._ends.attempts():
            try:
                arguments = self._ends.arguments(index, fields, remaining, version)
                return self._ends.ranking(index, self._ends.client(index).infer(**arguments))
            except (InferenceServerException, OSError) as problem:
                self._ends.failed(index, problem, failures)
        raise no_answer(failures, self._ends.deadline)

    def close(self) -> None:
        for client in self._ends._clients.values():
            client.close()

    def __enter__(self) -> Reranker:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class AsyncReranker:
    """The same for asyncio; any number of rankings may be under way at once."""

    def __init__(
        self, urls: Sequence[str], model: str = "student", deadline: float = 2.0, connection: Connection | None = None
    ):
        self._ends = _Endpoints(urls, model, deadline, connection or Connection(), async_client)

    async def rank(self, query: str, titles: Sequence[str], summaries: Sequence[str], version: str = "") -> Ranking:
        import aiohttp

        fields = as_fields(query, titles, summaries)
        failures: list[str] = []
        for index, remaining in self._ends.attempts():
            try:
                arguments = self._ends.arguments(index, fields, remaining, version)
                async with asyncio.timeout(remaining):
                    answer = await self._ends.client(index).infer(**arguments)
                return self._ends.ranking(index, answer)
            except (InferenceServerException, OSError, aiohttp.ClientError) as problem:  # TimeoutError is an OSError
                self._ends.failed(index, problem, failures)
        raise no_answer(failures, self._ends.deadline)

    async def close(self) -> None:
        for client in self._ends._clients.values():
            await client.close()

    async def __aenter__(self) -> AsyncReranker:
        return self

    async def __aexit__(self, *_) -> None:
        await self.close()


def as_fields(query: str, titles: Sequence[str], summaries: Sequence[str]) -> dict[str, NDArray]:
    """The request's tensors, BYTES as object arrays: query [1], title [n], summary [n]."""
    if len(titles) != len(summaries):
        raise RerankError(f"{len(titles)} titles and {len(summaries)} summaries: one of each per document", True)
    columns = {"query": [query], "title": titles, "summary": summaries}
    return {
        name: np.asarray([text.encode("utf-8", "replace") for text in texts], dtype=np.object_).reshape(len(texts))
        for name, texts in columns.items()
    }


def no_answer(failures: list[str], deadline: float) -> RerankError:
    return RerankError(f"no server answered within {deadline:g} s: {'; '.join(failures) or 'the deadline passed'}")


@dataclass
class Config:
    """Rank documents for a query with a served student.

    Args:
        query: the query
        documents: JSON Lines file with title and summary per line, and doc_id if there is one
        url: servers, tried in this order; scheme grpc, grpcs, http or https
        model: Triton model name: student, baseline or a further arm
        version: version of the model; empty for the one it serves
        top: lines to print; 0 for all
        deadline: seconds for the whole request, retries included
        token: bearer token; the variable DISRANKER_TOKEN if not given
        ca: PEM file of the authority that signed the servers' certificates
        certificate: PEM file of this client's certificate
        key: PEM file of this client's key
    """

    query: str
    documents: Path
    url: list[str] = field(default_factory=lambda: ["grpc://localhost:8001"])
    model: str = "student"
    version: str = ""
    top: int = 10
    deadline: float = 10.0
    token: str | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


def main(config: Config) -> None:
    documents = read_documents(config.documents)
    token = config.token or os.environ.get(TOKEN_VARIABLE)
    connection = Connection(token, config.ca, config.certificate, config.key)
    with Reranker(config.url, config.model, config.deadline, connection) as ranker:
        titles, summaries = ([d[name] for d in documents] for name in ("title", "summary"))
        ranking = ranker.rank(config.query, titles, summaries, config.version)
    print(f"{'rank':>4}  {'score':>9}  {'doc_id':12}  title")
    for place, index in enumerate(ranking.order[: config.top or None], start=1):
        document = documents[index]
        title = " ".join(document["title"].split())
        print(f"{place:>4}  {ranking.scores[index]:>9.4f}  {document['doc_id']:12}  {title[:90]}")


def read_documents(path: Path) -> list[dict[str, str]]:
    """Documents of a JSON Lines file. DataError names the first bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(path, f"cannot be read: {problem}") from problem
    documents: list[dict[str, str]] = []
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as problem:
            raise DataError(path, f"not JSON: {problem}", row) from problem
        if not isinstance(content, dict) or not isinstance(content.get("title"), str):
            raise DataError(path, "an object with a text `title` is expected", row)
        summary = content.get("summary", "")
        if not isinstance(summary, str):
            raise DataError(path, "`summary` is not text", row)
        documents.append(
            {"title": content["title"], "summary": summary, "doc_id": str(content.get("doc_id", len(documents) + 1))}
        )
    if not documents:
        raise DataError(path, "no documents")
    return documents


if __name__ == "__main__":
    run(main, Config, example='python clients/rerank.py --query "night train" --documents documents.jsonl')
