"""A search page for judging by eye: one query, two arms' rankings side by side, named only after you have judged.

    python clients/search_page.py --data data/world --url 127.0.0.1:8001 --log runs/ab/data

Judgments go to a CSV of good, same, bad (treatment seen beside control), which `clients/ab_report.py --judgments`
reads. With --log the page hands out queries of the log to raters, by frequency (docs/judging.md). Grades of single
documents go to a table that `prepare_data --source table:` reads.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.middleware.trustedhost import TrustedHostMiddleware

from clients.ab.judging.csv_file import only_writer
from clients.ab.judging.shared_page import FOLDER, serve_page
from clients.ab.judging.sheet import MAX_QUERY, Sheet, draw_queries
from clients.triton.connection import TritonAccess
from clients.triton.reranker import AsyncReranker, RerankError
from ranking.bm25 import Bm25
from ranking.errors import InputError
from ranking.limits import MAX_ID_CHARACTERS
from ranking.program import run
from ranking.request_tensors import descending
from ranking.schema import MAX_GRADE, iter_table

logger = logging.getLogger("search_page")

PAGE = FOLDER / "search_page.html"
SHOWN = 10
EXAMPLES = 6  # queries offered on the empty page
LOOPBACK = ("127.0.0.1", "localhost")


@dataclass
class Config(TritonAccess):
    """Serve a page that shows two arms' rankings of a query side by side.

    Args:
        data: dataset folder whose documents are searched
        url: Triton server that holds the arms; scheme grpc, grpcs, http or https (none means grpc)
        control: model of one side
        treatment: model of the other side
        candidates: documents that BM25 finds for the arms to rank
        judgments: CSV that judgments are added to; those of other arms in it are left alone
        grades: JSONL file of graded documents, the middle grade of each pair, which prepare_data reads as it is; every
            rater's own go to a .raters.csv beside it
        log: folder of ab_compact whose queries are handed out
        queries_per_band: queries of each third of the log's pages: frequent, middling and rare ones
        min_users: queries of fewer users are shown to no rater
        alpha: error rate of the interval at which judging may stop
        seed: of the drawn queries
        deadline_ms: time for both rankings
        host: address to listen on
        port: port to listen on
    """

    data: Path
    url: str = "127.0.0.1:8001"
    control: str = "baseline"
    treatment: str = "student"
    candidates: int = 48
    judgments: Path = Path("runs/judgments.csv")
    grades: Path = Path("runs/grades.jsonl")
    log: Path | None = None
    queries_per_band: int = 20
    min_users: int = 5
    alpha: float = 0.05
    seed: int = 0
    deadline_ms: float = 5000.0
    host: str = "127.0.0.1"
    port: int = 8090

    def __post_init__(self) -> None:
        if self.grades.suffix != ".jsonl":
            raise ValueError(f"grades is {self.grades}: a name that ends in .jsonl is needed")
        if self.candidates < 1:
            raise ValueError(f"candidates is {self.candidates}: at least 1 is needed")
        if not 0 < self.port <= 65535:
            raise ValueError(f"port is {self.port}: a number from 1 to 65535 is needed")
        if self.control == self.treatment:
            raise ValueError(f"control and treatment are both {self.control}: two arms are judged side by side")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}: an error rate between 0 and 1 is needed")


class Documents:
    """The distinct documents of a dataset folder, searched by BM25."""

    def __init__(self, folder: Path):
        found: dict[str, tuple[str, str]] = {}
        queries: dict[str, None] = {}
        for path, table in self._tables(folder):
            for rows in iter_table(path, table):
                ids, titles, summaries = (rows.column(c).to_pylist() for c in ("doc_id", "title", "summary"))
                found.update(zip(ids, zip(titles, summaries)))
                queries |= dict.fromkeys(rows.column("query").to_pylist())
        if not found:
            raise InputError(f"{folder}: no documents; a dataset folder of training.prepare_data is needed")
        self.ids, self.queries = list(found), list(queries)
        self.titles, self.summaries = (list(column) for column in zip(*found.values()))
        self._index = Bm25(list(found.values()))

    @staticmethod
    def _tables(folder: Path) -> list[tuple[Path, str]]:
        judged = [(path, "judgments") for path in sorted((folder / "judgments").glob("*.parquet"))]
        candidates = folder / "candidates.parquet"
        return [*judged, *([(candidates, "candidates")] if candidates.is_file() else [])]

    def find(self, query: str, count: int) -> list[int]:
        """Numbers of the best documents; fewer than count where fewer hold a word of the query."""
        scores = next(self._index.scores([query]))
        return [number for number in descending(scores)[:count].tolist() if scores[number] > 0]


Rater = Annotated[str, StringConstraints(max_length=100)]


class SideBySideJudgment(BaseModel):
    """Which side was better. left names the arm that stood on the left, as the search answer gave it.

    `skip` needs a reason, and no `left`: the answer may have had no side. rater: a name or number of the person, empty
    for nobody in particular.
    """

    model_config = ConfigDict(extra="forbid")
    query: Annotated[str, StringConstraints(min_length=1, max_length=MAX_QUERY)]
    left: str = ""
    better: Literal["left", "same", "right", "skip"]
    rater: Rater = ""
    reason: Annotated[str, StringConstraints(max_length=200)] = ""


class Grade(BaseModel):
    """A grade of one document for a query, from 0 (irrelevant) to 4 (best)."""

    model_config = ConfigDict(extra="forbid")
    query: Annotated[str, StringConstraints(min_length=1, max_length=MAX_QUERY)]
    doc_id: Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARACTERS)]
    grade: Annotated[int, Field(ge=0, le=MAX_GRADE, strict=True)]
    rater: Rater = ""


def make_app(config: Config) -> FastAPI:
    """The page as an ASGI application, with the documents indexed.

    InputError if the dataset folder holds none, or the server cannot be asked with these settings.
    """
    arms, credentials = (config.control, config.treatment), config.credentials()
    rankers = {arm: AsyncReranker([config.url], arm, config.deadline_ms, credentials) for arm in arms}
    documents = Documents(config.data)
    drawn = (
        [] if config.log is None else draw_queries(config.log, config.queries_per_band, config.seed, config.min_users)
    )
    places = {doc_id: number for number, doc_id in enumerate(documents.ids)}
    sheet = Sheet(config.judgments, config.grades, drawn, config.alpha, arms)
    examples = [one.query for one in drawn] or random.Random(config.seed).sample(
        documents.queries, min(EXAMPLES, len(documents.queries))
    )

    @asynccontextmanager
    async def closing(app: FastAPI):
        yield
        await asyncio.gather(*(ranker.close() for ranker in rankers.values()))

    app = FastAPI(title="DisRanker search page", lifespan=closing)

    if config.host in LOOPBACK:
        # a page of somebody else's, open in the same browser, may reach this one under a name that its owner controls
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, problem: RequestValidationError) -> JSONResponse:
        # FastAPI's own answer quotes the input, and half a surrogate pair in it has no UTF-8
        reasons = [f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in problem.errors()[:3]]
        return JSONResponse({"detail": "; ".join(reasons).encode("ascii", "backslashreplace").decode()}, 422)

    @app.exception_handler(OSError)
    async def not_written(request: Request, problem: OSError) -> JSONResponse:
        logger.error("%s: %s", config.judgments, problem)
        return JSONResponse({"detail": f"not saved: {problem.strerror or problem}"}, 500)

    serve_page(app, PAGE)

    @app.get("/examples")
    async def example_queries() -> dict[str, list[str]]:
        """Queries to begin with: of those handed out, or else some that the dataset has."""
        return {"queries": examples[:EXAMPLES]}

    @app.get("/search")
    async def search(q: Annotated[str, Query(max_length=MAX_QUERY)]) -> dict[str, Any]:
        """Both rankings in random sides; the page keeps the names to itself until they are revealed."""
        query = q.strip()
        if not query:
            raise HTTPException(422, "q is empty: type a query")
        numbers = documents.find(query, config.candidates)
        if not numbers:
            return {"query": query, "found": 0, "sides": []}
        titles = [documents.titles[n] for n in numbers]
        summaries = [documents.summaries[n] for n in numbers]
        try:
            rankings = await asyncio.gather(*(rankers[arm].rank(query, titles, summaries) for arm in arms))
        except RerankError as problem:
            raise HTTPException(502, str(problem)) from problem
        sides = [
            {
                "arm": arm,
                "results": [
                    {
                        "doc_id": documents.ids[numbers[i]],
                        "title": titles[i],
                        "summary": summaries[i],
                        "score": round(float(ranking.scores[i]), 3),
                    }
                    for i in ranking.order[:SHOWN].tolist()
                ],
            }
            for arm, ranking in zip(arms, rankings)
        ]
        random.shuffle(sides)
        same = bool(np.array_equal(rankings[0].order[:SHOWN], rankings[1].order[:SHOWN]))
        return {"query": query, "found": len(numbers), "same": same, "sides": sides}

    @app.post("/judge")
    async def judge(judgment: SideBySideJudgment) -> dict[str, str]:
        """Append a judgment, as seen from the treatment."""
        if judgment.better == "skip":
            if not judgment.reason.strip():
                raise HTTPException(422, "reason is empty: say why the query cannot be judged")
            sheet.add(judgment.query, "", judgment.rater, judgment.reason)
            return {"verdict": ""}
        if judgment.left not in arms:
            raise HTTPException(422, f"left is {judgment.left!r}: one of {', '.join(arms)} is meant")
        verdict = "same"
        if judgment.better != "same":
            winner = judgment.left if judgment.better == "left" else next(a for a in arms if a != judgment.left)
            verdict = "good" if winner == config.treatment else "bad"
        sheet.add(judgment.query, verdict, judgment.rater, "")
        return {"verdict": verdict}

    @app.get("/next")
    async def next_query(rater: Annotated[str, Query(max_length=100)] = "") -> dict[str, Any]:
        """The rater's next query of the log, null where none is left."""
        return sheet.next_for(rater)

    @app.get("/standing")
    async def standing() -> dict[str, Any]:
        """Counts, advantage with its interval, agreement, and whether judging may stop."""
        return sheet.standing()

    @app.post("/grade")
    async def grade(given: Grade) -> dict[str, int]:
        """Add a grade of one document."""
        if given.doc_id not in places:
            raise HTTPException(422, f"doc_id {given.doc_id!r} is no document of {config.data}")
        place = places[given.doc_id]
        row = {"query": given.query, "doc_id": given.doc_id, "grade": given.grade}
        sheet.add_grade(given.rater, row | {"title": documents.titles[place], "summary": documents.summaries[place]})
        return {"grade": given.grade}

    return app


def main(config: Config) -> None:
    """Index the documents and serve the page until interrupted."""
    with only_writer(config.judgments), only_writer(config.grades):
        try:
            app = make_app(config)
        except pa.ArrowException as problem:
            raise InputError(f"{config.data}: {problem}") from problem
        print(f"search page: http://{config.host}:{config.port}", file=sys.stderr, flush=True)
        uvicorn.run(app, host=config.host, port=config.port, log_level="warning")


if __name__ == "__main__":
    run(main, Config, example="python clients/search_page.py --data data/world --url 127.0.0.1:8001")
