"""The router behind HTTP: its own paths, status codes, refusals, the OpenAPI page.

The paths of other services' clients are added by rerank_routes.py. PageService and what is below it know nothing of
HTTP.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect

from clients.ab.router.api import EventsAnswer, EventsRequest, RankAnswer, RankRequest
from clients.ab.router.api_keys import NotAuthorised, TooManyRequests
from clients.ab.router.body import BodyRefused
from clients.ab.router.http_limits import HttpLimits
from clients.ab.router.http_requests import RequestReader, as_json, body_of, parse_body
from clients.ab.router.page_ranking import PageRefused
from clients.ab.router.page_service import (
    ForcedArmNotAllowed,
    LogUnavailable,
    PageService,
    ServiceSettings,
    UnknownArm,
)
from clients.ab.router.rerank_api import RerankRequest, RerankSettings, error_content
from clients.ab.router.rerank_routes import add_rerank_routes
from clients.ab.router.traced_requests import TracedRequests
from ranking import tracing

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "not JSON"},
    401: {"description": "no key, or an unknown one (where the router asks for keys)"},
    403: {"description": "forced arm not allowed"},
    408: {"description": "the body did not arrive in time"},
    413: {"description": "the body is too large"},
    415: {"description": "the content type is not application/json, or the body is compressed"},
    429: {"description": "more requests than the key's rate allows; Retry-After says when"},
    422: {"description": "a field makes no sense; the reason names it"},
    503: {"description": "too many requests at once, or the log cannot be written: try again"},
}
_STATUS: dict[type[Exception], int] = {
    ForcedArmNotAllowed: 403,
    UnknownArm: 422,
    LogUnavailable: 503,
    PageRefused: 422,
    NotAuthorised: 401,
}


def create_app(
    settings: ServiceSettings, limits: HttpLimits, description: str, rerank: RerankSettings | None = None
) -> FastAPI:
    """The router as an ASGI application. `app.state.service` is the PageService once it has started.

    description: of the whole, for the OpenAPI page; rerank: settings of the paths of rerank_routes.py.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service = PageService(settings)
        app.openapi()  # takes 70 ms: made now rather than while somebody's page waits
        await service.start()
        yield
        await service.stop()

    app = FastAPI(title="DisRanker A/B router", version="1", description=description, lifespan=lifespan)
    if tracing.is_on():
        app.add_middleware(TracedRequests)
    _describe(app, RankRequest, EventsRequest, RerankRequest)
    reader = RequestReader(limits, lambda: app.state.service.keys)
    add_rerank_routes(app, reader, limits, rerank or RerankSettings(), REFUSALS)

    @app.post("/rank", response_model=RankAnswer, openapi_extra=body_of(RankRequest), responses=REFUSALS)
    async def rank(request: Request) -> Response:
        """Rank a page by its user's arm. Always answers within the deadline, which starts when the body is there."""
        body = await reader.read(request)
        arrived = time.perf_counter()
        async with reader.working():
            page = parse_body(RankRequest, body)
            del body
            reader.check_documents(len(page.documents))
            await asyncio.sleep(0)  # a large page must not be parsed, sent and logged in one go
            answer, after = await app.state.service.rank(page, arrived)
        background = BackgroundTask(after) if after else None
        with tracing.span("answer"):
            return Response(as_json(answer), media_type="application/json", background=background)

    @app.post("/events", response_model=EventsAnswer, openapi_extra=body_of(EventsRequest), responses=REFUSALS)
    async def events(request: Request) -> Response:
        """Take clicks and dwell times; they are on disk when this answers."""
        body = await reader.read(request)
        async with reader.working():
            answer = await app.state.service.take_events(parse_body(EventsRequest, body))
        return Response(as_json(answer), media_type="application/json")

    @app.head("/health/live", include_in_schema=False)
    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """200 as long as the process answers at all. Start it anew if not."""
        return {"status": "alive"}

    @app.head("/health/ready", include_in_schema=False)
    @app.get("/health/ready", responses={503: {"description": "being stopped: send no more requests here"}})
    async def ready() -> Response:
        """200 while requests may be sent here, 503 once it is being stopped; it goes on answering until it ends."""
        draining = app.state.service.draining
        content = {"status": "draining" if draining else "ready"}
        return Response(as_json(content), 503 if draining else 200, media_type="application/json")

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, Any]:
        """`ok`, or `degraded` with what is wrong. Both answer pages, so both are 200."""
        return app.state.service.health()

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics."""
        app.state.service.refresh_gauges()
        return Response(generate_latest(app.state.service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def refusal(request: Request, status: int, reason: str, retry_after: float = 1.0) -> Response:
        app.state.service.metrics.refused.labels(status).inc()
        # the rest of a refused body is not read, so that the connection is of no use any more
        headers = {"connection": "close"} if status in (401, 408, 413, 415, 429) else {}
        if status in (429, 503):
            headers["retry-after"] = str(math.ceil(retry_after))
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        # a reason may quote half a surrogate pair of the request
        content = json.dumps(error_content(request.url.path, status, reason), ensure_ascii=True)
        return Response(content, status, headers, media_type="application/json")

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, problem: HTTPException) -> Response:
        return refusal(request, problem.status_code, problem.detail)

    @app.exception_handler(BodyRefused)
    async def refuse_body(request: Request, problem: BodyRefused) -> Response:
        answer = refusal(request, problem.status, str(problem))
        if problem.status == 503:  # unlike where requests are worked on, the rest of the body was not read
            answer.headers["connection"] = "close"
        return answer

    @app.exception_handler(TooManyRequests)
    async def refuse_rate(request: Request, problem: TooManyRequests) -> Response:
        return refusal(request, 429, str(problem), problem.retry_after)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, problem: ClientDisconnect) -> Response:
        app.state.service.metrics.refused.labels(499).inc()
        return Response(status_code=400)  # nobody reads it

    for kind, status in _STATUS.items():

        async def refuse_kind(request: Request, problem: Exception, status: int = status) -> Response:
            return refusal(request, status, str(problem))

        app.add_exception_handler(kind, refuse_kind)

    return app


def _describe(app: FastAPI, *models: type[BaseModel]) -> None:
    """Put the bodies' schemas into the app's OpenAPI document, where body_of refers to them."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            known = schema.setdefault("components", {}).setdefault("schemas", {})
            for model in models:
                own = model.model_json_schema(ref_template="#/components/schemas/{model}")
                known |= own.pop("$defs", {})
                known[model.__name__] = own
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
