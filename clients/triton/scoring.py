"""Ask a Triton server for the scores of a page: one call with a deadline, and one kind of failure with its reason."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from clients.triton.connection import TritonConnection
from ranking.request_tensors import SCORE, read_scores

# gRPC and HTTP name the same refusal differently
_REASONS = {
    "StatusCode.DEADLINE_EXCEEDED": "timeout",
    "StatusCode.CANCELLED": "timeout",
    "StatusCode.UNAVAILABLE": "unavailable",
    "StatusCode.NOT_FOUND": "unavailable",
    "404": "unavailable",
    "503": "unavailable",
}
_REFUSALS = {
    "StatusCode.INVALID_ARGUMENT",
    "400",
    "StatusCode.UNAUTHENTICATED",
    "401",
    "StatusCode.PERMISSION_DENIED",
    "403",
}
# asyncio's deadline is only for a channel that hangs before gRPC starts to count the request's own
_GRACE_SECONDS = 0.05


class ScoringFailure(Exception):
    """A model gave no usable scores; the text is what the server said.

    reason: `timeout`, `unavailable`, `error` or `bad_scores`, as it is logged; a caller may add reasons of its own.
    refused: the request itself is wrong or not allowed, so another server would say the same.
    """

    def __init__(self, reason: str, detail: str, refused: bool = False):
        super().__init__(detail)
        self.reason, self.refused = reason, refused


@dataclass(frozen=True)
class ModelScores:
    """One model's scores of a page. values: float32 [n], in the order sent; version: as the server reports it."""

    values: NDArray[np.float32]
    version: str


class PageTensors:
    """The tensors of one page; each protocol's input objects are made once, however many models score the page.

    arrays: as ranking.request_tensors.request_tensors gives them.
    """

    def __init__(self, arrays: dict[str, NDArray[Any]]):
        self.arrays = arrays
        self._inputs: dict[bool, list[Any]] = {}

    @property
    def documents(self) -> int:
        """How many documents the page has."""
        return len(self.arrays["title"])

    def inputs(self, connection: TritonConnection) -> list[Any]:
        """tritonclient's input objects for that connection's protocol."""
        if connection.is_grpc not in self._inputs:
            self._inputs[connection.is_grpc] = connection.infer_inputs(self.arrays)
        return self._inputs[connection.is_grpc]


class ScoringClient:
    """Asks one server for scores, blocking. Over HTTP not for several threads at once: give each its own."""

    def __init__(self, connection: TritonConnection, deadline_ms: float):
        self.connection = connection
        self._client = connection.sync_client(deadline_ms)

    def score(self, model: str, page: PageTensors, deadline_ms: float, version: str = "") -> ModelScores:
        """The page's scores by a model. ScoringFailure says why there are none."""
        arguments = self.connection.infer_arguments(model, page.inputs(self.connection), deadline_ms, version)
        try:
            answer = self._client.infer(**arguments)
        except (InferenceServerException, OSError) as problem:
            raise _failure(problem, deadline_ms) from problem
        return _read(answer, page.documents)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class AsyncScoringClient:
    """The same for asyncio: any number of calls may be under way. Make it inside the running loop."""

    def __init__(self, connection: TritonConnection, deadline_ms: float):
        self.connection = connection
        self._client = connection.async_client(deadline_ms)

    async def score(self, model: str, page: PageTensors, deadline_ms: float, version: str = "") -> ModelScores:
        """The page's scores by a model. ScoringFailure says why there are none."""
        import aiohttp

        arguments = self.connection.infer_arguments(model, page.inputs(self.connection), deadline_ms, version)
        try:
            async with asyncio.timeout(deadline_ms / 1000 + _GRACE_SECONDS):
                answer = await self._client.infer(**arguments)
        except (InferenceServerException, OSError, aiohttp.ClientError) as problem:  # TimeoutError is an OSError
            raise _failure(problem, deadline_ms) from problem
        return _read(answer, page.documents)

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()


def _failure(problem: Exception, deadline_ms: float) -> ScoringFailure:
    if isinstance(problem, InferenceServerException):
        status = str(problem.status())
        detail = " ".join(str(problem.message()).split())
        return ScoringFailure(_REASONS.get(status, "error"), detail, refused=status in _REFUSALS)
    if isinstance(problem, TimeoutError):
        return ScoringFailure("timeout", f"no answer in {deadline_ms:.0f} ms")
    return ScoringFailure("unavailable", " ".join(str(problem).split()) or type(problem).__name__)


def _read(answer: Any, documents: int) -> ModelScores:
    try:
        values = read_scores(answer.as_numpy(SCORE), documents)
    except ValueError as problem:
        raise ScoringFailure("bad_scores", str(problem)) from problem
    response = answer.get_response()
    version = response.get("model_version", "") if isinstance(response, dict) else response.model_version
    return ModelScores(values, version)
