"""Label a corpus with a reranker behind HTTP: vLLM, TEI, Cohere, Jina (docs/foreign-teachers.md).

    python clients/label_over_http.py --dialect tei --url http://localhost:8080 --candidates C.parquet --out labels
    python clients/label_over_http.py --dialect cohere --url https://api.cohere.com --model rerank-v3.5 \\
      --scale probability --candidates C.parquet --out labels

Exit codes as of clients/label_corpus.py: 0 every pair labelled; 3 finished, some pairs are in rejects.parquet; 130
interrupted, run it again to go on; 1 it cannot go on (the line says why; whatever was answered is kept).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx

from clients.labelling.candidate_file import CandidateFile
from clients.labelling.corpus_run import RunSettings, check_above_zero, run_corpus
from clients.labelling.http_costs import Budget, Prices, forecast_cost
from clients.labelling.http_dialects import DIALECTS
from clients.labelling.http_endpoint import HttpEndpoint
from clients.labelling.http_teacher import AnswerLog, CharacterLimits, HttpTeacher, ScoreScale, describe, headers
from clients.labelling.label_ranges import Job, TextsOf
from clients.labelling.label_shards import Origin
from clients.labelling.teacher_endpoint import Patience
from clients.labelling.work_queue import Tally, WorkQueue
from ranking.program import run


@dataclass(kw_only=True)
class Config(RunSettings):
    """Score every candidate with a reranker behind HTTP; run it again after any interruption and it goes on.

    Args:
        dialect: the service's form: vllm-score, vllm-rerank, tei, cohere or jina
        url: base addresses of servers of the same model, http://host:port, separated by commas
        model: name of the model in requests
        revision: version of the model where the service does not say it; it is part of the teacher's id
        scale: raw keeps scores as they come; probability turns scores in 0..1 into logits, which keep the order of the
            best
        limits: longest fields that are sent, in characters
        key_variable: environment variable of the service's key; left out, the dialect's own (CO_API_KEY, JINA_API_KEY)
        documents: documents of one query in a request; services bill and limit by requests
        in_flight: requests at a time and server
        requests_per_minute: pace of all servers together; left out, as fast as they answer
        prices: what the service bills, for the dry run and the budget
        budget: money that the requests of this run may cost by these prices, failed ones included; it ends before it
            costs more
    """

    dialect: str
    url: list[str] = field(default_factory=list)
    model: str = "teacher"
    revision: str = ""
    scale: ScoreScale = "raw"
    limits: CharacterLimits = field(default_factory=CharacterLimits)
    key_variable: str | None = None
    documents: int = 64
    in_flight: int = 8
    requests_per_minute: float | None = None
    prices: Prices = field(default_factory=Prices)
    budget: float | None = None
    shard_rows: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero(self, "documents", "in_flight", "requests_per_minute")
        if self.dialect not in DIALECTS:
            raise ValueError(f"--dialect is {self.dialect!r}: one of {', '.join(DIALECTS)} is needed")
        if not self.url or len(set(self.url)) < len(self.url):
            raise ValueError("--url: name each server, and each once")
        if any(not url.startswith(("http://", "https://")) for url in self.url):
            raise ValueError("--url: http://host:port or https://host is needed")
        for url in self.url:
            try:
                httpx.URL(url)
            except httpx.InvalidURL as problem:
                raise ValueError(f"--url {url}: {problem}") from problem
        if self.budget is not None and self.prices == Prices():
            raise ValueError("--budget needs --prices.per-1000-requests or --prices.per-million-tokens")


@dataclass(frozen=True)
class AskedOverHttp:
    """A teacher behind HTTP and how it is asked (label_ranges.AskedTeacher)."""

    teacher: HttpTeacher
    urls: tuple[str, ...]
    authorised: Mapping[str, str]
    folder: Path
    patience: Patience
    budget: Budget
    in_flight: int
    documents: int

    def endpoints(self, work: WorkQueue, tally: Tally) -> list[HttpEndpoint]:
        """One endpoint per url."""
        return [
            HttpEndpoint(
                url, self.teacher, work, tally, self.patience, self.budget, AnswerLog(self.folder), self.authorised,
                self.in_flight, self.documents,
            )
            for url in self.urls
        ]  # fmt: skip

    def texts_of(self) -> TextsOf:
        """The fields of each pair as they are sent."""
        return self.teacher.texts

    def earlier_answers(self, folder: Path, shard: int) -> dict[int, float]:
        """What a run that was killed had been given, and had paid for."""
        return AnswerLog(folder).read(shard)

    def forget_answers(self, folder: Path, shard: int) -> None:
        """The shard's file has them now."""
        AnswerLog(folder).drop(shard)


def make_job(config: Config, budget: Budget, candidates: CandidateFile, out: Path, shard_rows: int) -> Job:
    """Ask the servers what they serve, and gather what the run needs. InputError: no key, no answer, two models."""
    dialect = DIALECTS[config.dialect]
    urls = tuple(url.rstrip("/") for url in config.url)
    authorised = headers(dialect.key_variable if config.key_variable is None else config.key_variable)
    described, urls = asyncio.run(describe(urls, dialect, authorised))
    teacher = HttpTeacher(config.dialect, config.model, described, config.revision, config.scale, config.limits)
    asked = AskedOverHttp(teacher, urls, authorised, out, config.patience(), budget, config.in_flight, config.documents)
    origin = Origin.of(candidates, shard_rows, teacher.teacher_id)
    return Job(candidates, out, origin, asked, config.give_up_seconds, config.max_refused)


def main(config: Config) -> int:
    """Label, or with --dry-run say what it would cost. Returns the exit code."""
    candidates = CandidateFile.open(config.candidates)
    if config.dry_run:
        pace = config.requests_per_minute
        print(forecast_cost(candidates, config.shard_rows, config.limits, config.documents, config.prices, pace))
        return 0
    budget = Budget(config.prices, config.budget, config.requests_per_minute)
    return run_corpus(config, candidates, config.out, config.shard_rows, partial(make_job, config, budget))


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python clients/label_over_http.py --dialect tei --url http://localhost:8080 "
        "--candidates data/world/candidates.parquet --out runs/world/labels",
    )
