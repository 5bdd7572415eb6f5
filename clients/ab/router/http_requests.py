"""How every path of the router takes a request: key, content type, body within its limits, checked fields.

Bodies are validated in one pass from bytes, rather than by FastAPI's parameter machinery: that is several times faster
for 48 documents, and the reasons read better.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from pydantic import BaseModel, ValidationError

from clients.ab.router.api_keys import ApiKeys
from clients.ab.router.body import BodyReader
from clients.ab.router.http_limits import HttpLimits
from ranking import tracing

M = TypeVar("M", bound=BaseModel)


class RequestReader:
    """Admits callers and reads their bodies, all within the limits that the paths share.

    keys: the keys in force, or None where everybody may ask; a function, since the service has them once it started.
    """

    def __init__(self, limits: HttpLimits, keys: Callable[[], ApiKeys | None]):
        self._limits, self._keys = limits, keys
        self._bodies = BodyReader(limits)
        self._working = asyncio.Semaphore(limits.max_in_flight)

    def admit(self, request: Request) -> None:
        """Take one request of the caller's rate. NotAuthorised, TooManyRequests."""
        keys = self._keys()
        if keys is not None:
            keys.admit(request.headers.get("authorization"))

    async def read(self, request: Request) -> bytes:
        """The body of an admitted caller's request. HTTPException 415, BodyRefused."""
        self.admit(request)
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            raise HTTPException(415, f"the content type is {media[:80]!r}; application/json is taken")
        coding = request.headers.get("content-encoding", "").strip().lower()
        if coding not in ("", "identity"):
            raise HTTPException(415, f"the content encoding is {coding[:80]!r}; bodies are taken as they are")
        with tracing.span("receive") as span:
            body = await self._bodies.read(request.stream(), request.headers.get("content-length"))
            span.set(bytes=len(body))
        return body

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Count the request among those that are worked on. HTTPException 503 if there are too many."""
        if self._working.locked():
            count = self._limits.max_in_flight
            raise HTTPException(503, f"{count} requests are being worked on; try again in a second")
        async with self._working:
            yield

    def check_documents(self, count: int, name: str = "documents") -> None:
        """HTTPException 422 if a page has more documents than are allowed. name: of the body's field."""
        if count > self._limits.max_documents:
            raise HTTPException(422, f"{name}: {count} are given, {self._limits.max_documents} are allowed")


def parse_body(model: type[M], body: bytes) -> M:
    """The body as a model.

    HTTPException 400 for what is not JSON, 422 for a field that makes no sense; both say why. Of many things wrong the
    first is told.
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


def as_json(content: Any) -> bytes:
    """An answer's bytes."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """openapi_extra of a route whose body parse_body reads."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}
