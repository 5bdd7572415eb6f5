"""Pick which (query, document) pairs the teacher labels, from a pool too large to label whole.

Queries are drawn by their frequency in the log, tempered so that the tail is not lost; of each query's pool, documents
are drawn by BM25 rank bands, so that the student sees what it will have to rank first, but also the far and the wrong.
Spellings of one query, and documents of one text, count once. The pool is read out of core, or by Spark; one batch of
queries with their pools is in memory. See docs/clicks.md.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from ranking.bm25 import bm25_scores
from ranking.errors import DataError
from ranking.files import write_json
from ranking.program import run
from ranking.query_engine import QueryEngine, QueryEngineSettings, add_table, told
from ranking.schema import TABLES, write_table
from training.clicks.event_columns import event_defaults
from training.clicks.log_tables import file_columns, open_view, parquet_files
from training.clicks.normalised_queries import number_queries

LOGGER = logging.getLogger(__name__)
ROWS_AT_ONCE = 20_000  # pool rows that BM25 ranks together


@dataclass(kw_only=True)
class Config(QueryEngineSettings):
    """Sample candidates to label from a larger pool.

    Args:
        pool: rows of the candidates table: a Parquet file, a folder of them, or a glob in quotes
        out: the candidates file to write; counts go to a .report.json beside it
        events: click log (file, folder or glob) that says how often each query is asked; without it all are alike
        queries: how many queries to draw
        bands: BM25 rank bands and how many documents to draw from each: "10:8" is 8 of the top 10, the next band starts
            at rank 11; "rest" ends the list
        frequency_power: queries are drawn in proportion to frequency to this power: 1 as asked, 0 all alike
        exclude: tables whose queries must not be drawn, such as the judged dev and test splits
        on_bad_row: "stop" at the first bad row, or "reject" them to a .rejects.tsv beside the output
        seed: another seed draws other queries and documents
    """

    pool: str
    out: Path
    events: str | None = None
    queries: int = 4_000
    bands: list[str] = field(default_factory=lambda: ["10:8", "50:8", "rest:4"])
    frequency_power: float = 0.5
    exclude: list[Path] = field(default_factory=list)
    on_bad_row: Literal["stop", "reject"] = "stop"
    seed: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.queries < 1 or self.frequency_power < 0:
            raise ValueError("queries must be at least 1, frequency_power 0 or more")
        read_bands(self.bands)


def read_bands(bands: list[str]) -> list[tuple[float, int]]:
    """[(last rank, documents)] of "10:8", "50:8", "rest:4". ValueError names a band out of order or not a number."""
    found: list[tuple[float, int]] = []
    for band in bands:
        last, _, count = band.partition(":")
        try:
            rank = float("inf") if last == "rest" else int(last)
            found.append((rank, int(count)))
        except ValueError as problem:
            raise ValueError(f"bands: {band!r} is not LAST_RANK:DOCUMENTS or rest:DOCUMENTS") from problem
        if found[-1][1] < 0 or rank < 1 or (len(found) > 1 and rank <= found[-2][0]):
            raise ValueError(f"bands: {band!r} must have a higher rank than the band before and a count of 0 or more")
    if not sum(count for _, count in found):
        raise ValueError("bands: no document would be drawn")
    return found


def draw_from_bands(scores: np.ndarray, bands: list[tuple[float, int]], rng: np.random.Generator) -> np.ndarray:
    """Rows drawn by rank band, best first. What a band cannot give is drawn from the ranks not drawn so far.

    scores: float [n], higher ranks first, ties in row order. Returns row numbers, at most the sum of all counts.
    """
    ranked = np.argsort(-scores, kind="stable")
    first, drawn = 0, np.zeros(len(ranked), dtype=bool)
    for last_rank, count in bands:
        last = int(min(last_rank, len(ranked)))
        drawn[first + rng.permutation(max(0, last - first))[:count]] = True
        first = max(first, last)
    missing = sum(count for _, count in bands) - int(drawn.sum())
    left = np.flatnonzero(~drawn)
    drawn[rng.permutation(left)[:missing]] = True
    return ranked[drawn]


def sample_candidates(config: Config) -> dict:
    """Write the sampled candidates and a report; returns the report. DataError or InputError on bad input."""
    table = TABLES["candidates"]
    files = parquet_files(config.pool)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".sample-", dir=config.temp_folder or out.parent) as spill:
        engine = config.open_engine(Path(spill))
        try:
            rejects = out.with_suffix(".rejects.tsv") if config.on_bad_row == "reject" else None
            read, refused = open_view(engine, "pool", table, files, rejects)
            report = {"pairs_read": read, "pairs_rejected": refused}
            _count_queries(engine, config)
            report |= _draw_queries(engine, config)
            report["pairs"] = write_table(out, "candidates", _draw_documents(engine, config, report))
        except engine.problems as problem:
            raise DataError(config.pool, told(engine, problem)) from problem
        finally:
            engine.close()
    write_json(out.with_suffix(".report.json"), report)
    return report


def _count_queries(engine: QueryEngine, config: Config) -> None:
    """Make `asked` (query_no, pages): the pool's queries and on how many pages of the log each stands."""
    excluded = ["SELECT NULL::VARCHAR AS query WHERE false"]
    for number, path in enumerate(config.exclude):
        engine.read_files(f"excluded_{number}", [Path(path)])
        excluded.append(f"SELECT query FROM excluded_{number}")
    engine.view("excluded", " UNION ALL ".join(excluded))
    relations = ["pool", "excluded"]
    if config.events:
        files = parquet_files(config.events)
        columns = file_columns(files, TABLES["events"], defaults=event_defaults())
        open_view(engine, "events", TABLES["events"], files, None, columns)
        relations.append("events")
    number_queries(engine, *relations)
    pages = "SELECT NULL::INTEGER AS query_no, 0 AS pages WHERE false"
    if config.events:
        pages = """SELECT query_no, count(DISTINCT request_id) AS pages
                   FROM events JOIN spellings ON query = raw GROUP BY query_no"""
    engine.table(
        "asked",
        f"""
        WITH pages AS ({pages}),
             pooled AS (SELECT DISTINCT query_no FROM pool JOIN spellings ON query = raw),
             barred AS (SELECT DISTINCT query_no FROM excluded JOIN spellings ON query = raw)
        SELECT query_no, coalesce(pages, 0) AS pages
        FROM pooled LEFT JOIN pages USING (query_no) ANTI JOIN barred USING (query_no)
        """,
    )


def _draw_queries(engine: QueryEngine, config: Config) -> dict[str, int]:
    """Make `chosen` (query_no): weighted draw without replacement (Efraimidis and Spirakis 2006); returns counts."""
    columns = engine.columns("SELECT query_no, pages FROM asked ORDER BY query_no")
    numbers, pages = columns["query_no"], columns["pages"].astype(np.float64)
    # a query of the pool that the log never shows is as rare as one shown once
    weight = np.maximum(pages, 1) ** config.frequency_power
    draws = np.random.default_rng(config.seed).exponential(size=len(numbers)) / weight
    chosen = pa.table({"query_no": np.sort(numbers[np.argsort(draws)[: config.queries]])})
    add_table(engine, "chosen", chosen)
    if not len(numbers):
        raise DataError(config.pool, "no query is left to draw from: the pool is empty or all of it is excluded")
    if len(numbers) < config.queries:
        LOGGER.warning("the pool has only %d queries, %d were asked for", len(numbers), config.queries)
    return {"pool_queries": len(numbers), "queries": min(config.queries, len(numbers))}


def _draw_documents(engine: QueryEngine, config: Config, report: dict) -> Iterator[pa.Table]:
    """The sample in pieces by query; adds pool_pairs and duplicates to the report."""
    bands = read_bands(config.bands)
    # one row per document and per text: the lowest id stands for the rest
    engine.view(
        "drawn",
        """
        SELECT query_no, min(query_id) OVER (PARTITION BY query_no) AS query_id, doc_id, title, summary,
               row_number() OVER (PARTITION BY query_no, doc_id ORDER BY query_id) AS copy,
               row_number() OVER (PARTITION BY query_no, title, summary ORDER BY doc_id, query_id) AS twin
        FROM pool JOIN spellings ON query = raw SEMI JOIN chosen USING (query_no)
        """,
    )
    result = engine.batches("""
        SELECT query_no, query_id, doc_id, query, title, summary, copy > 1 OR twin > 1 AS duplicate
        FROM drawn JOIN queries USING (query_no) ORDER BY query_no, doc_id
    """)
    report |= {"pool_pairs": 0, "duplicates": 0}
    bar = tqdm(total=report["queries"], desc="candidates", unit="query")
    for piece in _whole_queries(result):
        report["pool_pairs"] += len(piece)
        duplicate = piece.column("duplicate").to_numpy()
        report["duplicates"] += int(duplicate.sum())
        piece = piece.filter(pa.array(~duplicate))
        rows = piece.select(["query", "title", "summary"]).to_pydict()
        scores = bm25_scores(rows["query"], rows["title"], rows["summary"])
        numbers = piece.column("query_no").to_numpy()
        picked = []
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(numbers)]):
            rng = np.random.default_rng([config.seed, int(numbers[start])])
            picked.append(start + draw_from_bands(scores[start:end], bands, rng))
        bar.update(len(starts))
        yield piece.take(np.concatenate(picked)).select(TABLES["candidates"].schema.names)
    bar.close()


def _whole_queries(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Rows ordered by query_no, regrouped into tables of about ROWS_AT_ONCE rows that never split a query."""
    held: list[pa.Table] = []
    for batch in batches:
        held.append(pa.Table.from_batches([batch]))
        if sum(map(len, held)) < ROWS_AT_ONCE:
            continue
        rows = pa.concat_tables(held)
        numbers = rows.column("query_no").to_numpy()
        # cut where the rows say so, not where a batch ended: engines end their batches at different rows
        while len(numbers) > ROWS_AT_ONCE and numbers[0] != numbers[-1]:
            whole = int(np.searchsorted(numbers, numbers[ROWS_AT_ONCE]))
            cut = whole or int(np.searchsorted(numbers, numbers[0], "right"))
            yield rows.slice(0, cut)
            rows, numbers = rows.slice(cut), numbers[cut:]
        held = [rows]
    if held and sum(map(len, held)):
        yield pa.concat_tables(held)


def main(config: Config) -> None:
    """Write the sample and print its report."""
    print(json.dumps(sample_candidates(config), indent=2))


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m training.sample_candidates --pool 'pool/*.parquet' --events 'logs/*.parquet' "
        "--exclude data/shop/judgments/test.parquet --out data/shop/candidates.parquet",
    )
