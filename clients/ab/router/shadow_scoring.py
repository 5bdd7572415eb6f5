"""Shadow mode: after a page's answer has left, the other arms' models score it too; nobody waits, nothing is shown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from clients.ab.experiment.definition import Arm, Experiment
from clients.ab.log.records import complete
from clients.ab.router.guarded_scorer import GuardedScorer
from clients.ab.router.metrics import Metrics
from clients.triton.scoring import PageTensors, ScoringFailure


class ShadowScoring:
    """Runs shadow calls, at most `in_flight` at a time; beyond that they are skipped and counted, never queued.

    append: writes records of a kind to the log; deadline_ms: time that a shadow call may take.
    """

    def __init__(
        self,
        scorer: GuardedScorer,
        metrics: Metrics,
        append: Callable[[str, list[dict[str, Any]]], Awaitable[object]],
        in_flight: int,
        deadline_ms: float,
    ):
        self._scorer, self._metrics, self._append = scorer, metrics, append
        self._in_flight, self._deadline_ms = in_flight, deadline_ms
        self._tasks: set[asyncio.Task] = set()  # the loop itself keeps only weak references

    async def start(
        self, experiment: Experiment, arm: Arm, page: PageTensors, answer: dict[str, Any], order: list[int]
    ) -> None:
        """Start one call per model of the experiment that the arm does not use. Returns at once.

        answer: what the caller was told; order: indices of the incoming documents as they were shown.
        """
        for model in sorted({m for other in experiment.arms for m in other.models} - set(arm.models)):
            if len(self._tasks) >= self._in_flight:
                self._metrics.shadows.labels(model, "skipped").inc()
                continue
            task = asyncio.create_task(self._score(model, page, answer, order))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Cancel the calls that are under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _score(self, model: str, page: PageTensors, answer: dict[str, Any], order: list[int]) -> None:
        started, failure, scores = time.perf_counter(), "", []
        try:
            scored = await self._scorer.score(model, page, self._deadline_ms, user=None)
            scores = scored.values[order].tolist()
        except ScoringFailure as problem:
            failure = problem.reason
        self._metrics.shadows.labels(model, failure or "ok").inc()
        record = {
            **{name: answer[name] for name in ("request_id", "experiment", "arm")},
            "model": model,
            "failure": failure,
            "latency_ms": (time.perf_counter() - started) * 1000,
            "documents": answer["ranking"],
            "scores": scores,
        }
        await self._append("shadow", [complete("shadow", record)])
