"""Days of traffic through the router's own code: assignment, ranking, log; users who look and click by a click model.

Simulated: the users, the clock of the log, and the model server, which is replaced by a table of the checkpoints' own
scores. Real: everything from the request to the raw log.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.retraining.searches import Search
from clients.ab.router.api import Document, Event, EventsRequest, RankRequest
from clients.ab.router.page_service import PageService, ServiceSettings
from clients.triton.scoring import ModelScores, PageTensors
from ranking.click_models import ClickModel
from training.evaluation.checkpoint_scores import Scorer
from training.world.documents import Documents

AT_ONCE = 64  # pages in flight, so that their lines share a write to the disk
LOOKED_AT = 10  # documents from the top that a user may look at
SECOND, DAY = 1_000_000, 86_400_000_000
Pair = tuple[bytes, bytes, bytes]


class CheckpointScores:
    """Checkpoints' scores in place of a Triton server: model -> (query, title, summary) -> score."""

    renewals = 0

    def __init__(self) -> None:
        self._scores: dict[str, dict[Pair, float]] = {}
        self._version: dict[str, str] = {}

    def add(self, model: str, version: str, checkpoint: Path, pairs: pa.Table) -> None:
        """Score all pairs (query, title, summary) by a checkpoint."""
        columns = [pairs.column(name).to_pylist() for name in ("query", "title", "summary")]
        scores = Scorer.load(checkpoint).score(*columns).tolist()
        keys = zip(*([text.encode() for text in column] for column in columns))
        self._scores[model], self._version[model] = dict(zip(keys, scores)), version

    async def score(self, model: str, page: PageTensors, deadline_ms: float) -> ModelScores:
        """The page's scores, as the service of that model would give them."""
        (query,) = page.arrays["query"]
        of_model = self._scores[model]
        keys = zip(page.arrays["title"], page.arrays["summary"])
        values = np.array([of_model[query, title, summary] for title, summary in keys], np.float32)
        return ModelScores(values, self._version[model])

    async def served_limits(self, model: str, deadline_ms: float) -> dict[str, int]:
        """No limits."""
        return {}

    async def close(self) -> None:
        """Nothing to close."""


@dataclass(frozen=True)
class Page:
    """One page to come. at: microseconds since 1970; present: which of the search's documents are in stock."""

    request_id: str
    user: int
    at: int
    search: Search
    present: np.ndarray
    seed: int


def plan_day(
    day: date,
    before: list[Search | None],
    after: list[Search | None],
    turned: float,
    share: np.ndarray,
    pages: int,
    users: int,
    in_stock: int,
    rng: np.random.Generator,
) -> list[Page]:
    """A day's pages in order of time. before, after: each wish as it was and will be typed; turned: share of pages that
    follow the new taste already; users: how many people there are; in_stock: documents of a page.

    That not every document is there each time moves documents between positions, without which no log can tell
    position from relevance.
    """
    start = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * SECOND
    times = start + np.sort(rng.integers(0, DAY - SECOND, pages))
    activity = np.random.default_rng(users).lognormal(0, 0.5, users)
    planned = []
    for number, at in enumerate(times.tolist()):
        search = None
        taste = after if rng.random() < turned else before
        while search is None:  # nobody has that wish yet
            search = taste[int(rng.choice(len(share), p=share))]
        present = np.sort(rng.permutation(len(search.rows))[:in_stock])
        user = int(rng.choice(users, p=activity / activity.sum()))
        planned.append(Page(f"{day}-{number:05d}", user, at, search, present, int(rng.integers(1 << 40))))
    return planned


async def serve(
    pages: list[Page], documents: Documents, models: CheckpointScores, experiment: Path, log: Path
) -> dict[str, int]:
    """Send pages, and the clicks on them, to the router's service; returns counts. Their lines are in `log` then."""
    now = pages[0].at
    settings = ServiceSettings(experiment=experiment, log=log, raw_ids=True, deadline_ms=60_000, log_wait_ms=60_000)
    service = PageService(settings, models, lambda: now)
    model = ClickModel()
    counts = {"pages": 0, "clicks": 0}
    await service.start()

    async def one(page: Page) -> None:
        search = page.search
        listed = [
            Document(
                doc_id=documents.doc_ids[row].as_py(),
                title=documents.titles[row].as_py(),
                summary=documents.summaries[row].as_py(),
                prior=None,
            )
            for row in (search.rows[place] for place in page.present)
        ]
        request = RankRequest(
            user_id=f"u{page.user}", query=search.text, documents=listed, request_id=page.request_id, platform="web",
            min_probability=None, max_chunks=None, arm=None,
        )  # fmt: skip
        answer, _ = await service.rank(request, time.perf_counter())
        grade_of = dict(zip((d.doc_id for d in listed), search.grades[page.present].tolist()))
        shown = answer["ranking"][:LOOKED_AT]
        visit = model.simulate(np.array([[grade_of[doc] for doc in shown]]), np.random.default_rng(page.seed))
        events = []
        for place in np.flatnonzero(visit.clicked[0]):
            name = {"request_id": page.request_id, "doc_id": shown[place]}
            stayed = round(float(visit.dwell_seconds[0, place]), 2)
            events += [Event(**name, type="click"), Event(**name, type="dwell", dwell_seconds=stayed)]
        if events:
            await service.take_events(EventsRequest(events=events))
        counts["pages"] += 1
        counts["clicks"] += len(events) // 2

    try:
        for first in range(0, len(pages), AT_ONCE):
            now = pages[first].at
            await asyncio.gather(*(one(page) for page in pages[first : first + AT_ONCE]))
    finally:
        await service.stop()
    return counts
