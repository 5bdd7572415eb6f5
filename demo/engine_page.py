"""A search page with an engine behind it: Tantivy retrieves, the A/B router ranks, clicks go to the router's log.

    python -m demo.engine_page --data data/world --router http://127.0.0.1:8080

It shows what a front end does with the router, in one file: `POST /v2/rerank` with the user's id, then `POST /events`
(docs/integrations.md). Any engine can stand in Tantivy's place.
"""

from __future__ import annotations

import logging
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response
from pydantic import BaseModel, ConfigDict, StringConstraints

from clients.ab.judging.shared_page import serve_page
from ranking.bm25 import words
from ranking.errors import InputError
from ranking.limits import MAX_ID_CHARACTERS
from ranking.program import run
from ranking.schema import iter_table

logger = logging.getLogger("engine_page")

PAGE = Path(__file__).with_name("engine_page.html")
COOKIE = "disranker_user"
MAX_QUERY = 2000  # characters
EXAMPLES = 6  # queries offered on the empty page
INDEX_BYTES = 64 << 20  # memory that Tantivy gathers documents in before it writes them


@dataclass
class Config:
    """Serve a search page: an engine retrieves, the A/B router ranks.

    Args:
        data: dataset folder whose candidates are searched
        router: address of the A/B router
        key_file: file with the router's key, where it asks for one
        retrieved: documents that the engine finds for the router to rank
        shown: documents on the page
        deadline_ms: how long the page waits for the router before it shows the engine's own order
        host: address to listen on
        port: port to listen on
    """

    data: Path
    router: str = "http://127.0.0.1:8080"
    key_file: Path | None = None
    retrieved: int = 100
    shown: int = 10
    deadline_ms: float = 1000.0
    host: str = "127.0.0.1"
    port: int = 8091

    def __post_init__(self) -> None:
        for name in ("retrieved", "shown", "deadline_ms"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: a positive number is needed")


class Engine:
    """A Tantivy index in memory over the distinct documents of a dataset folder.

    Text is cut into terms by ranking.bm25.words, as everywhere here, so that scripts without spaces are found too and a
    query's own punctuation is no query language.
    """

    def __init__(self, folder: Path):
        import tantivy

        self._tantivy = tantivy
        builder = tantivy.SchemaBuilder()
        builder.add_integer_field("number", stored=True)
        builder.add_text_field("words", tokenizer_name="whitespace")
        self._schema = builder.build()
        self._index = tantivy.Index(self._schema)
        writer = self._index.writer(heap_size=INDEX_BYTES, num_threads=1)
        self.documents: list[dict[str, str]] = []
        documents, self.queries = _documents_and_queries(folder)
        for document in documents:
            text = " ".join(words(f"{document['title']} {document['summary']}"))
            writer.add_document(tantivy.Document(number=len(self.documents), words=text))
            self.documents.append(document)
        if not self.documents:
            raise InputError(f"{folder}: no candidates to search")
        writer.commit()
        writer.wait_merging_threads()
        self._index.reload()

    def find(self, query: str, count: int) -> list[dict[str, Any]]:
        """Up to `count` documents that hold a word of the query, best first, each with the engine's score as prior."""
        query_of, occur = self._tantivy.Query, self._tantivy.Occur.Should
        terms = [(occur, query_of.term_query(self._schema, "words", word)) for word in dict.fromkeys(words(query))]
        if not terms:
            return []
        searcher = self._index.searcher()
        hits = searcher.search(query_of.boolean_query(terms), count).hits
        return [{**self.documents[searcher.doc(address)["number"][0]], "prior": score} for score, address in hits]


def _documents_and_queries(folder: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The distinct ones of each."""
    found: dict[str, dict[str, str]] = {}
    queries: dict[str, None] = {}
    for rows in iter_table(folder / "candidates.parquet", "candidates"):
        queries |= dict.fromkeys(rows.column("query").to_pylist())
        for row in rows.select(["doc_id", "title", "summary"]).to_pylist():
            found.setdefault(row["doc_id"], row)
    return list(found.values()), list(queries)


class Click(BaseModel):
    """A document that the user opened, on a page that `/search` gave."""

    model_config = ConfigDict(extra="forbid")
    request_id: Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARACTERS)]
    doc_id: Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARACTERS)]


def make_app(config: Config) -> FastAPI:
    """The page as an ASGI application, with the documents indexed. InputError if there are none."""
    engine = Engine(config.data)
    examples = random.Random(0).sample(engine.queries, min(EXAMPLES, len(engine.queries)))
    headers = {}
    if config.key_file is not None:
        headers["authorization"] = f"Bearer {config.key_file.read_text(encoding='ascii').strip()}"

    @asynccontextmanager
    async def router(app: FastAPI) -> AsyncIterator[None]:
        async with httpx.AsyncClient(
            base_url=config.router, headers=headers, timeout=config.deadline_ms / 1000, trust_env=False
        ) as client:
            app.state.router = client
            yield

    app = FastAPI(title="DisRanker engine page", lifespan=router)

    serve_page(app, PAGE)

    @app.get("/examples")
    async def example_queries() -> dict[str, list[str]]:
        """Some queries of the dataset, to begin with."""
        return {"queries": examples}

    @app.get("/search")
    async def search(
        request: Request, response: Response, q: Annotated[str, Query(max_length=MAX_QUERY)]
    ) -> dict[str, Any]:
        """What the engine found, in the order of the user's arm; in the engine's own where the router is silent."""
        user_id = request.cookies.get(COOKIE) or uuid.uuid4().hex
        response.set_cookie(COOKIE, user_id, max_age=31_536_000, httponly=True, samesite="lax")
        found = engine.find(q, config.retrieved)
        if not found:
            return {"found": 0, "ranked": False, "request_id": "", "results": []}
        body = {"query": q, "documents": found, "top_n": config.shown, "user": user_id[:MAX_ID_CHARACTERS]}
        try:
            answer = await app.state.router.post("/v2/rerank", json=body)
            answer.raise_for_status()
            told = answer.json()
            page, results = told["id"], [found[entry["index"]] for entry in told["results"]]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as problem:  # behind the first, no router's answer
            logger.warning("the router did not rank: %r", problem)
            return {"found": len(found), "ranked": False, "request_id": "", "results": found[: config.shown]}
        return {"found": len(found), "ranked": True, "request_id": page, "results": results}

    @app.post("/click")
    async def click(clicked: Click) -> dict[str, int]:
        """Pass a click on to the router's log."""
        event = {**clicked.model_dump(), "type": "click"}
        try:
            answer = await app.state.router.post("/events", json={"events": [event]})
            answer.raise_for_status()
        except httpx.HTTPError as problem:
            raise HTTPException(502, f"the router did not take the click: {problem}") from problem
        return answer.json()

    return app


def main(config: Config) -> None:
    """Index the documents and serve the page until interrupted."""
    app = make_app(config)
    logger.info("http://%s:%d", config.host, config.port)
    uvicorn.run(app, host=config.host, port=config.port, log_level="warning")


if __name__ == "__main__":
    run(main, Config, example="python -m demo.engine_page --data data/world --router http://127.0.0.1:8080")
