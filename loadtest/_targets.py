"""Where requests go: Triton over gRPC or HTTP, or the A/B router.

Each `send` returns the model that answered, its scores in request order, and how many chunks it read.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import geventhttpclient
import numpy as np
from tritonclient.utils import InferenceServerException

from clients.triton.connection import Credentials, TritonConnection
from loadtest._request_pool import RankRequest
from ranking.errors import InputError
from ranking.request_tensors import CHUNKS, SCORE, read_scores, request_tensors

# what the parsers raise for an answer that is none; a simulated caller that dies of it would send no more
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError)
INTERLEAVED = "interleaved"  # what the router names in a model's place on a page of two models
CONNECTIONS = 512  # requests in flight per process over HTTP; gRPC multiplexes


class RequestFailed(Exception):
    """An answer that is none: refused, timed out, malformed.

    The text groups failures, so it holds no numbers of its own.
    """


class Answer(NamedTuple):
    """model: what answered; scores: float32 [n] in request order; chunks: (query, title, chunk) pairs that it read.

    A model that reads a document in one piece reads as many chunks as documents; the router does not say.
    """

    model: str
    scores: np.ndarray
    chunks: int


class Target(Protocol):
    """A server that ranks. deadline_ms: after it a request has failed."""

    def send(self, arm: str, request: RankRequest) -> Answer:
        """What the model answered. RequestFailed if there is no usable answer."""


class TritonTarget:
    """Triton over gRPC or HTTP, as the connection says: one channel, or one pool, for all requests of the process.

    The deadline goes along, as any client's of ours: the server drops a request that is still queued by then.
    """

    def __init__(self, connection: TritonConnection, deadline_ms: float):
        self._connection, self._deadline_ms = connection, deadline_ms
        self._client = connection.sync_client(deadline_ms, CONNECTIONS)
        self._inputs: dict[int, list] = {}  # made once: building them costs more than sending them

    def send(self, arm: str, request: RankRequest) -> Answer:
        """Send one request; see Target.send."""
        if request.number not in self._inputs:
            tensors = request_tensors(request.query, request.titles, request.summaries)
            self._inputs[request.number] = self._connection.infer_inputs(tensors)
        inputs = self._inputs[request.number]
        try:
            answer = self._client.infer(**self._connection.infer_arguments(arm, inputs, self._deadline_ms))
        except InferenceServerException as problem:
            raise RequestFailed(_reason(problem)) from problem
        except (OSError, geventhttpclient.response.HTTPParseError, *MALFORMED) as problem:
            raise RequestFailed(type(problem).__name__) from problem
        return _read(arm, answer, request)


class RouterTarget:
    """POST /rank of the A/B router.

    The arm is the router's choice by user id; its answer names the model that ranked.
    """

    def __init__(self, url: str, deadline_ms: float, users: int, credentials: Credentials | None = None):
        """InputError if the URL is none. users: distinct user ids; credentials: the router's key as their token."""
        credentials = credentials or Credentials()
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as problem:
            raise InputError(f"{url}: {problem}") from problem
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{url}: http://host:port or https://host:port is needed")
        secure = parts.scheme == "https"
        self._path = f"{parts.path.rstrip('/')}/rank"
        self._headers = {"Content-Type": "application/json"} | credentials.headers()
        self._http = geventhttpclient.HTTPClient(
            parts.hostname,
            port or (443 if secure else 80),
            concurrency=CONNECTIONS,
            connection_timeout=deadline_ms / 1000,
            network_timeout=deadline_ms / 1000,
            ssl=secure,
            ssl_context_factory=credentials.tls_context if secure else None,
        )
        self._users, self._sent = users, 0
        self._documents: dict[int, list[dict[str, str]]] = {}

    def send(self, arm: str, request: RankRequest) -> Answer:
        """Send one request; see Target.send."""
        if request.number not in self._documents:
            rows = zip(request.doc_ids, request.titles, request.summaries)
            self._documents[request.number] = [{"doc_id": i, "title": t, "summary": s} for i, t, s in rows]
        self._sent += 1
        body = {
            "user_id": f"load-{self._sent * 2654435761 % self._users}",
            "query": request.query,
            "documents": self._documents[request.number],
        }
        try:
            answer = self._http.post(self._path, json.dumps(body).encode(), self._headers)
            content = answer.read()
        except (OSError, geventhttpclient.response.HTTPParseError) as problem:
            raise RequestFailed(type(problem).__name__) from problem
        if answer.status_code != 200:
            raise RequestFailed(f"HTTP {answer.status_code}")
        try:
            return self._read(json.loads(content), request)
        except MALFORMED as problem:
            raise RequestFailed(f"no answer of a router: {type(problem).__name__}") from problem

    @staticmethod
    def _read(ranked: dict[str, Any], request: RankRequest) -> Answer:
        if ranked["fallback"]:
            raise RequestFailed(f"fallback: {ranked['fallback']}")
        order, scores = ranked["ranking"], ranked["scores"]
        if sorted(order) != sorted(request.doc_ids) or len(scores) != len(order):
            raise RequestFailed("the ranking does not hold the documents that were sent")
        if ranked["served_by"] != INTERLEAVED and any(a < b for a, b in pairwise(scores)):
            raise RequestFailed("the ranking is not in the order of its scores")
        by_document = dict(zip(order, scores))
        scores = np.array([by_document[doc] for doc in request.doc_ids], dtype=np.float32)
        return Answer(ranked["served_by"], scores, len(scores))


def _read(arm: str, answer, request: RankRequest) -> Answer:
    try:
        scores = read_scores(answer.as_numpy(SCORE), len(request.doc_ids))
        chunks = answer.as_numpy(CHUNKS)
        return Answer(arm, scores, len(scores) if chunks is None else int(chunks.sum()))
    except MALFORMED as problem:
        raise RequestFailed(f"wrong answer: {problem}") from problem


def _reason(problem: InferenceServerException) -> str:
    status = problem.status()
    return f"{status}: {problem.message()}"[:160] if status else (problem.message() or "no reason given")[:160]
