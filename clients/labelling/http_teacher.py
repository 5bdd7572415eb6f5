"""A teacher behind HTTP: which one it is, how its requests are made, and how its scores are read."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from clients.labelling.http_dialects import DIALECTS, BadAnswer, Dialect, RankingRequest
from ranking.errors import InputError
from ranking.text import normalise

logger = logging.getLogger("labels")

ScoreScale = Literal["raw", "probability"]
MAX_LOGIT_PROBABILITY = 1 - 1e-7  # 1.0 has no logit; services round to about seven digits
IDENTIFY_SECONDS = 10.0


@dataclass(frozen=True)
class CharacterLimits:
    """Longest fields that are sent, in characters: a service has its own tokenizer, which is not at hand.

    Args:
        query: characters of the query
        title: characters of the title
        summary: characters of the summary; what a service bills grows with it
    """

    query: int = 200
    title: int = 200
    summary: int = 1000

    def __post_init__(self) -> None:
        for name in ("query", "title", "summary"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} characters: at least 1 is needed")


@dataclass(frozen=True)
class HttpTeacher:
    """One reranking service, or several servers of the same model.

    model: its name in requests; described: what the servers say they serve; revision: what the user says of it, for
    services that do not; scale: "probability" turns scores in 0..1 into logits.
    """

    dialect_name: str
    model: str
    described: str
    revision: str
    scale: ScoreScale
    limits: CharacterLimits

    @property
    def dialect(self) -> Dialect:
        """The service's form."""
        return DIALECTS[self.dialect_name]

    @property
    def teacher_id(self) -> str:
        """16 hex digits of everything that is known to move a score."""
        limits = [self.limits.query, self.limits.title, self.limits.summary]
        known = [self.dialect_name, self.model, self.described, self.revision, self.scale, limits]
        return hashlib.sha256(json.dumps(known, ensure_ascii=False).encode()).hexdigest()[:16]

    def texts(self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]) -> list[tuple[bytes, ...]]:
        """(query, title, summary) as they are sent, normalised and cut to their limits, in UTF-8; one tuple per row."""
        limits = (self.limits.query, self.limits.title, self.limits.summary)
        cut = [
            [normalise(text[: 4 * limit])[:limit].encode("utf-8", "replace") for text in texts]
            for texts, limit in zip((queries, titles, summaries), limits)
        ]
        return list(zip(*cut))

    def body(self, texts: Sequence[tuple[bytes, ...]]) -> dict:
        """The request for pairs of one query."""
        queries, titles, summaries = ([text.decode() for text in column] for column in zip(*texts))
        return self.dialect.body(self.model, RankingRequest(queries[0], titles, summaries))

    def scores(self, answer: object, documents: int) -> dict[int, float]:
        """{index of the document: score to keep}. BadAnswer as Dialect.scores, or for a probability outside 0..1."""
        found = self.dialect.scores(answer, documents)
        return found if self.scale == "raw" else {index: logit(score) for index, score in found.items()}


def logit(probability: float) -> float:
    """log(p / (1 - p)), with p kept 1e-7 away from 0 and 1. BadAnswer if p lies outside 0..1."""
    if not 0 <= probability <= 1:
        raise BadAnswer(f"the score {probability} is no probability; label with --scale raw")
    kept = min(max(probability, 1 - MAX_LOGIT_PROBABILITY), MAX_LOGIT_PROBABILITY)
    return math.log(kept / (1 - kept))


def headers(variable: str) -> dict[str, str]:
    """The authorisation header with the key in an environment variable; none for an empty name. InputError if unset."""
    if not variable:
        return {}
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(f"the environment variable {variable} is not set; it holds the service's key")
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"the environment variable {variable} holds characters that no key has")
    return {"authorization": f"Bearer {key}"}


async def describe(urls: Sequence[str], dialect: Dialect, authorised: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """(what the servers say they serve, as JSON text, which of them said it); empty and all where none says.

    A server that does not say it is left out, with a warning: nobody knows whose scores it would give. InputError: none
    answers, or two of them serve different models.
    """
    if not dialect.identity_path:
        return "", tuple(urls)
    async with httpx.AsyncClient(headers=authorised, timeout=IDENTIFY_SECONDS) as client:
        found = await asyncio.gather(*(identify(client, url, dialect) for url in urls))
    known = {url: text for url, text in zip(urls, found) if not isinstance(text, Exception)}
    if not known:
        raise InputError("; ".join(f"{url} does not say what it serves: {text}" for url, text in zip(urls, found)))
    if len(set(known.values())) > 1:
        raise InputError(
            f"the servers serve different models: {', '.join(f'{u}: {text}' for u, text in known.items())}"
        )
    for url, text in zip(urls, found):
        if url not in known:
            logger.warning("%s is not asked: it does not say what it serves: %s", url, text)
    return next(iter(known.values())), tuple(known)


async def identify(client: httpx.AsyncClient, url: str, dialect: Dialect) -> str | Exception:
    """What a server says it serves, as JSON text, or why it does not."""
    try:
        # around the whole: httpx's own limit is for each piece, and a server may send one byte at a time
        async with asyncio.timeout(IDENTIFY_SECONDS):
            answer = await client.get(url + dialect.identity_path)
        answer.raise_for_status()
        return json.dumps(dialect.identity(answer.json()), sort_keys=True)
    except TimeoutError:
        return TimeoutError(f"no answer within {IDENTIFY_SECONDS:g} s")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, RecursionError) as problem:
        return problem


def answer_file(folder: Path, shard: int) -> Path:
    """Where the answers of a shard in hand are kept."""
    return folder / f"answers-{shard:05d}.jsonl"


class AnswerLog:
    """Every answer of the shards in hand, written as it comes: a killed run pays for none of them again.

    A line holds the positions in the shard and their scores. A line that a kill cut short is passed over. The log of a
    shard goes away when the shard is finished.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, shard: int, scores: Mapping[int, float]) -> None:
        """Append an answer's scores, float32 values by position in the shard."""
        with answer_file(self.folder, shard).open("a", encoding="utf-8") as stream:
            # on a line of its own, also behind one that a kill cut short
            stream.write("\n" + json.dumps({"positions": list(scores), "scores": list(scores.values())}) + "\n")

    def read(self, shard: int) -> dict[int, float]:
        """{position: score} of all whole lines."""
        path = answer_file(self.folder, shard)
        found: dict[int, float] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                answer = json.loads(line)
            except ValueError:  # cut short by a kill
                continue
            found |= dict(zip(answer["positions"], answer["scores"]))
        return found

    def drop(self, shard: int) -> None:
        """Forget a shard's answers."""
        answer_file(self.folder, shard).unlink(missing_ok=True)
