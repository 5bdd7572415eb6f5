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
from typing import Any, Literal

from clients.ab.experiment.definition import Arm, Experiment
from clients.ab.experiment.file import ExperimentFile
from clients.ab.experiment.split import OUTSIDE, Assignment, bucket
from clients.ab.log.privacy import PrivacySettings
from clients.ab.log.records import PAGE_TEXT, complete
from clients.ab.log.writer import ExposureLog, now_microseconds
from clients.ab.router.api import Document, EventsRequest, RankRequest
from clients.ab.router.api_keys import ApiKeys
from clients.ab.router.breaker import BreakerSettings
from clients.ab.router.guarded_scorer import GuardedScorer
from clients.ab.router.guardrails import GuardrailWatch
from clients.ab.router.metrics import Metrics
from clients.ab.router.page_ranking import INCOMING, KILLED, DeadlineSettings, PageRanking, rank_page
from clients.ab.router.served_limits import ServedLimits
from clients.ab.router.shadow_scoring import ShadowScoring
from clients.triton.connection import TritonAccess, TritonConnection
from clients.triton.scoring import AsyncScoringClient, PageTensors, ScoringBackend
from ranking import tracing
from ranking.object_store import address
from ranking.request_tensors import request_tensors
from ranking.telemetry import request_id as current_request

logger = logging.getLogger("ab_router")
page_logger = logging.getLogger("ab_router.pages")  # a line for every page, where the program asks for them
page_logger.setLevel(logging.WARNING)
_OF_A_PAGE_LINE = ("experiment", "arm", "served_by", "fallback", "model_version", "latency_ms", "logged")

_TICK_SECONDS = 0.02
PENDING: Literal["pending"] = "pending"
Logged = bool | Literal["pending"]


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
        log_wait_ms: how long an answer waits for its line to be on disk; then it leaves with `logged: "pending"`
        api_keys: file of the callers' keys (docs/ab-router.md); without it everybody may ask
        log_queue_mb: lines that may wait for a slow disk; beyond that answers leave with `logged: false`
    """

    experiment: Path
    url: str = "127.0.0.1:8001"
    log: Path = Path("runs/ab/log")
    shadow_in_flight: int = 8
    allow_forced_arm: bool = False
    reload_seconds: float = 1.0
    rotate_mb: float = 64.0
    log_wait_ms: float = 500.0
    api_keys: Path | None = None
    log_queue_mb: float = 64.0

    def __post_init__(self) -> None:
        BreakerSettings.__post_init__(self)
        DeadlineSettings.__post_init__(self)
        if address(self.log):
            raise ValueError(
                f"log is {address(self.log)}: a page's line must be on disk before its answer leaves, and a "
                "store takes it later; log to a disk, and publish the days that compaction makes of it"
            )
        for name in ("reload_seconds", "rotate_mb", "log_wait_ms", "log_queue_mb"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")

    def check(self) -> None:
        """Read every file and folder that a start needs. InputError names the one that is wrong."""
        ExperimentFile(self.experiment)
        if self.api_keys is not None:
            ApiKeys(self.api_keys)
        self.privacy()
        TritonConnection(self.url, self.credentials())
        ExposureLog(self.log).close()
        GuardrailWatch(self.log)


class PageService:
    """The state of one running router. Make it inside a running event loop: the connection to Triton belongs to it.

    client: scores pages in place of the Triton server at settings.url; clock: of the log, microseconds since 1970. Both
    are for simulations, which know the scores and live through weeks in minutes.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        client: ScoringBackend | None = None,
        clock: Callable[[], int] = now_microseconds,
    ):
        self.settings = settings
        self.file = ExperimentFile(settings.experiment)
        self.privacy = settings.privacy()
        self.keys = ApiKeys(settings.api_keys) if settings.api_keys is not None else None
        self.draining = False  # set before the end: readiness goes first, then requests are finished
        self.exposure_log = ExposureLog(
            settings.log,
            int(settings.rotate_mb * (1 << 20)),
            queue_bytes=int(settings.log_queue_mb * (1 << 20)),
            clock=clock,
        )
        self.watch = GuardrailWatch(settings.log)
        self.watch.adopt(self.file.current.experiments)
        self.metrics = Metrics()
        if client is None:
            connection = TritonConnection(settings.url, settings.credentials())
            client = AsyncScoringClient(connection, settings.deadline_ms)
        self._client = client
        self.scorer = GuardedScorer(self._client, settings.new_breaker, self._observe_call)
        self.limits = ServedLimits(self._client)
        self.shadows = ShadowScoring(
            self.scorer, self.metrics, self._append, settings.shadow_in_flight, settings.deadline_ms
        )
        self._tasks: list[asyncio.Task] = []

    async def start(self) -> None:
        """Log the experiments in force and begin to look after them."""
        await self._log_definitions()
        self._tasks = [asyncio.create_task(self._look_after()), asyncio.create_task(self._watch_loop())]

    async def stop(self) -> None:
        """End what is under way and close connection and log."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.shadows.stop()
        await self.scorer.close()
        await asyncio.to_thread(self.exposure_log.close)

    async def rank(
        self, request: RankRequest, arrived: float, in_experiments: bool = True
    ) -> tuple[dict[str, Any], Callable[[], Awaitable[None]] | None]:
        """The answer to one page, logged, and what is to be awaited after it has left, if anything.

        arrived: time.perf_counter() when the whole request was there; in_experiments: False for a page whose user
        nobody knows: the default model ranks it, and it is logged like a page of a user outside every experiment.
        ForcedArmNotAllowed or UnknownArm if it names an arm, PageRefused if a model says that the page is wrong or it
        is larger than a model serves.
        """
        request_id = request.request_id or uuid.uuid4().hex
        current_request.set(request_id)
        with tracing.span("assign") as span:
            assignment, experiment, arm = self._assign(request) if in_experiments else (OUTSIDE, None, None)
            span.set(request_id=request_id, experiment=assignment.experiment, arm=assignment.arm)
        self.limits.check(request, {self.file.current.default_model, *(arm.models if arm else ())})
        titles, summaries, priors = zip(*((d.title, d.summary, d.prior) for d in request.documents))
        page = PageTensors(request_tensors(request.query, titles, summaries, priors, request.max_chunks))
        default_model = self.file.current.default_model
        chosen = arm or Arm("", default_model)
        user = request.user_id if in_experiments else ""  # nobody knows who they are: to a breaker they are one user
        ranking = await rank_page(self.scorer, page, user, request_id, chosen, default_model, self.settings, arrived)
        if request.min_probability is not None:
            ranking = ranking.at_least(request.min_probability)
        seconds = time.perf_counter() - arrived
        self.metrics.pages.labels(assignment.experiment, assignment.arm, ranking.served_by, ranking.fallback).inc()
        if experiment is not None and not assignment.forced and ranking.arm_asked:
            # a killed arm was taken out on purpose: that is no failure to react to
            fell_back = ranking.fallback not in ("", KILLED)
            self.watch.observe(experiment, assignment.arm, request.user_id, seconds, fell_back)
        shown = [request.documents[i] for i in ranking.order]
        answer = {
            "request_id": request_id,
            "experiment": assignment.experiment,
            "arm": assignment.arm,
            "ranking": [d.doc_id for d in shown],
            "scores": ranking.scores if ranking.served_by != INCOMING else None,
            "probabilities": ranking.probabilities or None,
            "left_out": len(request.documents) - len(ranking.order),
            "served_by": ranking.served_by,
            "fallback": ranking.fallback,
            "model_version": ranking.model_version,
            "latency_ms": round(seconds * 1000, 3),
        }
        fingerprint = experiment.fingerprint if experiment else ""
        record = self._exposure(request, answer, ranking, assignment.forced, fingerprint, shown)
        answer["logged"] = await self._append("exposure", [record])
        seconds = time.perf_counter() - arrived  # what the caller waited for, the disk included
        answer["latency_ms"] = round(seconds * 1000, 3)
        self.metrics.page_seconds.labels(assignment.experiment, assignment.arm).observe(seconds)
        if page_logger.isEnabledFor(logging.INFO):
            fields = {name: answer[name] for name in _OF_A_PAGE_LINE}
            page_logger.info("page ranked", extra={"fields": fields})
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
            "segments": json.dumps(self.privacy.segment_values(request.segments), ensure_ascii=False, sort_keys=True),
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
        written = await self._append("event", [complete("event", record) for record in records])
        if written is not True:
            why = "is slow" if written else "cannot be written"
            raise LogUnavailable(f"the log {why}; send the events again later, twice does no harm")
        for event in request.events:
            self.metrics.events.labels(event.type).inc()
        return {"accepted": len(records)}

    def health(self) -> dict[str, Any]:
        """What works and what does not. `degraded` still answers every page, by fallbacks or unlogged."""
        breakers = {model: "open" if b.is_open else "closed" for model, b in self.scorer.breakers.items()}
        log = self.exposure_log
        slow = log.stalled_seconds * 1000 > self.settings.log_wait_ms
        file_error = self.file.error or (self.keys.error if self.keys else "")
        degraded = file_error or log.failing or slow or "open" in breakers.values() or self.watch.ramps
        current = self.file.current
        return {
            "status": "degraded" if degraded else "ok",
            "experiments": {e.name: self._coverage(e) for e in current.experiments},
            "kill_switch": current.kill_switch,
            "experiment_file_error": self.file.error,
            "api_keys_error": self.keys.error if self.keys else "",
            "log_error": log.failing or (f"a write takes {log.stalled_seconds:.1f} s already" if slow else ""),
            "log_failures": log.failures,
            "log_waiting": log.waiting_records,
            "breakers": breakers,
            "ramp_downs": {name: ramp.reason for name, ramp in self.watch.ramps.items()},
        }

    def _coverage(self, experiment: Experiment) -> float:
        if not experiment.enabled or self.file.current.kill_switch:
            return 0.0
        return self.watch.splits.get(experiment.name, experiment.split).coverage

    def refresh_gauges(self) -> None:
        """Set the metrics that follow the log, the connection and the experiments, as they are now."""
        self.metrics.follow("log_failures", self.exposure_log.failures)
        self.metrics.follow("renewals", self._client.renewals)
        self.metrics.follow("spans_dropped", tracing.dropped())
        self.metrics.log_waiting.set(self.exposure_log.waiting_records)
        self.metrics.log_stalled.set(self.exposure_log.stalled_seconds)
        self.metrics.file_errors.set(bool(self.file.error or (self.keys and self.keys.error)))
        self.metrics.coverage.clear()  # of experiments that are gone
        for experiment in self.file.current.experiments:
            self.metrics.coverage.labels(experiment.name).set(self._coverage(experiment))
        for model, breaker in self.scorer.breakers.items():
            self.metrics.breaker_open.labels(model).set(breaker.is_open)

    async def _append(self, kind: str, records: list[dict[str, Any]]) -> Logged:
        """Log records of a kind: True, False, or PENDING if the disk takes longer than an answer waits for it."""
        started = time.perf_counter()
        written: Logged = PENDING
        with tracing.span("log", kind_of_record=kind) as span:
            try:
                async with asyncio.timeout(self.settings.log_wait_ms / 1000):
                    written = await self.exposure_log.append_all(kind, records)
            except TimeoutError:
                self.metrics.log_pending.inc(len(records))
            span.set(logged=written)
        self.metrics.log_seconds.observe(time.perf_counter() - started)
        return written

    async def _log_definitions(self) -> None:
        for experiment in self.file.current.experiments:
            definition = self.privacy.definition(json.loads(experiment.definition()))
            record = {"fingerprint": experiment.fingerprint, "definition": definition}
            await self._append("config", [record])

    async def _look_after(self) -> None:
        """Take up the experiment file, judge the guardrails and set the gauges, every reload_seconds."""
        while True:
            try:
                await self._look_once()
            except Exception:  # one failure must not end the watch over the experiments, nor the serving of pages
                logger.exception("looking after the experiments failed")
            await asyncio.sleep(self.settings.reload_seconds)

    async def _watch_loop(self) -> None:
        """Measure for how long the event loop takes no turn because it is busy: nobody is answered meanwhile."""
        longest = 0.0
        while True:
            due, used = time.perf_counter() + _TICK_SECONDS, time.thread_time()
            await asyncio.sleep(_TICK_SECONDS)
            # late and busy: a machine that gave the time to others makes late, but that is no pause of this program
            pause = max(0.0, min(time.perf_counter() - due, time.thread_time() - used))
            self.metrics.loop_pause.observe(pause)
            if pause > longest:
                longest = pause
                self.metrics.longest_pause.set(longest)

    async def _look_once(self) -> None:
        if self.keys is not None:
            self.keys.reload()
        if self.file.reload():
            self.watch.adopt(self.file.current.experiments)
            await self._log_definitions()
        for ramp in self.watch.judge(self.file.current.experiments):
            self.metrics.ramp_downs.labels(ramp.experiment, ramp.arm).inc()
            same = {"experiment": ramp.experiment, "arm": ramp.arm, "reason": ramp.reason}
            await self._append("ramp", [{**same, "before": ramp.before, "after": ramp.after}])
        self.refresh_gauges()
        await self.limits.refresh(self.file.current.models)

    def _observe_call(self, model: str, seconds: float, failure: str) -> None:
        self.metrics.model_calls.labels(model, failure or "ok").inc()
        self.metrics.model_seconds.labels(model).observe(seconds)
