"""Simulated users on the real router: searches with known relevance, clicks by a click model, over HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from clients.ab.experiment.split import bucket
from ranking.click_models import ClickModel
from ranking.errors import InputError
from ranking.files import write_json
from ranking.first_stage import first_stage_scores
from ranking.program import run
from ranking.schema import read_table
from ranking.telemetry import bars_are_read

logger = logging.getLogger("simulate_traffic")


@dataclass
class Config:
    """Send simulated searches to the A/B router and click on what it shows, by a click model with known grades.

    Args:
        data: dataset folder; its judged queries are searched, its grades decide what users like
        split: judged split whose queries are searched
        router: address of the A/B router
        users: simulated users
        pages_per_user: mean pages of a user; the number is geometric, as in real logs
        shown: documents that a user may look at, from the top
        documents: documents sent with each query at most
        send_prior: send each document's BM25 score with it, as a caller whose first stage is BM25 would
        click_model: pbm | dbn
        zipf: skew of query frequencies; 0 is uniform
        concurrency: pages in flight
        fault: break the experiment on purpose: "lost" loses 30% of the upper half of the buckets (the second of two
            equal arms) before the router sees them, "bot" adds a user of 5% of all pages who clicks everything
        experiment_seed: the experiment's seed, for fault "lost"
        seed: of users, queries and clicks
        truth_out: JSON file for the page CTR that each model's ranking truly has; needs --allow-forced-arm on the
            router
        arms: arms to measure for truth_out
    """

    data: Path
    router: str = "http://127.0.0.1:8080"
    split: str = "test"
    users: int = 2000
    pages_per_user: float = 3.0
    shown: int = 10
    documents: int = 24
    send_prior: bool = False
    click_model: Literal["pbm", "dbn"] = "pbm"
    zipf: float = 0.7
    concurrency: int = 16
    fault: Literal["none", "lost", "bot"] = "none"
    experiment_seed: str = ""
    seed: int = 1
    truth_out: Path | None = None
    arms: tuple[str, ...] = ("baseline", "student")

    def __post_init__(self):
        for name in ("users", "pages_per_user", "shown", "documents", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")


@dataclass(frozen=True)
class Search:
    """A judged query: the documents as the router takes them, and each one's grade."""

    query: str
    documents: list[dict[str, Any]]
    grades: dict[str, int]


def read_searches(config: Config) -> list[Search]:
    """The split's queries with up to config.documents documents, in shuffled order: the caller's own ranking is bad."""
    rng = np.random.default_rng([config.seed, 1])
    table = read_table(config.data / "judgments" / f"{config.split}.parquet", "judgments")
    if config.send_prior:
        prior = pa.array(first_stage_scores(None, config.data, table).astype(np.float64))
        table = table.append_column("prior", prior)
    fields = ("doc_id", "title", "summary", *(["prior"] if config.send_prior else []))
    searches = []
    for query_id in pc.unique(table.column("query_id")).to_pylist():
        rows = table.filter(pc.equal(table.column("query_id"), query_id)).to_pylist()
        chosen = [rows[i] for i in rng.permutation(len(rows))[: config.documents]]
        documents = [{name: row[name] for name in fields} for row in chosen]
        searches.append(Search(rows[0]["query"], documents, {r["doc_id"]: r["grade"] for r in chosen}))
    if not searches:
        raise InputError(f"{config.data}: split {config.split} has no judged query")
    return searches


@dataclass(frozen=True)
class PlannedPage:
    """One page to come: who searches what, on which device, and the seed of what they will do."""

    user_id: str
    search: int
    platform: str
    seed: int
    greedy: bool = False


def plan_pages(config: Config, searches: int) -> list[PlannedPage]:
    """All pages of all users in the order they are sent, the same for the same seed whatever the router answers."""
    rng = np.random.default_rng([config.seed, 2])
    weights = 1.0 / np.arange(1, searches + 1) ** config.zipf
    pages: list[PlannedPage] = []
    for user in range(config.users):
        user_id = f"user-{config.seed}-{user}"
        if config.fault == "lost" and bucket(config.experiment_seed, user_id) >= 0.5 and rng.random() < 0.3:
            continue
        platform = "mobile" if rng.random() < 0.6 else "desktop"
        chosen = rng.choice(searches, size=rng.geometric(1 / config.pages_per_user), p=weights / weights.sum())
        pages += [PlannedPage(user_id, int(s), platform, int(rng.integers(1 << 40))) for s in chosen]
    if config.fault == "bot":
        searched = rng.integers(searches, size=max(len(pages) // 20, 1))
        pages += [PlannedPage("bot", int(s), "desktop", int(rng.integers(1 << 40)), greedy=True) for s in searched]
    return [pages[i] for i in rng.permutation(len(pages))]


class Traffic:
    """The simulated users of one run, and what became of their pages."""

    def __init__(self, config: Config, searches: list[Search], client: httpx.AsyncClient):
        self.config, self.searches, self.client = config, searches, client
        self.model = ClickModel(kind=config.click_model)
        self.counts: Counter[str] = Counter()
        self.pages_of_arm: Counter[str] = Counter()
        self.clicked_pages_of_arm: Counter[str] = Counter()

    async def page(self, planned: PlannedPage) -> None:
        """One search: rank, look, click, stay. An error answer is counted by status, never retried: users would not."""
        search = self.searches[planned.search]
        body = {
            "user_id": planned.user_id,
            "query": search.query,
            "documents": search.documents,
            "platform": planned.platform,
        }
        try:
            answer = await self.client.post("/rank", json=body)
        except httpx.HTTPError as problem:
            self.counts[f"pages without an answer ({type(problem).__name__})"] += 1
            return
        if answer.status_code != 200:
            self.counts[f"pages refused ({answer.status_code})"] += 1
            return
        try:
            ranked = answer.json()
            fallback, arm = bool(ranked["fallback"]), ranked["arm"] or "outside"
            events = self.events(ranked["request_id"], ranked["ranking"][: self.config.shown], search, planned)
        except (ValueError, LookupError, TypeError):  # what answers there is no router
            self.counts["pages without an answer that a router gives"] += 1
            return
        self.counts["pages"] += 1
        self.counts["fallbacks"] += fallback
        self.pages_of_arm[arm] += 1
        if events:
            self.clicked_pages_of_arm[arm] += 1
            await self.send(events)

    def events(self, request_id: str, shown: list[str], search: Search, planned: PlannedPage) -> list[dict[str, Any]]:
        """The clicks and dwell times of a user who looks at the documents shown, as POST /events takes them."""
        grades = np.array([[search.grades[doc] for doc in shown]])
        visits = self.model.simulate(grades, np.random.default_rng(planned.seed))
        events: list[dict[str, Any]] = []
        for position, doc in enumerate(shown):
            if visits.clicked[0, position] or planned.greedy:
                seconds = 0.1 if planned.greedy else round(float(visits.dwell_seconds[0, position]), 2)
                events.append({"request_id": request_id, "doc_id": doc, "type": "click"})
                events.append({**events[-1], "type": "dwell", "dwell_seconds": seconds})
        return events

    async def send(self, events: list[dict[str, Any]]) -> None:
        """Post events to the router; failures are counted."""
        try:
            answer = await self.client.post("/events", json={"events": events})
        except httpx.HTTPError as problem:
            self.counts[f"event posts without an answer ({type(problem).__name__})"] += 1
            return
        self.counts["events" if answer.status_code == 200 else f"event posts refused ({answer.status_code})"] += len(
            events
        )

    async def drive(self, pages: list[PlannedPage]) -> None:
        """All pages, config.concurrency at a time."""
        waiting = iter(pages)
        progress = tqdm(total=len(pages), desc="pages", unit="page", disable=not bars_are_read())

        async def worker() -> None:
            for planned in waiting:
                await self.page(planned)
                progress.update()

        await asyncio.gather(*(worker() for _ in range(self.config.concurrency)))
        progress.close()

    async def true_page_ctr(self, arm: str, draws: int = 400) -> float:
        """Page CTR of an arm's ranking over the planned query frequencies, by many draws of the click model per
        query."""
        rng = np.random.default_rng([self.config.seed, 3])
        weights = 1.0 / np.arange(1, len(self.searches) + 1) ** self.config.zipf
        rates = np.zeros(len(self.searches))
        searches = tqdm(self.searches, desc=f"truth of {arm}", unit="query", disable=not bars_are_read())
        for number, search in enumerate(searches):
            body = {"user_id": f"truth-{number}", "query": search.query, "documents": search.documents, "arm": arm}
            try:
                answer = await self.client.post("/rank", json=body)
            except httpx.HTTPError as problem:
                raise InputError(f"the router ranked no page with arm {arm!r}: {problem!r}") from problem
            if answer.status_code != 200 or answer.json()["fallback"]:
                raise InputError(
                    f"the router did not rank with arm {arm!r}: {answer.text[:300]} (start it with --allow-forced-arm)"
                )
            grades = np.array([search.grades[doc] for doc in answer.json()["ranking"][: self.config.shown]])
            visits = self.model.simulate(np.tile(grades, (draws, 1)), rng)
            rates[number] = visits.clicked.any(axis=1).mean()
        return float((rates * weights).sum() / weights.sum())


async def simulate(config: Config) -> Traffic:
    """Run all planned pages. InputError if no healthy router answers."""
    searches = read_searches(config)
    pages = plan_pages(config, len(searches))
    limits = httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
    address = config.router if "//" in config.router else f"http://{config.router}"
    try:
        if urlsplit(address).port == 0:
            raise ValueError("nothing can listen on port 0")
    except ValueError as problem:
        raise InputError(f"{config.router} is no address of a router: {problem}") from problem
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=30.0, trust_env=False) as client:
        try:
            (await client.get("/health")).raise_for_status()
        except httpx.HTTPError as problem:
            raise InputError(f"no healthy router at {address}: {problem}; start clients/ab_router.py") from problem
        traffic = Traffic(config, searches, client)
        await traffic.drive(pages)
        if config.truth_out is not None:
            truth = {arm: await traffic.true_page_ctr(arm) for arm in config.arms}
            write_json(config.truth_out, {"page_ctr": truth})
        return traffic


def main(config: Config) -> int:
    """Simulate and print the counts. Returns 1 if a request had no answer, or no page was ranked."""
    began = time.perf_counter()
    traffic = asyncio.run(simulate(config))
    seconds = time.perf_counter() - began
    for name, count in sorted(traffic.counts.items()):
        print(f"{name}: {count:,}")
    for arm, pages in sorted(traffic.pages_of_arm.items()):
        print(f"{arm}: {pages:,} pages, page CTR {traffic.clicked_pages_of_arm[arm] / pages:.2%}")
    print(f"{traffic.counts['pages'] / seconds:.0f} pages a second")
    unanswered = sum(
        count for name, count in traffic.counts.items() if name.startswith(("pages without", "event posts without"))
    )
    return 1 if unanswered or not traffic.counts["pages"] else 0


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python clients/simulate_traffic.py --data data/world --router http://127.0.0.1:8080 --users 2000",
    )
