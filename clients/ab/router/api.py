"""What the A/B router takes and gives over HTTP, and the 4xx answers to what makes no sense.

Bodies are validated here, in one pass from bytes, rather than by FastAPI's parameter machinery: it is several times
faster for 48 documents, and the reasons read better.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.openapi.utils import get_openapi
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticCustomError

from ranking.limits import MAX_FIELD_BYTES, MAX_ID_CHARACTERS, field_bytes
from ranking.visible import is_visible


def _short_enough(text: str) -> str:
    if len(text) > MAX_FIELD_BYTES // 4 and field_bytes(text) > MAX_FIELD_BYTES:  # a character has at most four bytes
        raise PydanticCustomError("too_long", "longer than {limit} bytes", {"limit": MAX_FIELD_BYTES})
    return text


def _not_blank(text: str) -> str:
    if not is_visible(text):
        raise PydanticCustomError("blank", "blank: no visible character")
    return text


# Pages become rows of the exposures and events tables and requests to Triton: what those refuse must not get in.
Text = Annotated[str, AfterValidator(_short_enough)]
Query = Annotated[Text, AfterValidator(_not_blank)]
Label = Annotated[str, StringConstraints(max_length=MAX_ID_CHARACTERS)]
Name = Annotated[Label, AfterValidator(_not_blank)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Document(_Strict):
    """One candidate. Title and summary may be empty."""

    doc_id: Name
    title: Text = ""
    summary: Text = ""


class RankRequest(_Strict):
    """One search page to rank. Documents come in the order of the caller's own ranking."""

    user_id: Name = Field(description="decides the arm; the same user always gets the same one")
    query: Query
    documents: list[Document] = Field(min_length=1)
    request_id: Name | None = Field(None, description="names the page; made if absent. A retry keeps its id")
    platform: Annotated[str, StringConstraints(max_length=64)] = Field("", description="segment of the report")
    segments: dict[Name, Label] = Field(default_factory=dict, max_length=16, description="further segments")
    arm: str | None = Field(None, description="force this arm, for testing; only with --allow-forced-arm")

    @field_validator("documents")
    @classmethod
    def _distinct(cls, documents: list[Document]) -> list[Document]:
        if len({d.doc_id for d in documents}) < len(documents):
            seen: set[str] = set()
            twice = next(d.doc_id for d in documents if d.doc_id in seen or seen.add(d.doc_id))  # type: ignore[func-returns-value]
            raise ValueError(f"doc_id {twice!r} is given twice")
        return documents


class RankAnswer(BaseModel):
    """The ranking. Send request_id back with every click."""

    request_id: str
    experiment: str = Field(description="empty for a user outside every experiment")
    arm: str
    ranking: list[str] = Field(description="document ids, best first")
    scores: list[float] | None = Field(description="raw scores in that order; null for the incoming order")
    served_by: str = Field(description="model whose order this is, `interleaved`, or `incoming`")
    fallback: str = Field(description="why the arm's model did not rank it, empty if it did")
    model_version: str
    latency_ms: float
    logged: bool = Field(description="whether the exposure is on disk")


class Event(_Strict):
    """A click, or the seconds a user stayed after one. Sending it twice changes nothing."""

    request_id: Name
    doc_id: Name
    type: Literal["click", "dwell"]
    dwell_seconds: float | None = Field(None, ge=0, le=86400, allow_inf_nan=False, description="for type dwell")
    timestamp: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="seconds since 1970, the caller's clock"
    )

    def model_post_init(self, context: Any) -> None:
        if (self.type == "dwell") != (self.dwell_seconds is not None):
            raise ValueError("dwell_seconds belongs to type dwell, and only to it")


class EventsRequest(_Strict):
    """Clicks and dwell times, of one page or of many."""

    events: list[Event] = Field(min_length=1, max_length=10_000)


class EventsAnswer(BaseModel):
    accepted: int


M = TypeVar("M", bound=BaseModel)


async def read_body(request: Request, limit: int) -> bytes:
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
    """The body as a model. HTTPException 400 for what is not JSON, 422 for a field that makes no sense; both say why."""
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


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """openapi_extra of a route whose body parse_body reads."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def describe(app: FastAPI, *models: type[BaseModel]) -> None:
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
