"""The router's service: assign a page's arm, rank it, log it, answer; take clicks; look after the experiments
meanwhile.

PageService.rank is the main path. clients/ab/router/http_app.py puts it behind HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clients.ab.experiment.definition import Arm, Experiment
from clients.ab.experiment.file import ExperimentFile
from clients.ab.experiment.split import Assignment, bucket
from clients.ab.log.privacy import PrivacySettings
from clients.ab.log.records import PAGE_TEXT, complete
from clients.ab.log.writer import ExposureLog
from clients.ab.router.api import Document, EventsRequest, RankRequest
from clients.ab.router.breaker import BreakerSettings
from clients.ab.router.guarded_scorer import GuardedScorer
from clients.ab.router.guardrails import GuardrailWatch
from clients.ab.router.metrics import Metrics
from clients.ab.router.page_ranking import INCOMING, KILLED, DeadlineSettings, PageRanking, rank_page
from clients.ab.router.shadow_scoring import ShadowScoring
from clients.triton.connection import TritonAccess, TritonConnection
from clients.triton.scoring import AsyncScoringClient, PageTensors
from ranking.request_tensors import request_tensors

logger = logging.getLogger("ab_router")


class ForcedArmNotAllowed(Exception):
    """The request names its arm, and this router does not let requests do so."""


class UnknownArm(Exception):
    """The request names an arm that no running experiment has."""


class LogUnavailable(Exception):
    """The events are not on disk; the caller should send them again later."""


@dataclass(kw_only=True)
class ServiceSettings(TritonAccess, PrivacySettings, BreakerSettings, DeadlineSettings):
    """What the service needs, beside the groups of its parts.

    Args:
        experiment: YAML file of experiments; edits are taken up while running
        url: Triton server that holds the arms' models; scheme grpc, grpcs, http or https (none means grpc)
        log: folder of the exposure log
        shadow_in_flight: shadow calls at a time; beyond that they are skipped and counted
        allow_forced_arm: let requests name their arm; for testing, never towards the public
        reload_seconds: how often the experiment file and the guardrails are looked at
        rotate_mb: size at which a new log file is begun
    """

    experiment: Path
    url: str = "127.0.0.1:8001"
    log: Path = Path("runs/ab/log")
    shadow_in_flight: int = 8
    allow_forced_arm: bool = False
    reload_seconds: float = 1.0
    rotate_mb: float = 64.0

    def __post_init__(self) -> None:
        BreakerSettings.__post_init__(self)
        DeadlineSettings.__post_init__(self)
        for name in ("reload_seconds", "rotate_mb"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")

    def check(self) -> None:
        """Read every file and folder that a start needs. InputError names the one that is wrong."""
        ExperimentFile(self.experiment)
        self.privacy()
        TritonConnection(self.url, self.credentials())
        ExposureLog(self.log).close()
        GuardrailWatch(self.log)


class PageService:
    """The state of one running router. Make it inside a running event loop: the connection to Triton belongs to it."""

    def __init__(self, settings: ServiceSettings):
        self.settings = settings
        self.file = ExperimentFile(settings.experiment)
        self.privacy = settings.privacy()
        self.exposure_log = ExposureLog(settings.log, int(settings.rotate_mb * (1 << 20)))
        self.watch = GuardrailWatch(settings.log)
        self.watch.adopt(self.file.current.experiments)
        self.metrics = Metrics()
        connection = TritonConnection(settings.url, settings.credentials())
        client = AsyncScoringClient(connection, settings.deadline_ms)
        self.scorer = GuardedScorer(client, settings.new_breaker, self._observe_call)
        self.shadows = ShadowScoring(
            self.scorer, self.metrics, self._append, settings.shadow_in_flight, settings.deadline_ms
        )
        self._task: asyncio.Task | None = None

    async def start(self) -> None:
        """Log the experiments in force and begin to look after them."""
        await self._log_definitions()
        self._task = asyncio.create_task(self._look_after())

    async def stop(self) -> None:
        """End what is under way and close connection and log."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.shadows.stop()
        await self.scorer.close()
        await asyncio.to_thread(self.exposure_log.close)

    async def rank(
        self, request: RankRequest, arrived: float
    ) -> tuple[dict[str, Any], Callable[[], Awaitable[None]] | None]:
        """The answer to one page, logged, and what is to be awaited after it has left, if anything.

        arrived: time.perf_counter() when the request came in. ForcedArmNotAllowed or UnknownArm if it names an arm.
        """
        assignment, experiment, arm = self._assign(request)
        request_id = request.request_id or uuid.uuid4().hex
        titles, summaries, priors = zip(*((d.title, d.summary, d.prior) for d in request.documents))
        page = PageTensors(request_tensors(request.query, titles, summaries, priors))
        default_model = self.file.current.default_model
        ranking = await rank_page(
            self.scorer, page, request_id, arm or Arm("", default_model), default_model, self.settings, arrived
        )
        seconds = time.perf_counter() - arrived
        self.metrics.pages.labels(assignment.experiment, assignment.arm, ranking.served_by, ranking.fallback).inc()
        self.metrics.page_seconds.labels(assignment.experiment, assignment.arm).observe(seconds)
        if experiment is not None and not assignment.forced:
            # a killed arm was taken out on purpose: that is no failure to react to
            self.watch.observe(experiment, assignment.arm, seconds, ranking.fallback not in ("", KILLED))
        shown = [request.documents[i] for i in ranking.order]
        answer = {
            "request_id": request_id,
            "experiment": assignment.experiment,
            "arm": assignment.arm,
            "ranking": [d.doc_id for d in shown],
            "scores": ranking.scores if ranking.served_by != INCOMING else None,
            "served_by": ranking.served_by,
            "fallback": ranking.fallback,
            "model_version": ranking.model_version,
            "latency_ms": round(seconds * 1000, 3),
        }
        fingerprint = experiment.fingerprint if experiment else ""
        record = self._exposure(request, answer, ranking, assignment.forced, fingerprint, shown)
        answer["logged"] = await self._append("exposure", record)
        if experiment is None or arm is None or bucket(f"shadow {experiment.name}", request_id) >= experiment.shadow:
            return answer, None
        return answer, partial(self.shadows.start, experiment, arm, page, answer, ranking.order)

    def _assign(self, request: RankRequest) -> tuple[Assignment, Experiment | None, Arm | None]:
        if request.arm is None:
            return self.file.current.assign(request.user_id, self.watch.splits)
        if not self.settings.allow_forced_arm:
            raise ForcedArmNotAllowed("arm: this router does not let requests name their arm (--allow-forced-arm)")
        for experiment in self.file.current.experiments:
            if experiment.enabled and request.arm in experiment.split.arms:
                return Assignment(experiment.name, request.arm, forced=True), experiment, experiment.arm(request.arm)
        raise UnknownArm(f"arm: no running experiment has an arm {request.arm!r}")

    def _exposure(
        self,
        request: RankRequest,
        answer: dict[str, Any],
        ranking: PageRanking,
        forced: bool,
        fingerprint: str,
        shown: list[Document],
    ) -> dict[str, Any]:
        """The record of a page; its columns are those of the table `exposures` (clients/ab/log/records.py)."""
        same = ("request_id", "experiment", "arm", "served_by", "fallback", "model_version", "latency_ms")
        record = {
            **{name: answer[name] for name in same},
            "user_id": self.privacy.user(request.user_id),
            "query": self.privacy.query(request.query),
            "query_length": len(request.query),
            "platform": request.platform,
            "segments": json.dumps(request.segments, ensure_ascii=False, sort_keys=True),
            "forced": forced,
            "documents": answer["ranking"],
            "scores": ranking.scores,
            "teams": ranking.teams,
            "config": fingerprint,
        }
        if self.privacy.text:
            record |= {name: [getattr(document, name) for document in shown] for name in PAGE_TEXT}
        return complete("exposure", record)

    async def take_events(self, request: EventsRequest) -> dict[str, Any]:
        """Log events; LogUnavailable if they are not on disk, so that the caller can send them again."""
        records = [
            {
                "request_id": event.request_id,
                "doc_id": event.doc_id,
                "event": event.type,
                "dwell_seconds": event.dwell_seconds or 0.0,
                "timestamp": event.timestamp,
            }
            for event in request.events
        ]
        written = await asyncio.gather(*(self._append("event", complete("event", record)) for record in records))
        if not all(written):
            raise LogUnavailable("the log cannot be written; send the events again later")
        for event in request.events:
            self.metrics.events.labels(event.type).inc()
        return {"accepted": len(written)}

    def health(self) -> dict[str, Any]:
        """What works and what does not. `degraded` still answers every page, by fallbacks or unlogged."""
        breakers = {model: "open" if b.is_open else "closed" for model, b in self.scorer.breakers.items()}
        degraded = self.file.error or self.exposure_log.failing or "open" in breakers.values() or self.watch.ramps
        current = self.file.current
        return {
            "status": "degraded" if degraded else "ok",
            "experiments": {e.name: self._coverage(e) for e in current.experiments},
            "kill_switch": current.kill_switch,
            "experiment_file_error": self.file.error,
            "log_error": self.exposure_log.failing,
            "log_failures": self.exposure_log.failures,
            "breakers": breakers,
            "ramp_downs": {name: ramp.reason for name, ramp in self.watch.ramps.items()},
        }

    def _coverage(self, experiment: Experiment) -> float:
        if not experiment.enabled or self.file.current.kill_switch:
            return 0.0
        return self.watch.splits.get(experiment.name, experiment.split).coverage

    async def _append(self, kind: str, record: dict[str, Any]) -> bool:
        started = time.perf_counter()
        written = await self.exposure_log.append(kind, record)
        self.metrics.log_seconds.observe(time.perf_counter() - started)
        if not written:
            self.metrics.log_failures.inc()
        return written

    async def _log_definitions(self) -> None:
        for experiment in self.file.current.experiments:
            record = {"fingerprint": experiment.fingerprint, "definition": json.loads(experiment.definition())}
            await self._append("config", record)

    async def _look_after(self) -> None:
        """Take up the experiment file, judge the guardrails and set the gauges, every reload_seconds."""
        while True:
            try:
                await self._look_once()
            except Exception:  # one failure must not end the watch over the experiments, nor the serving of pages
                logger.exception("looking after the experiments failed")
            await asyncio.sleep(self.settings.reload_seconds)

    async def _look_once(self) -> None:
        if self.file.reload():
            self.watch.adopt(self.file.current.experiments)
            await self._log_definitions()
        for ramp in self.watch.judge(self.file.current.experiments):
            self.metrics.ramp_downs.labels(ramp.experiment, ramp.arm).inc()
            same = {"experiment": ramp.experiment, "arm": ramp.arm, "reason": ramp.reason}
            await self._append("ramp", {**same, "before": ramp.before, "after": ramp.after})
        self.metrics.file_errors.set(bool(self.file.error))
        for experiment in self.file.current.experiments:
            self.metrics.coverage.labels(experiment.name).set(self._coverage(experiment))
        for model, breaker in self.scorer.breakers.items():
            self.metrics.breaker_open.labels(model).set(breaker.is_open)

    def _observe_call(self, model: str, seconds: float, failure: str) -> None:
        self.metrics.model_calls.labels(model, failure or "ok").inc()
        self.metrics.model_seconds.labels(model).observe(seconds)
