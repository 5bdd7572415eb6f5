"""The built-in world's click log: users, sessions, pages and clicks, with robots among them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ranking.click_models import SATISFIED_SECONDS, ClickModel
from ranking.errors import InputError
from ranking.schema import TABLES
from training.world.documents import Documents, popularity

START = np.datetime64("2026-01-05T00:00:00", "us")
DAYS = 28
SESSIONS_PER_USER = 6
# The logged ranker: it knows grades through noise that stays with a pair and noise anew each time it ranks. The second
# makes a pair appear at several positions, without which no log can tell position from relevance.
GRADE_WEIGHT, PAIR_NOISE, PAGE_NOISE = 0.5, 0.7, 0.9
CHUNK = 20_000
MESS = (str.upper, str.title, lambda text: f"  {text.replace(' ', '  ')} ", lambda text: text.replace("e", "\uff45", 1))


@dataclass(frozen=True)
class ClickLog:
    """Page views. query: row of the log's query list [pages]; doc, clicked, dwell: [pages, positions]."""

    query: np.ndarray
    doc: np.ndarray
    clicked: np.ndarray
    dwell: np.ndarray
    user: np.ndarray
    robot: np.ndarray
    examined_share: np.ndarray


def simulate_log(
    candidates: np.ndarray,
    grades: np.ndarray,
    model: ClickModel,
    rng: np.random.Generator,
    clicked_pairs: int,
    shown: int,
    robot_share: float,
) -> ClickLog:
    """Page views until `clicked_pairs` distinct (query, document) pairs have a satisfied click by a person.

    candidates: document rows int [queries, n], grades: int8 [queries, n]; shown: positions of a page. Robots add
    robot_share of the pages: they click most of what they see. InputError if the candidates cannot yield that many.
    """
    chance = np.asarray(model.attractiveness) * np.asarray(model.satisfaction)
    likely = int((chance[grades] > 0.02).sum())  # the rest would take for ever to be clicked
    if clicked_pairs > 0.7 * likely:
        most = int(0.7 * likely)
        raise InputError(f"clicked_pairs is {clicked_pairs}: {len(grades)} log queries yield {most} in reasonable time")
    share = popularity(len(grades), rng, even=max(12, len(grades) / 100))
    taste = PAIR_NOISE * rng.standard_normal(grades.shape)
    found = np.zeros(grades.size, dtype=bool)
    chunks = []
    # small worlds must not overshoot by a whole chunk
    pages_at_once = min(CHUNK, max(50, clicked_pairs // 4))
    while (before := int(found.sum())) < clicked_pairs:
        query = rng.choice(len(grades), pages_at_once, p=share)
        score = GRADE_WEIGHT * grades[query] + taste[query]
        score = score + PAGE_NOISE * rng.standard_normal(score.shape)
        order = np.argsort(-score, axis=1, kind="stable")[:, :shown]
        visits = model.simulate(np.take_along_axis(grades[query], order, 1), rng)
        satisfied = visits.clicked & (visits.dwell_seconds >= SATISFIED_SECONDS)
        pair = np.where(satisfied, query[:, None] * grades.shape[1] + order, -1).ravel()
        keep = _pages_until(pair, found, clicked_pairs - before, shown)
        found[pair[: keep * shown][pair[: keep * shown] >= 0]] = True
        part = (query, np.take_along_axis(candidates[query], order, 1), visits.clicked, visits.dwell_seconds)
        chunks.append((*(column[:keep] for column in part), visits.examined[:keep]))
    query, doc, clicked, dwell, examined = (np.concatenate(parts) for parts in zip(*chunks))
    users = max(1, len(query) // SESSIONS_PER_USER)
    activity = rng.lognormal(0, 0.8, size=users)
    user = rng.choice(users, len(query), p=activity / activity.sum())
    log = ClickLog(query, doc, clicked, dwell, user, np.zeros(len(query), dtype=bool), examined.mean(0))
    return _with_robots(log, round(robot_share * len(query)), users, rng)


def _pages_until(pair: np.ndarray, found: np.ndarray, wanted: int, shown: int) -> int:
    """How many pages it takes until `wanted` new pairs are found; all of them if they do not suffice."""
    hits = np.flatnonzero(pair >= 0)
    hits = hits[~found[pair[hits]]]
    _, first = np.unique(pair[hits], return_index=True)
    if len(first) < wanted:
        return len(pair) // shown
    return int(hits[np.sort(first)[wanted - 1]]) // shown + 1


def _with_robots(log: ClickLog, pages: int, users: int, rng: np.random.Generator) -> ClickLog:
    """Add pages viewed by robots: few users with many pages, seven of ten results clicked, long dwell."""
    if not pages:
        return log
    source = rng.integers(len(log.query), size=pages)
    clicked = rng.random((pages, log.doc.shape[1])) < 0.7
    dwell = np.where(clicked, rng.uniform(31, 40, clicked.shape), 0).astype(np.float32)
    user = users + rng.integers(max(1, pages // 200), size=pages)
    order = rng.permutation(len(log.query) + pages)

    def mixed(people: np.ndarray, robots: np.ndarray) -> np.ndarray:
        return np.concatenate([people, robots])[order]

    return ClickLog(
        mixed(log.query, log.query[source]),
        mixed(log.doc, log.doc[source]),
        mixed(log.clicked, clicked),
        mixed(log.dwell, dwell),
        mixed(log.user, user),
        mixed(log.robot, np.ones(pages, dtype=bool)),
        log.examined_share,
    )


def event_tables(
    log: ClickLog, queries: list[str], documents: Documents, rng: np.random.Generator, messy_share: float
) -> Iterator[pa.Table]:
    """The log as `events`, in time order, in pieces. messy_share of the pages carry the query in another spelling."""
    pages, shown = log.doc.shape
    when = START + np.sort(rng.integers(0, DAYS * 86_400_000_000, size=pages)).astype("timedelta64[us]")
    mess = np.where(rng.random(pages) < messy_share, rng.integers(1, len(MESS) + 1, size=pages), 0)
    spellings = pa.array([change(text) for change in (str, *MESS) for text in queries])
    positions = np.tile(np.arange(1, shown + 1, dtype=np.int32), CHUNK)
    for start in range(0, pages, CHUNK):
        part = slice(start, min(start + CHUNK, pages))
        n = part.stop - part.start

        def of_page(values: pa.Array) -> pa.Array:
            return values.take(np.repeat(np.arange(n), shown))  # noqa: B023 (used within this turn)

        doc = log.doc[part].ravel()
        columns = {
            "request_id": of_page(pa.array([f"r{number:09d}" for number in range(part.start, part.stop)])),
            "doc_id": documents.doc_ids.take(doc),
            "user_id": of_page(pa.array([f"u{number:06d}" for number in log.user[part]])),
            "timestamp": of_page(pa.array(when[part], pa.timestamp("us", tz="UTC"))),
            "query": of_page(spellings.take(mess[part] * len(queries) + log.query[part])),
            "title": documents.titles.take(doc),
            "summary": documents.summaries.take(doc),
            "position": positions[: n * shown],
            "clicked": log.clicked[part].ravel(),
            "dwell_seconds": log.dwell[part].ravel(),
            "arm": pa.array(["logged"] * (n * shown)),
        }
        yield pa.table(columns, schema=TABLES["events"].schema)
