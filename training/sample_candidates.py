"""Pick which (query, document) pairs the teacher labels, from a pool too large to label whole.

Queries are drawn by their frequency in the log, tempered so that the tail is not lost. What else decides is the
strategy: nothing (random), BM25 rank bands, where rankers disagree, where a document may be on the wrong side of the
first places, or what spreads over the pool. Spellings of one query, and documents of one text, count once. The pool is
read out of core; one batch of queries with their pools is in memory. See docs/clicks.md.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from ranking.bm25 import bm25_scores
from ranking.errors import DataError
from ranking.files import check_not_read, write_json
from ranking.program import run
from ranking.query_engine import BATCH_ROWS, QueryEngine, QueryEngineSettings, add_table
from ranking.schema import TABLES, Table, write_table
from ranking.telemetry import bars_are_read
from training.clicks.event_columns import event_defaults
from training.clicks.log_tables import FileColumns, file_columns, open_view, parquet_files
from training.clicks.normalised_queries import number_queries
from training.evaluation.pool_rankers import COLUMN_PREFIX, PoolRanker, pool_rankers
from training.sources.held_out import held_out_files, held_out_queries, require_queries
from training.sources.pair_strategies import (
    draw_by_usefulness,
    draw_from_bands,
    k_centres,
    lexical_vectors,
    misplacement,
    rank_disagreement,
    read_bands,
    spread_out,
)

LOGGER = logging.getLogger(__name__)
ROWS_AT_ONCE = 20_000  # pool rows that are scored together
DEFAULT_BANDS = ["10:8", "50:8", "rest:4"]
BY_USEFULNESS = ("disagreement", "uncertainty")
LEXICAL = "lexical"

Strategy = Literal["bands", "random", "disagreement", "uncertainty", "diversity"]


@dataclass(kw_only=True)
class Config(QueryEngineSettings):
    """Sample candidates to label from a larger pool.

    Args:
        pool: rows of the candidates table: a Parquet file, a folder of them, or a glob in quotes
        out: the candidates file to write; counts go to a .report.json beside it
        events: click log (file, folder or glob) that says how often each query is asked; without it all are alike
        queries: how many queries to draw
        strategy: which documents of which queries: bands of BM25 ranks; random; disagreement of two or more rankers;
            uncertainty whether a document belongs to the first `top`, by one ranker's margins or several rankers'
            deviation; diversity of texts
        documents: documents of each query, 20 if left out; bands say their own number
        bands: BM25 rank bands and how many documents to draw from each: "10:8" is 8 of the top 10, the next band starts
            at rank 11; "rest" ends the list; 10:8, 50:8 and rest:4 if left out
        ranker: of disagreement and uncertainty: bm25, checkpoint:PATH (ours, or any cross-encoder) or column:NAME, a
            column of scores in the pool
        top: of uncertainty, how many first places matter
        oversample: of disagreement, uncertainty and diversity: how many times `queries` are drawn by frequency, for the
            strategy to choose from; 1 leaves it the documents alone
        usefulness_power: pairs and queries are drawn in proportion to their disagreement or uncertainty to this power;
            0 draws all alike, more than 1 keeps nearer to the most useful
        vectors: of diversity: lexical (hashed words), or a sentence encoder: minilm, a folder or a hub id
        labelled: candidates that were labelled before: their queries are not drawn again, and diversity keeps its
            distance from them
        frequency_power: queries are drawn in proportion to frequency to this power: 1 as asked, 0 all alike
        exclude: tables whose queries, and near-identical ones, must not be drawn, such as the judged dev and test
            splits
        exclude_held_out: leave out the dev and test queries of the judgments folder beside the output, too (on this
            machine, not in a store)
        on_bad_row: "stop" at the first bad row, or "reject" them to a .rejects.tsv beside the output
        seed: another seed draws other queries and documents
    """

    pool: str
    out: Path
    events: str | None = None
    queries: int = 4_000
    strategy: Strategy = "bands"
    documents: int | None = None
    bands: list[str] | None = None
    ranker: list[str] = field(default_factory=list)
    top: int = 5
    oversample: float = 4.0
    usefulness_power: float = 1.0
    vectors: str = LEXICAL
    labelled: list[Path] = field(default_factory=list)
    frequency_power: float = 0.5
    exclude: list[Path] = field(default_factory=list)
    exclude_held_out: bool = True
    on_bad_row: Literal["stop", "reject"] = "stop"
    seed: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.queries < 1 or self.top < 1 or (self.documents is not None and self.documents < 1):
            raise ValueError("queries, top and documents must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: 0 or more is needed")
        if self.frequency_power < 0 or self.usefulness_power < 0:
            raise ValueError("frequency_power and usefulness_power must be 0 or more")
        if not self.oversample >= 1:
            raise ValueError(f"oversample is {self.oversample}: 1 or more is needed")
        if self.strategy == "bands" and self.documents is not None:
            raise ValueError("documents: of other strategies; bands say how many documents each gives")
        if self.strategy != "bands" and self.bands is not None:
            raise ValueError(f"bands: of the strategy bands; strategy {self.strategy} takes documents")
        if self.strategy == "disagreement" and len(self.ranker) < 2:
            raise ValueError(
                "strategy disagreement compares rankers: give two or more, such as --ranker checkpoint:runs/student "
                "--ranker bm25"
            )
        if self.strategy == "uncertainty" and not self.ranker:
            raise ValueError(
                "strategy uncertainty reads scores: give a ranker or more, such as --ranker checkpoint:runs/student"
            )
        if self.strategy not in BY_USEFULNESS and self.ranker:
            raise ValueError(f"ranker: strategy {self.strategy} reads no scores; disagreement and uncertainty do")
        if self.strategy != "diversity" and self.vectors != LEXICAL:
            raise ValueError(f"vectors: of the strategy diversity, not of {self.strategy}")
        read_bands(self.bands or DEFAULT_BANDS)


class DocumentChoice:
    """How documents of one query are chosen: the strategy with its rankers or vectors, opened once."""

    def __init__(self, config: Config):
        self.config = config
        self.documents = config.documents or sum(count for _, count in read_bands(DEFAULT_BANDS))
        # models are opened before the pool is read, which may take long
        self.rankers: list[PoolRanker] = pool_rankers(config.ranker)
        # float32 [texts, width] of length 1
        self.vectors: Callable[[list[str]], NDArray[np.float32]] = lexical_vectors
        if config.vectors != LEXICAL:
            from training.evaluation.sentence_similarity import SentenceEncoder

            self.vectors = SentenceEncoder.load(config.vectors).embed

    def of_piece(self, piece: pa.Table, starts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The rows chosen of whole queries, and the mean usefulness of each query's: int64 [rows], float64 [queries].

        piece: pool rows ordered by query; starts: where each query begins. Without a measure usefulness is 0.
        """
        config, bands = self.config, read_bands(self.config.bands or DEFAULT_BANDS)
        numbers = piece.column("query_no").to_numpy()
        texts = [piece.column(name).to_pylist() for name in ("query", "title", "summary")]
        scores = np.empty((len(piece), 0))
        bm25, vectors = np.zeros(len(piece), np.float32), np.empty((len(piece), 0), np.float32)
        if config.strategy in ("bands", "diversity"):
            bm25 = bm25_scores(*texts)
        if config.strategy == "diversity":
            vectors = self.vectors([f"{title} {summary}" for title, summary in zip(*texts[1:])])
        if self.rankers:
            scores = np.stack([ranker.scores(piece) for ranker in self.rankers], axis=1)
        chosen, useful = [], np.zeros(len(starts))
        for query, (start, end) in enumerate(zip(starts, [*starts[1:], len(piece)])):
            rng = np.random.default_rng([config.seed, int(numbers[start])])
            if config.strategy == "bands":
                rows = draw_from_bands(bm25[start:end], bands, rng)
            elif config.strategy == "random":
                rows = np.sort(rng.permutation(end - start)[: self.documents])
            elif config.strategy == "diversity":
                rows = np.sort(k_centres(vectors[start:end], self.documents, int(np.argmax(bm25[start:end]))))
            else:
                of_query = scores[start:end]
                by_row = (
                    rank_disagreement(of_query)
                    if config.strategy == "disagreement"
                    else misplacement(of_query, config.top)
                )
                rows = draw_by_usefulness(by_row, self.documents, config.usefulness_power, rng)
                useful[query] = by_row[rows].mean()
            chosen.append(start + rows)
        return np.concatenate(chosen), useful


def sample_candidates(config: Config) -> dict:
    """Write the sampled candidates and a report; returns the report. DataError or InputError on bad input."""
    choice = DocumentChoice(config)
    table, columns = _pool_columns(config, choice.rankers)
    files = parquet_files(config.pool)
    out = Path(config.out)
    check_not_read(out, files)
    with config.engine_for(out, config.pool) as (engine, scratch):
        rejects = out.with_suffix(".rejects.tsv") if config.on_bad_row == "reject" else None
        read, refused = open_view(engine, "pool", table, files, rejects, columns)
        report = {"strategy": config.strategy, "pairs_read": read, "pairs_rejected": refused}
        report["excluded_queries"] = _count_queries(engine, config)
        report |= _draw_queries(engine, config, choice)
        pieces = _draw_documents(engine, table, choice, report)
        if config.strategy in BY_USEFULNESS:
            pieces = _most_useful_queries(pieces, config, report, scratch / "drawn.parquet")
        names = TABLES["candidates"].schema.names
        report["pairs"] = write_table(out, "candidates", (piece.select(names) for piece in pieces))
    write_json(out.with_suffix(".report.json"), report)
    return report


def _pool_columns(config: Config, rankers: list[PoolRanker]) -> tuple[Table, FileColumns | None]:
    """The candidates table with the score columns that rankers read, and how the pool's files spell it."""
    table = TABLES["candidates"]
    read = {COLUMN_PREFIX + ranker.column: ranker.column for ranker in rankers if ranker.column is not None}
    if not read:
        return table, None
    fields = [pa.field(name, pa.float64(), nullable=False) for name in read]
    table = replace(table, schema=pa.schema([*table.schema, *fields]))
    return table, file_columns(parquet_files(config.pool), table, read)


def _count_queries(engine: QueryEngine, config: Config) -> int:
    """Make `asked` (query_no, pages): the pool's queries and on how many pages of the log each stands.

    Queries near-identical to an excluded one are left out; returns how many.
    """
    held_out = [*config.exclude, *(held_out_files(Path(config.out).parent) if config.exclude_held_out else [])]
    near = held_out_queries(file for path in held_out for file in parquet_files(str(path)))
    # numbered with the others although `near` leaves them out: a seed's draw goes by the numbers
    _queries_of(engine, "excluded", [*config.exclude, *config.labelled])
    _queries_of(engine, "labelled", config.labelled)
    relations = ["pool", "excluded"]
    if config.events:
        files = parquet_files(config.events)
        columns = file_columns(files, TABLES["events"], defaults=event_defaults())
        open_view(engine, "events", TABLES["events"], files, None, columns)
        relations.append("events")
    number_queries(engine, *relations)
    seen = "SELECT CAST(NULL AS INTEGER) AS query_no, 0 AS pages WHERE false"
    if config.events:
        seen = """SELECT query_no, count(DISTINCT request_id) AS pages
                   FROM events JOIN spellings ON query = raw GROUP BY query_no"""
    engine.table(
        "asked",
        f"""
        WITH seen AS ({seen}),
             pooled AS (SELECT DISTINCT query_no FROM pool JOIN spellings ON query = raw),
             barred AS (SELECT DISTINCT query_no FROM labelled JOIN spellings ON query = raw)
        SELECT query_no, coalesce(pages, 0) AS pages
        FROM pooled LEFT JOIN seen USING (query_no) ANTI JOIN barred USING (query_no)""",
    )
    reworded = [
        number
        for batch in engine.batches("SELECT query_no, query FROM queries SEMI JOIN asked USING (query_no)")
        for number, query in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist())
        if query in near
    ]
    add_table(engine, "reworded", pa.table([reworded], schema=pa.schema([("query_no", pa.int32())])))
    engine.table("asked", "SELECT * FROM asked ANTI JOIN reworded USING (query_no)")
    return len(reworded)


def _queries_of(engine: QueryEngine, name: str, paths: list[Path]) -> None:
    """Make the table `name` (query) of the distinct queries of Parquet files, folders or globs; empty without any."""
    if not paths:
        add_table(engine, name, pa.table({"query": pa.array([], pa.string())}))
        return
    files = [file for path in paths for file in parquet_files(str(path))]
    for number, file in enumerate(files):
        require_queries(file)
        engine.read_files(f"{name}_{number}", [file])
    one = [f"SELECT query FROM {name}_{number} WHERE query IS NOT NULL" for number in range(len(files))]
    engine.table(name, " UNION ".join(one))


def _draw_queries(engine: QueryEngine, config: Config, choice: DocumentChoice) -> dict[str, int]:
    """Make `chosen` (query_no): weighted draw without replacement (Efraimidis and Spirakis 2006); returns counts.

    Of a strategy that chooses among queries by their documents, all that it may choose from; of diversity, those that
    lie far apart.
    """
    columns = engine.columns("SELECT query_no, pages FROM asked ORDER BY query_no")
    numbers, pages = columns["query_no"], columns["pages"].astype(np.float64)
    if not len(numbers):
        raise DataError(config.pool, "no query is left to draw from: the pool is empty or all of it is excluded")
    if len(numbers) < config.queries:
        LOGGER.warning("the pool has only %d queries, %d were asked for", len(numbers), config.queries)
    # a query of the pool that the log never shows is as rare as one shown once
    weight = np.maximum(pages, 1) ** config.frequency_power
    rng = np.random.default_rng(config.seed)
    draws = rng.exponential(size=len(numbers)) / weight
    wanted = config.queries if config.strategy in ("bands", "random") else round(config.queries * config.oversample)
    drawn = np.sort(numbers[np.argsort(draws)[:wanted]])
    if config.strategy == "diversity":
        drawn = _far_apart(engine, drawn, config, choice, rng)
    add_table(engine, "chosen", pa.table({"query_no": drawn}))
    return {"pool_queries": len(numbers), "queries": len(drawn)}


def _far_apart(
    engine: QueryEngine,
    numbers: NDArray[np.integer],
    config: Config,
    choice: DocumentChoice,
    rng: np.random.Generator,
) -> NDArray[np.integer]:
    """The numbers of config.queries queries whose texts lie far from each other and from the labelled ones."""
    add_table(engine, "spread", pa.table({"query_no": numbers}))
    texts = engine.rows("SELECT query FROM queries SEMI JOIN spread USING (query_no) ORDER BY query_no")
    vectors = choice.vectors([text for (text,) in texts])
    before = engine.rows("""
        SELECT DISTINCT queries.query FROM labelled JOIN spellings ON labelled.query = raw
        JOIN queries USING (query_no) ORDER BY 1
    """)
    covered = choice.vectors([text for (text,) in before]) if before else None
    return numbers[spread_out(vectors, min(config.queries, len(numbers)), rng, covered)]


def _draw_documents(engine: QueryEngine, table: Table, choice: DocumentChoice, report: dict) -> Iterator[pa.Table]:
    """The sample in pieces by query, with query_no and the query's usefulness; adds counts to the report."""
    scores = "".join(f", {name}" for name in table.schema.names if name.startswith(COLUMN_PREFIX))
    # one row per document and per text: the lowest id stands for the rest
    engine.view(
        "drawn",
        f"""
        SELECT query_no, min(query_id) OVER (PARTITION BY query_no) AS query_id, doc_id, title, summary{scores},
               row_number() OVER (PARTITION BY query_no, doc_id ORDER BY query_id) AS copy,
               row_number() OVER (PARTITION BY query_no, title, summary ORDER BY doc_id, query_id) AS twin
        FROM pool JOIN spellings ON query = raw SEMI JOIN chosen USING (query_no)""",
    )
    result = engine.batches(f"""
        SELECT query_no, query_id, doc_id, query, title, summary{scores}, copy > 1 OR twin > 1 AS duplicate
        FROM drawn JOIN queries USING (query_no) ORDER BY query_no, doc_id, copy
    """)
    report |= {"pool_pairs": 0, "duplicates": 0}
    bar = tqdm(total=report["queries"], desc="candidates", unit="query", disable=not bars_are_read())
    for piece in _whole_queries(result):
        report["pool_pairs"] += len(piece)
        duplicate = piece.column("duplicate").to_numpy()
        report["duplicates"] += int(duplicate.sum())
        piece = piece.filter(pa.array(~duplicate))
        starts = np.flatnonzero(np.diff(piece.column("query_no").to_numpy(), prepend=-1))
        rows, useful = choice.of_piece(piece, starts)
        bar.update(len(starts))
        of_query = np.repeat(useful, np.diff([*starts, len(piece)]))
        yield piece.append_column("usefulness", pa.array(of_query)).take(rows)
    bar.close()


def _most_useful_queries(pieces: Iterable[pa.Table], config: Config, report: dict, scratch: Path) -> Iterator[pa.Table]:
    """The pieces' rows of config.queries queries, drawn in proportion to usefulness; adds figures to the report.

    scratch: file for the rows of all queries, which are not held in memory.
    """
    numbers, usefulness = [np.empty(0, np.int64)], [np.empty(0)]
    writer = None
    for piece in pieces:
        writer = writer or pq.ParquetWriter(scratch, piece.schema)
        writer.write_table(piece)
        of_piece, first = np.unique(piece.column("query_no").to_numpy(), return_index=True)
        numbers.append(of_piece)
        usefulness.append(piece.column("usefulness").to_numpy()[first])
    if writer is None:
        return
    writer.close()
    number, useful = np.concatenate(numbers), np.concatenate(usefulness)
    rng = np.random.default_rng([config.seed, 1])
    chosen = draw_by_usefulness(useful, config.queries, config.usefulness_power, rng)
    report["queries"] = len(chosen)
    report["usefulness"] = {"pool": float(useful.mean()), "drawn": float(useful[chosen].mean())}
    for batch in pq.ParquetFile(scratch).iter_batches(BATCH_ROWS):
        kept = np.isin(batch.column("query_no").to_numpy(), number[chosen])
        yield pa.Table.from_batches([batch]).filter(pa.array(kept))


def _whole_queries(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Rows ordered by query_no, regrouped into tables of about ROWS_AT_ONCE rows that never split a query.

    BM25 takes its statistics from a table, so these are the same however the rows are batched.
    """
    held: list[pa.Table] = []
    for batch in batches:
        held.append(pa.Table.from_batches([batch]))
        if sum(map(len, held)) <= ROWS_AT_ONCE:
            continue
        rows = pa.concat_tables(held)
        numbers = rows.column("query_no").to_numpy()
        while len(numbers) > ROWS_AT_ONCE and numbers[0] != numbers[-1]:
            cut = int(np.searchsorted(numbers, numbers[ROWS_AT_ONCE])) or int(
                np.searchsorted(numbers, numbers[0], "right")
            )
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
