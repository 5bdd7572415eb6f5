"""A click log on real text: simulated users click the documents of queries whose judgments are withheld.

The semi-synthetic protocol of unbiased learning to rank (Joachims, Swaminathan and Schnabel, WSDM 2017): a weak ranker,
here BM25 with noise, ranks a query's judged documents; a user examines a position, and clicks an examined document with
a probability that follows its grade, and with some noise whatever its grade is. The graded form of that probability,
noise + (1 - noise) (2^grade - 1) / (2^highest - 1), is that of Ai et al. (SIGIR 2018). Noise in the ranking is needed:
without it every document keeps its position, and no log can tell position from relevance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from ranking.bm25 import bm25_scores
from ranking.click_models import BAIDU_EXAMINATION, ClickModel
from ranking.schema import MAX_GRADE, TABLES, write_table
from ranking.telemetry import bars_are_read
from training.sources.judged_collections import JudgedSource, Pair

Users = Literal["none", "baidu", "inverse-rank", "cascade"]
START = np.datetime64("2026-01-05T00:00:00", "us")
DAYS = 28
PAGES_PER_USER = 6
PAGES_PER_QUERY = 20
CHUNK = 10_000  # pages that are simulated together


@dataclass(kw_only=True)
class ClickSimulationSettings:
    """Simulated users of queries whose judgments are withheld.

    Args:
        simulate_clicks: write events.parquet, a click log of the train queries that judged_fraction takes the grades
            of, by users with a position bias as measured on Baidu's search (baidu), of 1 / position (inverse-rank), or
            who read from the top to the first click (cascade)
        page_views: pages in that log; 0 for 20 a query
        page_documents: documents of a page
        click_noise: probability that an examined document of grade 0 is clicked
        ranking_noise: spread of the noise in the log's ranking, in standard deviations of a query's BM25 scores
    """

    simulate_clicks: Users = "none"
    page_views: int = 0
    page_documents: int = 10
    click_noise: float = 0.1
    ranking_noise: float = 0.5

    def __post_init__(self):
        if self.page_views < 0 or self.page_documents < 1:
            raise ValueError("page_views must be 0 or more, page_documents at least 1")
        if not 0 <= self.click_noise < 1 or not self.ranking_noise >= 0:
            raise ValueError("click_noise must be a probability below 1, ranking_noise 0 or more")


def click_model(users: Users, noise: float, highest_grade: int) -> ClickModel:
    """The users of that name. Every click satisfies, as in the protocol, which knows no dwell."""
    gains = [(2.0 ** min(grade, highest_grade) - 1) / (2.0**highest_grade - 1) for grade in range(MAX_GRADE + 1)]
    attractiveness = tuple(noise + (1 - noise) * gain for gain in gains)
    examination = BAIDU_EXAMINATION if users == "baidu" else tuple(1 / k for k in range(1, 101))
    return ClickModel(
        # the cascade model (Craswell et al., WSDM 2008) is the DBN whose every click satisfies and who never gives up
        kind="dbn" if users == "cascade" else "pbm",
        examination=examination,
        attractiveness=attractiveness,
        satisfaction=(1.0,) * (MAX_GRADE + 1),
        continuation=1.0,
        dwell_spread=0.0,
    )


def write_simulated_log(
    source: JudgedSource, withheld: Mapping[Pair, int], settings: ClickSimulationSettings, seed: int, path: Path
) -> dict[str, Any]:
    """Write the `events` table of simulated users of the withheld pairs; returns what dataset.json says of it.

    withheld: (query id, doc id) -> grade; a query is asked as often as any other.
    """
    rng = np.random.default_rng([seed, 4])
    model = click_model(settings.simulate_clicks, settings.click_noise, max(1, *withheld.values()))
    pairs = list(withheld)
    queries = {query_id: row for row, query_id in enumerate(dict.fromkeys(query_id for query_id, _ in pairs))}
    query_texts, (titles, summaries) = [source.queries[q] for q, _ in pairs], zip(*map(source.text, pairs))
    # one row per query, one column per document of it: the number of the pair, -1 where a query has fewer documents
    numbers = _rows_of([queries[query_id] for query_id, _ in pairs])
    there = numbers >= 0
    grades = np.where(there, np.array(list(withheld.values()))[numbers], -1)
    scores = np.where(there, bm25_scores(query_texts, titles, summaries)[numbers], np.nan)
    spread = np.nanstd(scores, axis=1, keepdims=True)
    scores = (scores - np.nanmean(scores, axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
    scores = np.where(there, scores, -np.inf)
    texts = {"doc_id": [d for _, d in pairs], "query": query_texts, "title": titles, "summary": summaries}
    columns = {name: pa.array(values, pa.string()) for name, values in texts.items()}
    pages = settings.page_views or PAGES_PER_QUERY * len(queries)
    clicks = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal clicks
        when = START + np.sort(rng.integers(0, DAYS * 86_400_000_000, size=pages)).astype("timedelta64[us]")
        with tqdm(total=pages, desc="simulated clicks", unit="page", disable=not bars_are_read(), leave=False) as bar:
            for start in range(0, pages, CHUNK):
                count = min(CHUNK, pages - start)
                asked = rng.integers(len(queries), size=count)
                noisy = scores[asked] + settings.ranking_noise * rng.standard_normal((count, scores.shape[1]))
                order = np.argsort(-noisy, axis=1, kind="stable")[:, : settings.page_documents]
                visits = model.simulate(np.take_along_axis(grades[asked], order, 1), rng)
                users = rng.integers(max(1, pages // PAGES_PER_USER), size=count)
                shown = np.take_along_axis(numbers[asked], order, 1)
                page, position = np.nonzero(shown >= 0)
                clicks += int(visits.clicked.sum())
                rows = {name: column.take(pa.array(shown[page, position])) for name, column in columns.items()}
                rows |= {
                    "request_id": pa.array([f"r{start + p:09d}" for p in range(count)]).take(pa.array(page)),
                    "user_id": pa.array([f"u{user:07d}" for user in users]).take(pa.array(page)),
                    "timestamp": pa.array(when[start + page], pa.timestamp("us", tz="UTC")),
                    "position": pa.array(position + 1, pa.int32()),
                    "clicked": pa.array(visits.clicked[page, position]),
                    "dwell_seconds": pa.array(visits.dwell_seconds[page, position], pa.float32()),
                    "arm": pa.array(["simulated"] * len(page), pa.string()),
                }
                bar.update(count)
                yield pa.table(rows, schema=TABLES["events"].schema)

    events = write_table(path, "events", tables())
    return {
        "users": settings.simulate_clicks,
        "queries": len(queries),
        "page_views": pages,
        "events": events,
        "clicks": clicks,
        "examination": None if model.kind == "dbn" else model.propensities(settings.page_documents).tolist(),
        "attractiveness": asdict(model)["attractiveness"],
        "ranking_noise": settings.ranking_noise,
    }


def _rows_of(row_of: list[int]) -> np.ndarray:
    """int [rows, largest row]: the indices that belong to each row, in order, then -1."""
    rows = np.array(row_of)
    order = np.argsort(rows, kind="stable")
    counts = np.bincount(rows)
    table = np.full((len(counts), counts.max()), -1)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    table[rows[order], np.arange(len(rows)) - starts] = order
    return table
