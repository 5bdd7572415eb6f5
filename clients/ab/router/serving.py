"""What the A/B router does with a page: assign, rank with fallbacks, log, answer; and how it looks after experiments.

Router.rank is the main path. clients/ab_router.py puts it behind HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastapi import HTTPException
from starlette.background import BackgroundTask

from clients.ab.experiment.definition import Arm, Experiment
from clients.ab.experiment.file import ExperimentFile
from clients.ab.experiment.split import Assignment, bucket
from clients.ab.log import ExposureLog, Privacy
from clients.ab.router.api import (
    EventsRequest,
    RankRequest,
)
from clients.ab.router.guardrails import GuardrailWatch
from clients.ab.router.metrics import Metrics
from clients.ab.router.scoring import INCOMING, Breaker, Deadline, Page, Ranking, Scorer, rank_page
from clients.ab.router.shadow import Shadows
from ranking.limits import MAX_DOCUMENTS

log = logging.getLogger("ab_serving")


@dataclass
class Config:
    """Rank search pages by arm of an experiment, with fallbacks, and log every exposure.

    Args:
        experiment: YAML file of experiments; edits are taken up while running
        triton: gRPC address of the Triton server that holds the arms' models
        log: folder of the exposure log
        host: address to listen on; 0.0.0.0 to serve other machines
        port: port to listen on; 0 picks a free one and prints it
        deadline_ms: time for a page; whatever has not answered by then is not waited for
        arm_share: part of the deadline that the arm's own model may use; the rest is the fallback's
        max_documents: pages with more documents are refused
        max_body_mb: larger requests are refused
        salt_file: file with a secret; if given, user ids are stored as salted hashes
        queries: keep | hash | drop: what is stored of queries; hash needs --salt-file
        log_text: store titles and summaries, which training on these clicks needs
        breaker_window: recent calls of a model that its circuit breaker looks at
        breaker_failures: failures among them that open it
        breaker_cooldown_seconds: pause before an open breaker lets one page try again
        shadow_in_flight: shadow calls at a time; beyond that they are skipped and counted
        allow_forced_arm: let requests name their arm; for testing, never towards the public
        reload_seconds: how often the experiment file and the guardrails are looked at
        rotate_mb: size at which a new log file is begun
    """

    experiment: Path
    triton: str = "127.0.0.1:8001"
    log: Path = Path("runs/ab/log")
    host: str = "127.0.0.1"
    port: int = 8080
    deadline_ms: float = 200.0
    arm_share: float = 0.6
    max_documents: int = MAX_DOCUMENTS
    max_body_mb: float = 8.0
    salt_file: Path | None = None
    queries: Literal["keep", "hash", "drop"] = "keep"
    log_text: bool = True
    breaker_window: int = 20
    breaker_failures: int = 10
    breaker_cooldown_seconds: float = 2.0
    shadow_in_flight: int = 8
    allow_forced_arm: bool = False
    reload_seconds: float = 1.0
    rotate_mb: float = 64.0

    def __post_init__(self):
        for name in ("deadline_ms", "max_documents", "max_body_mb", "breaker_window", "reload_seconds", "rotate_mb"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        if not 0 < self.arm_share < 1:
            raise ValueError(
                f"arm_share is {self.arm_share}: it must be between 0 and 1, or no time is left to fall back"
            )
        if not 1 <= self.breaker_failures <= self.breaker_window:
            raise ValueError("breaker_failures must be from 1 to breaker_window")


class Router:
    """The state of one running router. Make it inside a running event loop: the gRPC channel belongs to it."""

    def __init__(self, config: Config):
        self.config = config
        self.file = ExperimentFile(config.experiment)
        self.privacy = Privacy.of_file(config.salt_file, config.queries, config.log_text)
        self.log = ExposureLog(config.log, int(config.rotate_mb * (1 << 20)))
        self.watch = GuardrailWatch(config.log)
        self.watch.adopt(self.file.current.experiments)
        self.metrics = Metrics()
        self.deadline = Deadline(config.deadline_ms / 1000, config.arm_share)
        self.scorer = Scorer(
            config.triton,
            lambda: Breaker(config.breaker_window, config.breaker_failures, config.breaker_cooldown_seconds),
            self._observe_call,
        )
        self.shadows = Shadows(self.scorer, self.metrics, self._append, config.shadow_in_flight, self.deadline.total)
        self._task: asyncio.Task | None = None

    async def start(self) -> None:
        await self._log_definitions()
        self._task = asyncio.create_task(self._look_after())

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.shadows.stop()
        await self.scorer.close()
        await asyncio.to_thread(self.log.close)

    async def rank(self, request: RankRequest, arrived: float) -> tuple[dict[str, Any], BackgroundTask | None]:
        """The answer to one page, logged, and what is to be done after it has left. arrived: time.perf_counter()."""
        assignment, experiment, arm = self._assign(request)
        page = Page(
            request.request_id or uuid.uuid4().hex,
            request.query,
            [d.title for d in request.documents],
            [d.summary for d in request.documents],
        )
        default_model = self.file.current.default_model
        ranking = await rank_page(
            self.scorer, page, arm or Arm("", default_model), default_model, self.deadline, arrived
        )
        seconds = time.perf_counter() - arrived
        self.metrics.pages.labels(assignment.experiment, assignment.arm, ranking.served_by, ranking.fallback).inc()
        self.metrics.page_seconds.labels(assignment.experiment, assignment.arm).observe(seconds)
        if experiment is not None and not assignment.forced:
            # a killed arm was taken out on purpose: that is no failure to react to
            self.watch.observe(experiment, assignment.arm, seconds, ranking.fallback not in ("", "killed"))
        shown = [request.documents[i] for i in ranking.order]
        answer = {
            "request_id": page.request_id,
            "experiment": assignment.experiment,
            "arm": assignment.arm,
            "ranking": [d.doc_id for d in shown],
            "scores": ranking.scores if ranking.served_by != INCOMING else None,
            "served_by": ranking.served_by,
            "fallback": ranking.fallback,
            "model_version": ranking.model_version,
            "latency_ms": round(seconds * 1000, 3),
        }
        answer["logged"] = await self._append(
            "exposure", self._exposure(request, answer, ranking, assignment, experiment, shown)
        )
        if (
            experiment is None
            or arm is None
            or bucket(f"shadow {experiment.name}", page.request_id) >= experiment.shadow
        ):
            return answer, None
        return answer, BackgroundTask(self.shadows.start, experiment, arm, page, answer, ranking.order)

    def _assign(self, request: RankRequest) -> tuple[Assignment, Experiment | None, Arm | None]:
        if request.arm is None:
            return self.file.current.assign(request.user_id, self.watch.splits)
        if not self.config.allow_forced_arm:
            raise HTTPException(403, "arm: this router does not let requests name their arm (--allow-forced-arm)")
        for experiment in self.file.current.experiments:
            if experiment.enabled and request.arm in experiment.split.arms:
                return Assignment(experiment.name, request.arm, forced=True), experiment, experiment.arm(request.arm)
        raise HTTPException(422, f"arm: no running experiment has an arm {request.arm!r}")

    def _exposure(self, request, answer, ranking: Ranking, assignment: Assignment, experiment, shown) -> dict[str, Any]:
        text = {"title": [d.title for d in shown], "summary": [d.summary for d in shown]} if self.privacy.text else {}
        same = ("request_id", "experiment", "arm", "served_by", "fallback", "model_version", "latency_ms")
        return {
            **{name: answer[name] for name in same},
            "user_id": self.privacy.user(request.user_id),
            "query": self.privacy.query(request.query),
            "query_length": len(request.query),
            "platform": request.platform,
            "segments": json.dumps(request.segments, ensure_ascii=False, sort_keys=True),
            "forced": assignment.forced,
            "documents": answer["ranking"],
            "scores": ranking.scores,
            "teams": ranking.teams,
            "config": experiment.fingerprint if experiment else "",
            **text,
        }

    async def take_events(self, request: EventsRequest) -> dict[str, Any]:
        """Log events; HTTPException 503 if they are not on disk, so that the caller can send them again."""
        written = await asyncio.gather(
            *(
                self._append(
                    "event",
                    {
                        "request_id": event.request_id,
                        "doc_id": event.doc_id,
                        "event": event.type,
                        "dwell_seconds": event.dwell_seconds or 0.0,
                        "timestamp": event.timestamp,
                    },
                )
                for event in request.events
            )
        )
        if not all(written):
            raise HTTPException(503, "the log cannot be written; send the events again later")
        for event in request.events:
            self.metrics.events.labels(event.type).inc()
        return {"accepted": len(written)}

    def health(self) -> dict[str, Any]:
        """What works and what does not. `degraded` still answers every page, by fallbacks or unlogged."""
        breakers = {model: "open" if b.is_open else "closed" for model, b in self.scorer.breakers.items()}
        degraded = self.file.error or self.log.failing or "open" in breakers.values() or self.watch.ramps
        current = self.file.current
        return {
            "status": "degraded" if degraded else "ok",
            "experiments": {e.name: self._coverage(e) for e in current.experiments},
            "kill_switch": current.kill_switch,
            "experiment_file_error": self.file.error,
            "log_error": self.log.failing,
            "log_failures": self.log.failures,
            "breakers": breakers,
            "ramp_downs": {name: ramp.reason for name, ramp in self.watch.ramps.items()},
        }

    def _coverage(self, experiment: Experiment) -> float:
        if not experiment.enabled or self.file.current.kill_switch:
            return 0.0
        return self.watch.splits.get(experiment.name, experiment.split).coverage

    async def _append(self, kind: str, record: dict[str, Any]) -> bool:
        started = time.perf_counter()
        written = await self.log.append(kind, record)
        self.metrics.log_seconds.observe(time.perf_counter() - started)
        if not written:
            self.metrics.log_failures.inc()
        return written

    async def _log_definitions(self) -> None:
        for experiment in self.file.current.experiments:
            record = {"fingerprint": experiment.fingerprint, "definition": json.loads(experiment.definition())}
            await self._append("config", record)

    async def _look_after(self) -> None:
        """Every reload_seconds: the experiment file, the guardrails, the gauges."""
        while True:
            try:
                await self._look_once()
            except Exception:  # whatever went wrong with one look must not end the looking, nor the serving
                log.exception("looking after the experiments failed")
            await asyncio.sleep(self.config.reload_seconds)

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
