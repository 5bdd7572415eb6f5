"""Ask a Triton server for the scores of a page: one call with a deadline, and one kind of failure with its reason."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from clients.triton.connection import TritonConnection
from ranking import tracing
from ranking.request_tensors import MAX_CHUNKS, PROBABILITY, SCORE, documents_of, read_probabilities, read_scores

# gRPC and HTTP name the same refusal differently
_REASONS = {
    "StatusCode.DEADLINE_EXCEEDED": "timeout",
    "StatusCode.CANCELLED": "timeout",
    "StatusCode.UNAVAILABLE": "unavailable",
    "StatusCode.NOT_FOUND": "unavailable",
    "404": "unavailable",
    "503": "unavailable",
}
_BAD_PAGE = {"StatusCode.INVALID_ARGUMENT", "400"}
_REFUSALS = {
    "StatusCode.INVALID_ARGUMENT",
    "400",
    "StatusCode.UNAUTHENTICATED",
    "401",
    "StatusCode.PERMISSION_DENIED",
    "403",
}
# what Triton itself finds wrong with a request is about tensors and models, which no caller of a ranking chooses
_SERVERS_OWN = ("[request id:", "Request for unknown model", "unexpected inference")
# so many deadline misses in a row, with no answer between them, and the connection is taken for dead
RENEW_AFTER = 5
# asyncio's deadline is only for a channel that hangs before gRPC starts to count the request's own
_GRACE_SECONDS = 0.05


# what tritonclient's parsers raise for an answer that is none: no JSON, no outputs, sizes that do not fit
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError)

SERVED_LIMITS = ("max_documents", "max_chunks", "max_field_bytes")  # parameters of a front model's configuration


class ScoringFailure(Exception):
    """A model gave no usable scores; the text is what the server said.

    reason: `timeout`, `unavailable`, `error` or `bad_scores`, as it is logged; a caller may add reasons of its own.
    refused: the request itself is wrong or not allowed, so another server would say the same; callers_fault: the model
    says that the page is wrong (too many documents, a blank query), which says nothing about the model; asked: whether
    the model was asked at all.
    """

    def __init__(
        self, reason: str, detail: str, refused: bool = False, callers_fault: bool = False, asked: bool = True
    ):
        super().__init__(detail)
        self.reason, self.refused, self.callers_fault, self.asked = reason, refused, callers_fault, asked


@dataclass(frozen=True)
class ModelScores:
    """One model's scores of a page. values: float32 [n], in the order sent; version: as the server reports it.

    probabilities: float32 [n], None from a model that has no calibration.
    """

    values: NDArray[np.float32]
    version: str
    probabilities: NDArray[np.float32] | None = None


class PageTensors:
    """The tensors of one page; each protocol's input objects are made once, however many models score the page.

    arrays: as request_tensors() or token_tensors() of ranking/request_tensors.py gives them.
    """

    def __init__(self, arrays: dict[str, NDArray[Any]]):
        self.arrays = arrays
        self._inputs: dict[tuple[bool, bool], list[Any]] = {}

    @property
    def documents(self) -> int:
        """How many documents the page has."""
        return documents_of(self.arrays)

    def inputs(self, connection: TritonConnection, with_chunks: bool = True) -> list[Any]:
        """tritonclient's input objects for that connection's protocol.

        with_chunks: False for a model that reads one chunk and so has no input for their number.
        """
        kind = connection.is_grpc, with_chunks
        if kind not in self._inputs:
            arrays = {name: array for name, array in self.arrays.items() if with_chunks or name != MAX_CHUNKS}
            self._inputs[kind] = connection.infer_inputs(arrays)
        return self._inputs[kind]


class ScoringClient:
    """Asks one server for scores, blocking. Over HTTP not for several threads at once: give each its own."""

    def __init__(self, connection: TritonConnection, deadline_ms: float):
        self.connection = connection
        self._client = connection.sync_client(deadline_ms)
        self._lost: tuple[type[Exception], ...] = (InferenceServerException, OSError, *_MALFORMED)
        if not connection.is_grpc:
            from geventhttpclient.response import HTTPParseError  # an answer that is cut off, or no HTTP

            self._lost += (HTTPParseError,)

    def score(self, model: str, page: PageTensors, deadline_ms: float, version: str = "") -> ModelScores:
        """The page's scores by a model. ScoringFailure says why there are none."""
        arguments = self.connection.infer_arguments(model, page.inputs(self.connection), deadline_ms, version)
        try:
            answer = self._client.infer(**arguments)
        except self._lost as problem:
            raise _failure(problem, deadline_ms) from problem
        return _read(answer, page.documents)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class ScoringBackend(Protocol):
    """What the router asks for scores: a Triton server's AsyncScoringClient, or a simulation's own scores."""

    renewals: int

    async def score(self, model: str, page: PageTensors, deadline_ms: float) -> ModelScores:
        """The page's scores by a model. ScoringFailure says why there are none."""
        ...

    async def served_limits(self, model: str, deadline_ms: float) -> dict[str, int]:
        """The limits that the model's server names, none if it names none. ScoringFailure if it does not say."""
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class AsyncScoringClient:
    """The same for asyncio: any number of calls may be under way. Make it inside the running loop.

    A peer that goes silent without closing the connection would never be noticed by it, so after RENEW_AFTER deadline
    misses in a row a new connection takes over. renewals: how often that happened.
    """

    def __init__(self, connection: TritonConnection, deadline_ms: float):
        import aiohttp  # here rather than in a call, where it would hold up the loop for longer than a page takes

        # TimeoutError is an OSError
        self._lost = (InferenceServerException, OSError, aiohttp.ClientError, *_MALFORMED)
        self.connection, self.renewals = connection, 0
        self._deadline_ms = deadline_ms
        self._one_chunk: set[str] = set()  # models that said so in served_limits()
        self._client = connection.async_client(deadline_ms)
        self._misses = 0
        self._closing: set[asyncio.Task] = set()  # the loop itself keeps only weak references

    async def score(self, model: str, page: PageTensors, deadline_ms: float, version: str = "") -> ModelScores:
        """The page's scores by a model. ScoringFailure says why there are none."""
        with tracing.span("infer", "client", model=model, documents=page.documents, deadline_ms=deadline_ms) as span:
            inputs = page.inputs(self.connection, with_chunks=model not in self._one_chunk)
            arguments = self.connection.infer_arguments(model, inputs, deadline_ms, version)
            try:
                async with asyncio.timeout(deadline_ms / 1000 + _GRACE_SECONDS):
                    answer = await self._client.infer(**arguments)
            except self._lost as problem:
                failure = _failure(problem, deadline_ms)
                span.set(failure=failure.reason)
                self._count_misses(failure.reason == "timeout")
                raise failure from problem
            self._count_misses(False)
            return _read(answer, page.documents)

    async def served_limits(self, model: str, deadline_ms: float) -> dict[str, int]:
        """The limits in a served model's configuration, those of SERVED_LIMITS that it names.

        A model that reads one chunk of a document is not sent `max_chunks` from then on. ScoringFailure if the server
        does not say.
        """
        try:
            async with asyncio.timeout(deadline_ms / 1000):
                answer = await self._client.get_model_config(model, headers=self.connection.credentials.headers())
            if self.connection.is_grpc:
                given = {name: value.string_value for name, value in answer.config.parameters.items()}
            else:
                given = {name: value.get("string_value", "") for name, value in answer.get("parameters", {}).items()}
            limits = {name: int(given[name]) for name in SERVED_LIMITS if given.get(name, "").isdecimal()}
        except self._lost as problem:
            raise _failure(problem, deadline_ms) from problem
        if limits.get("max_chunks", 1) > 1:  # absent in versions of earlier releases
            self._one_chunk.discard(model)
        else:
            self._one_chunk.add(model)
        return limits

    async def close(self) -> None:
        """Close the connection."""
        for task in self._closing:
            task.cancel()
        await self._client.close()

    def _count_misses(self, missed: bool) -> None:
        self._misses = self._misses + 1 if missed else 0
        if self._misses >= RENEW_AFTER:
            self._misses = 0
            self.renewals += 1
            old, self._client = self._client, self.connection.async_client(self._deadline_ms)
            task = asyncio.create_task(self._close_later(old))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close_later(self, client: Any) -> None:
        """Close once the calls under way have met their deadlines: a slow server may still answer some."""
        try:
            await asyncio.sleep(self._deadline_ms / 1000 + _GRACE_SECONDS)
        finally:
            await client.close()


def _failure(problem: Exception, deadline_ms: float) -> ScoringFailure:
    if isinstance(problem, InferenceServerException):
        status = str(problem.status())
        detail = " ".join(str(problem.message()).split())
        callers_fault = status in _BAD_PAGE and not detail.startswith(_SERVERS_OWN)
        return ScoringFailure(_REASONS.get(status, "error"), detail, status in _REFUSALS, callers_fault)
    if isinstance(problem, TimeoutError):
        return ScoringFailure("timeout", f"no answer in {deadline_ms:.0f} ms")
    text = " ".join(str(problem).split())
    if isinstance(problem, _MALFORMED):
        return ScoringFailure("error", f"the answer makes no sense: {type(problem).__name__}: {text}")
    return ScoringFailure("unavailable", text or type(problem).__name__)


def _read(answer: Any, documents: int) -> ModelScores:
    try:
        values = read_scores(answer.as_numpy(SCORE), documents)
        probabilities = read_probabilities(answer.as_numpy(PROBABILITY), documents)
        response = answer.get_response()
        version = response.get("model_version", "") if isinstance(response, dict) else response.model_version
    except _MALFORMED as problem:
        text = str(problem) if isinstance(problem, ValueError) else f"no answer of a model: {problem!r}"
        raise ScoringFailure("bad_scores", text) from problem
    return ModelScores(values, version, probabilities)
