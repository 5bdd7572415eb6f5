"""The A/B router: ranks each page by its user's arm, always answers, and logs what was shown before the answer leaves.

    python clients/ab_router.py --experiment clients/experiments/example.yaml --triton 127.0.0.1:8001 --log runs/ab/log

POST /rank, POST /events, GET /health, GET /metrics, GET /docs (docs/ab-router.md). `Router.rank` is the main path;
services with an HTTP server of their own use clients/ab/experiment/split.py, ab_scoring.py and ab_log.py directly.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from clients.ab.experiment.file import ExperimentFile
from clients.ab.log import ExposureLog, Privacy
from clients.ab.router.api import (
    EventsAnswer,
    EventsRequest,
    RankAnswer,
    RankRequest,
    body_of,
    describe,
    parse_body,
    read_body,
)
from clients.ab.router.guardrails import GuardrailWatch
from clients.ab.router.serving import Config, Router
from ranking.program import run

log = logging.getLogger("ab_router")


def create_app(config: Config) -> FastAPI:
    """The router as an ASGI application. `app.state.router` is the Router once it has started."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.router = router = Router(config)
        await router.start()
        yield
        await router.stop()

    app = FastAPI(title="DisRanker A/B router", version="1", description=__doc__ or "", lifespan=lifespan)
    describe(app, RankRequest, EventsRequest)
    limit = int(config.max_body_mb * (1 << 20))

    @app.post("/rank", response_model=RankAnswer, openapi_extra=body_of(RankRequest))
    async def rank(request: Request) -> Response:
        """Rank a page by its user's arm. Always answers within the deadline."""
        arrived = time.perf_counter()
        body = parse_body(RankRequest, await read_body(request, limit))
        if len(body.documents) > config.max_documents:
            raise HTTPException(422, f"documents: {len(body.documents)} are given, {config.max_documents} are allowed")
        answer, after = await app.state.router.rank(body, arrived)
        return Response(_json(answer), media_type="application/json", background=after)

    @app.post("/events", response_model=EventsAnswer, openapi_extra=body_of(EventsRequest))
    async def events(request: Request) -> Response:
        """Take clicks and dwell times; they are on disk when this answers."""
        body = parse_body(EventsRequest, await read_body(request, limit))
        return Response(_json(await app.state.router.take_events(body)), media_type="application/json")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """`ok`, or `degraded` with what is wrong. Both answer pages, so both are 200."""
        return app.state.router.health()

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(app.state.router.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, problem: HTTPException) -> JSONResponse:
        app.state.router.metrics.refused.labels(problem.status_code).inc()
        return JSONResponse({"detail": problem.detail}, problem.status_code)

    return app


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


class _Server(uvicorn.Server):
    """Says where it listens once it does: with --port 0 nobody could know."""

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            log.info("listening on http://%s:%d", host, port)


def main(config: Config) -> int:
    ExperimentFile(config.experiment)  # a bad file, folder or salt is one line here rather than a trace from the server
    Privacy.of_file(config.salt_file, config.queries, config.log_text)
    ExposureLog(config.log).close()
    GuardrailWatch(config.log)
    # the log's thread must not wait five milliseconds, Python's default, for its turn after the disk has answered
    sys.setswitchinterval(0.0005)
    settings = uvicorn.Config(
        create_app(config),
        config.host,
        config.port,
        log_config=None,
        access_log=False,
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=10,
    )
    server = _Server(settings)
    with suppress(KeyboardInterrupt):
        server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    run(main, Config, example="python clients/ab_router.py --experiment clients/experiments/example.yaml")
