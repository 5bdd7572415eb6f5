"""Scores from Triton within a deadline, and what to show when they do not come: default model, then the incoming order.

rank_page() is the main path. A model that keeps failing is left alone for a while (Breaker), so that its users do not
wait for it; it is asked again by one page at a time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import tritonclient.grpc.aio as grpc_aio
from tritonclient.grpc import InferInput
from tritonclient.utils import InferenceServerException

from clients.ab.experiment.definition import Arm
from clients.ab.experiment.interleaving import team_draft

log = logging.getLogger("ab_scoring")

INCOMING = "incoming"
INTERLEAVED = "interleaved"
FAILURES = ("timeout", "unavailable", "error", "bad_scores", "breaker_open", "killed")

# gRPC waits up to two minutes before it tries a lost server again; a router must notice its return at once
_CHANNEL = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]
_REASONS = {
    "StatusCode.DEADLINE_EXCEEDED": "timeout",
    "StatusCode.CANCELLED": "timeout",
    "StatusCode.UNAVAILABLE": "unavailable",
    "StatusCode.NOT_FOUND": "unavailable",
}


class ScoringFailure(Exception):
    """A model gave no usable scores. reason: one of FAILURES; the text is what the server said."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Scores:
    """scores: float32 [n], in the incoming order; version: as the server reports it."""

    values: np.ndarray
    version: str


class Breaker:
    """Leaves a model alone after `failures` of its last `window` calls failed; lets one call through every `cooldown` s."""

    def __init__(
        self, window: int = 20, failures: int = 10, cooldown: float = 2.0, clock: Callable[[], float] = time.monotonic
    ):
        self.failures, self.cooldown, self._clock = failures, cooldown, clock
        self._outcomes: deque[bool] = deque(maxlen=window)
        self._open_until: float | None = None
        self._probing = False

    @property
    def is_open(self) -> bool:
        return self._open_until is not None

    def admits(self) -> bool:
        """Whether a call may be made now. While open: one probe at a time, once the cooldown is over."""
        if self._open_until is None:
            return True
        if self._probing or self._clock() < self._open_until:
            return False
        self._probing = True
        return True

    def report(self, succeeded: bool) -> None:
        """The outcome of a call that was admitted."""
        if self._open_until is not None:
            if not self._probing:
                return  # a straggler from before it opened says nothing about now
            self._probing = False
            if succeeded:
                self._open_until = None
                self._outcomes.clear()
            else:
                self._open_until = self._clock() + self.cooldown
            return
        self._outcomes.append(succeeded)
        if self._outcomes.count(False) >= self.failures:
            self._open_until = self._clock() + self.cooldown


@dataclass
class Page:
    """One request's documents; inputs are made once however many models score them."""

    request_id: str
    query: str
    titles: Sequence[str]
    summaries: Sequence[str]
    _inputs: list[InferInput] | None = field(default=None, repr=False)

    def inputs(self) -> list[InferInput]:
        if self._inputs is None:
            self._inputs = [
                _bytes_input("query", [self.query]),
                _bytes_input("title", self.titles),
                _bytes_input("summary", self.summaries),
            ]
        return self._inputs


def _bytes_input(name: str, texts: Sequence[str]) -> InferInput:
    values = np.empty(len(texts), dtype=object)
    values[:] = [text.encode("utf-8", "replace") for text in texts]
    tensor = InferInput(name, [len(texts)], "BYTES")
    tensor.set_data_from_numpy(values)
    return tensor


class Scorer:
    """Asks one Triton endpoint for scores. observe: called with (model, seconds, failure reason or "") after every call."""

    def __init__(
        self,
        address: str,
        new_breaker: Callable[[], Breaker] = Breaker,
        observe: Callable[[str, float, str], None] = lambda model, seconds, failure: None,
    ):
        self._client = grpc_aio.InferenceServerClient(address, channel_args=_CHANNEL)
        self._new_breaker, self._observe = new_breaker, observe
        self.breakers: dict[str, Breaker] = {}

    async def close(self) -> None:
        await self._client.close()

    async def score(self, model: str, page: Page, timeout: float, guarded: bool = True) -> Scores:
        """Scores of a page by a model within `timeout` seconds. ScoringFailure says why there are none.

        guarded: heed and feed the model's breaker; shadow calls do neither, since they are nobody's answer.
        """
        if timeout <= 0:  # says nothing about the model, so its breaker does not hear of it
            raise ScoringFailure("timeout", "no time left")
        breaker = self.breakers.get(model)
        if breaker is None:
            breaker = self.breakers[model] = self._new_breaker()
        if guarded and not breaker.admits():
            raise ScoringFailure("breaker_open", f"{model} failed too often and is left alone for a moment")
        started, failure = time.perf_counter(), "error"
        try:
            scores = await self._ask(model, page, timeout)
            failure = ""
            return scores
        except ScoringFailure as problem:
            failure = problem.reason
            raise
        finally:  # also when the task is cancelled: a probe must not stay out for ever
            if guarded:
                was_open = breaker.is_open
                breaker.report(not failure)
                if breaker.is_open != was_open:
                    log.warning("breaker of %s %s", model, "opened" if breaker.is_open else "closed")
            self._observe(model, time.perf_counter() - started, failure)

    async def _ask(self, model: str, page: Page, timeout: float) -> Scores:
        try:
            # gRPC keeps the deadline; the outer one is for a channel that hangs before it starts to count
            async with asyncio.timeout(timeout + 0.05):
                result = await self._client.infer(model, page.inputs(), client_timeout=timeout)
        except TimeoutError as problem:
            raise ScoringFailure("timeout", f"no answer in {timeout * 1000:.0f} ms") from problem
        except InferenceServerException as problem:
            reason = _REASONS.get(str(problem.status()), "error")
            raise ScoringFailure(reason, str(problem.message())) from problem
        values = result.as_numpy("score")
        if values is None or values.shape != (len(page.titles),) or values.dtype.kind != "f":
            found = "no score tensor" if values is None else f"{values.dtype} scores of shape {list(values.shape)}"
            raise ScoringFailure("bad_scores", f"{found} for {len(page.titles)} documents")
        if not np.isfinite(values).all():
            raise ScoringFailure("bad_scores", "a score is NaN or infinite")
        return Scores(values, result.get_response().model_version)


@dataclass(frozen=True)
class Ranking:
    """What is shown. order: indices of the incoming documents, best first; scores, teams: in that order or empty."""

    order: list[int]
    scores: list[float]
    served_by: str
    fallback: str = ""
    model_version: str = ""
    teams: list[str] = field(default_factory=list)


def descending(values: np.ndarray) -> list[int]:
    """Indices by falling score; ties keep the incoming order."""
    return np.argsort(-values, kind="stable").tolist()


@dataclass(frozen=True)
class Deadline:
    """total: seconds for a page; arm_share: the part that the arm's own model may use while a fallback still has to fit."""

    total: float = 0.2
    arm_share: float = 0.6


async def rank_page(
    scorer: Scorer, page: Page, arm: Arm, default_model: str, deadline: Deadline, arrived: float
) -> Ranking:
    """Rank by the arm, else by the default model, else leave the incoming order. Never raises ScoringFailure.

    arrived: time.perf_counter() when the request came in; the deadline counts from there.
    """
    end = arrived + deadline.total
    failure = "killed" if arm.killed else ""
    known: dict[str, Scores | ScoringFailure] = {}
    if not failure:
        only_default = arm.models == (default_model,)
        budget = deadline.total if only_default else deadline.total * deadline.arm_share
        known = await _score_all(scorer, arm.models, page, budget - (time.perf_counter() - arrived))
        failure = next((s.reason for s in known.values() if isinstance(s, ScoringFailure)), "")
        if not failure:
            return _served(page, arm, [s for s in known.values() if isinstance(s, Scores)])
    if default_model not in known:
        known |= await _score_all(scorer, (default_model,), page, end - time.perf_counter())
    stand_in = known[default_model]
    if isinstance(stand_in, Scores):
        return _served(page, Arm(arm.name, default_model), [stand_in], failure)
    return Ranking(list(range(len(page.titles))), [], INCOMING, failure)


async def _score_all(
    scorer: Scorer, models: Sequence[str], page: Page, timeout: float
) -> dict[str, Scores | ScoringFailure]:
    async def one(model: str) -> Scores | ScoringFailure:
        try:
            return await scorer.score(model, page, timeout)
        except ScoringFailure as problem:
            return problem

    if len(models) == 1:  # the usual case needs no further task
        return {models[0]: await one(models[0])}
    return dict(zip(models, await asyncio.gather(*map(one, models))))


def _served(page: Page, arm: Arm, scored: list[Scores], fallback: str = "") -> Ranking:
    if not arm.interleave:
        order = descending(scored[0].values)
        return Ranking(order, scored[0].values[order].tolist(), arm.model, fallback, scored[0].version)
    order, teams = team_draft(descending(scored[0].values), descending(scored[1].values), page.request_id)
    return Ranking(
        order,
        [float(scored[team].values[i]) for i, team in zip(order, teams)],
        INTERLEAVED,
        fallback,
        ",".join(f"{model}:{s.version}" for model, s in zip(arm.models, scored)),
        [arm.models[team] for team in teams],
    )
