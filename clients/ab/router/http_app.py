"""The router behind HTTP: paths, status codes, the size of a body, the OpenAPI page. Nothing below here knows of HTTP.

Bodies are validated in one pass from bytes, rather than by FastAPI's parameter machinery: that is several times faster
for 48 documents, and the reasons read better.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.background import BackgroundTask

from clients.ab.router.api import EventsAnswer, EventsRequest, RankAnswer, RankRequest
from clients.ab.router.page_service import (
    ForcedArmNotAllowed,
    LogUnavailable,
    PageService,
    ServiceSettings,
    UnknownArm,
)
from ranking.limits import MAX_DOCUMENTS

M = TypeVar("M", bound=BaseModel)
_STATUS: dict[type[Exception], int] = {ForcedArmNotAllowed: 403, UnknownArm: 422, LogUnavailable: 503}


@dataclass(kw_only=True)
class HttpLimits:
    """What a request may hold.

    Args:
        max_documents: pages with more documents are refused
        max_body_mb: larger requests are refused
    """

    max_documents: int = MAX_DOCUMENTS
    max_body_mb: float = 8.0

    def __post_init__(self) -> None:
        for name in ("max_documents", "max_body_mb"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")


def create_app(settings: ServiceSettings, limits: HttpLimits, description: str) -> FastAPI:
    """The router as an ASGI application. `app.state.service` is the PageService once it has started.

    description: of the whole, for the OpenAPI page.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service = PageService(settings)
        await service.start()
        yield
        await service.stop()

    app = FastAPI(title="DisRanker A/B router", version="1", description=description, lifespan=lifespan)
    _describe(app, RankRequest, EventsRequest)
    limit = int(limits.max_body_mb * (1 << 20))

    @app.post("/rank", response_model=RankAnswer, openapi_extra=_body_of(RankRequest))
    async def rank(request: Request) -> Response:
        """Rank a page by its user's arm. Always answers within the deadline."""
        arrived = time.perf_counter()
        body = parse_body(RankRequest, await _read_body(request, limit))
        if len(body.documents) > limits.max_documents:
            raise HTTPException(422, f"documents: {len(body.documents)} are given, {limits.max_documents} are allowed")
        answer, after = await app.state.service.rank(body, arrived)
        background = BackgroundTask(after) if after else None
        return Response(_json(answer), media_type="application/json", background=background)

    @app.post("/events", response_model=EventsAnswer, openapi_extra=_body_of(EventsRequest))
    async def events(request: Request) -> Response:
        """Take clicks and dwell times; they are on disk when this answers."""
        body = parse_body(EventsRequest, await _read_body(request, limit))
        return Response(_json(await app.state.service.take_events(body)), media_type="application/json")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """`ok`, or `degraded` with what is wrong. Both answer pages, so both are 200."""
        return app.state.service.health()

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(app.state.service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def refusal(status: int, reason: str) -> JSONResponse:
        app.state.service.metrics.refused.labels(status).inc()
        return JSONResponse({"detail": reason}, status)

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, problem: HTTPException) -> JSONResponse:
        return refusal(problem.status_code, problem.detail)

    for kind, status in _STATUS.items():

        async def refuse_kind(request: Request, problem: Exception, status: int = status) -> JSONResponse:
            return refusal(status, str(problem))

        app.add_exception_handler(kind, refuse_kind)

    return app


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, of at most limit bytes. HTTPException 413 beyond that, before the rest is read."""
    too_large = HTTPException(413, f"the body is larger than {limit} bytes")
    if int(request.headers.get("content-length") or 0) > limit:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise too_large
    return bytes(body)


def parse_body(model: type[M], body: bytes) -> M:
    """The body as a model.

    HTTPException 400 for what is not JSON, 422 for a field that makes no sense; both say why.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as problem:
        first, *more = problem.errors(include_url=False, include_context=False, include_input=False)
        path = ""
        for part in first["loc"]:
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
        reason = f"{path}: {first['msg']}" if path else first["msg"]
        reason += f" (and {len(more)} more)" if more else ""
        raise HTTPException(400 if first["type"] == "json_invalid" else 422, reason) from problem


def _body_of(model: type[BaseModel]) -> dict[str, Any]:
    """openapi_extra of a route whose body parse_body reads."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def _describe(app: FastAPI, *models: type[BaseModel]) -> None:
    """Put the bodies' schemas into the app's OpenAPI document, where _body_of refers to them."""

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
