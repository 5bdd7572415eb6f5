"""The paths of other services' rerank clients on the router: Cohere, Jina, text-embeddings-inference (TEI).

A page that comes in here is ranked by PageService.rank like one of `/rank`: the same arms, deadline, fallback and log.
A request without a user is ranked by the default model, outside every experiment.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, HTTPException, Request, Response
from starlette.background import BackgroundTask

from clients.ab.router.http_limits import HttpLimits
from clients.ab.router.http_requests import RequestReader, as_json, body_of, parse_body
from clients.ab.router.rerank_api import (
    RELEVANCE_SCORE,
    Reranked,
    RerankRequest,
    RerankSettings,
    cohere_answer,
    reranked,
    tei_answer,
)
from ranking import tracing
from ranking.limits import MAX_ID_CHARACTERS
from ranking.schema import NO_USER
from ranking.visible import is_visible


def add_rerank_routes(
    app: FastAPI, reader: RequestReader, limits: HttpLimits, settings: RerankSettings, refusals: dict[int | str, Any]
) -> None:
    """Add the paths to the router's app. refusals: the documented statuses of a path that takes a body."""
    name = settings.rerank_model_name
    started = int(time.time())

    async def ranked(request: Request) -> tuple[RerankRequest, list[Reranked], dict[str, Any], BackgroundTask | None]:
        body = await reader.read(request)
        arrived = time.perf_counter()
        user_id = _header_user(request, settings.user_header)
        async with reader.working():
            asked = parse_body(RerankRequest, body)
            del body
            reader.check_documents(len(asked.given), "texts" if asked.texts else "documents")
            request_id = asked.request_id or uuid.uuid4().hex
            user_id = user_id or (asked.user if asked.user and is_visible(asked.user) else "")
            # without a user every request is a user of its own in the log, so that none looks like a robot of many
            page = asked.page(user_id or f"{NO_USER}{request_id}", request_id)
            await asyncio.sleep(0)  # a large page must not be parsed, sent and logged in one go
            answer, after = await app.state.service.rank(page, arrived, in_experiments=bool(user_id))
        return asked, reranked(asked, page, answer), answer, BackgroundTask(after) if after else None

    def respond(content: Any, answer: dict[str, Any], background: BackgroundTask | None) -> Response:
        headers = {"x-request-id": answer["request_id"], "x-served-by": answer["served_by"]}
        headers |= {"x-fallback": answer["fallback"]} if answer["fallback"] else {}
        quoted = {key: quote(value, safe=" :,/-_.") for key, value in headers.items()}
        with tracing.span("answer"):
            return Response(as_json(content), 200, quoted, media_type="application/json", background=background)

    shared: dict[str, Any] = {"openapi_extra": body_of(RerankRequest), "responses": refusals}

    @app.post("/v1/rerank", **shared)
    async def rerank_v1(request: Request) -> Response:
        """Rerank in the form of Cohere's first API and of Jina's."""
        asked, results, answer, background = await ranked(request)
        return respond(cohere_answer(asked, results, answer, "1", name), answer, background)

    @app.post("/v2/rerank", **shared)
    async def rerank_v2(request: Request) -> Response:
        """Rerank in the form of Cohere's second API."""
        asked, results, answer, background = await ranked(request)
        return respond(cohere_answer(asked, results, answer, "2", name), answer, background)

    @app.post("/rerank", **shared)
    async def rerank_tei(request: Request) -> Response:
        """Rerank in TEI's form (`texts`); a body with `documents` is answered in Jina's."""
        asked, results, answer, background = await ranked(request)
        if not asked.texts:
            return respond(cohere_answer(asked, results, answer, "1", name), answer, background)
        return respond(tei_answer(asked, results), answer, background)

    asking: dict[str, Any] = {"responses": {status: refusals[status] for status in (401, 429)}}

    @app.get("/v1/models", **asking)
    async def models(request: Request) -> dict[str, Any]:
        """The one model that callers see; which model ranks is decided by the experiment."""
        reader.admit(request)
        listed = {"id": name, "object": "model", "created": started, "owned_by": "disranker", "root": name}
        return {"object": "list", "data": [listed]}

    @app.get("/info", **asking)
    async def info(request: Request) -> dict[str, Any]:
        """TEI's description of a reranker, and what scores and users mean here."""
        reader.admit(request)
        return {
            "model_id": name,
            "model_sha": None,
            "model_dtype": "float32",
            "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
            "max_concurrent_requests": limits.max_in_flight,
            "max_client_batch_size": limits.max_documents,
            "auto_truncate": True,
            "version": app.version,
            "relevance_score": RELEVANCE_SCORE,
            "raw_scores": "with `raw_scores: true` scores are the model's raw logits",
            "user": f"the header {settings.user_header}, else the body's `user`, decides the arm",
            "without_user": f"{app.state.service.file.current.default_model} ranks, outside every experiment",
        }


def _header_user(request: Request, header: str) -> str:
    """The user that a header names, "" if it names none. HTTPException 422 if the id is too long or no UTF-8."""
    value = request.headers.get(header, "")
    try:
        user_id = value.encode("latin-1").decode("utf-8")  # as the bytes came
    except UnicodeDecodeError as problem:
        raise HTTPException(422, f"header {header}: not UTF-8") from problem
    if len(user_id) > MAX_ID_CHARACTERS:
        raise HTTPException(422, f"header {header}: longer than {MAX_ID_CHARACTERS} characters")
    return user_id if is_visible(user_id) else ""
