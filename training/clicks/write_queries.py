"""Write queries for documents that nobody has clicked on, by a decoder that learnt from clicks how people ask.

    python -m training.pretrain_teacher --direction document-to-query --data data/shop --model runs/decoder \\
        --out runs/writer
    python -m training.clicks.write_queries --data data/shop --writer runs/writer \\
        --out data/shop/candidates_written.parquet

A written query is kept if it leads back to its document, is new, holds no personal data, and is near none of the dev
and test queries. The output is a candidates table: each query with its document and others, which nobody has judged or
labelled. docs/labelling.md says how it is used. Documents and their index are in memory.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from ranking.bm25 import Bm25
from ranking.errors import InputError
from ranking.files import write_json
from ranking.program import run
from ranking.schema import TABLES, iter_table, write_table
from training.clicks.normalised_queries import normalise_query
from training.clicks.privacy_gate import PrivacySettings, ReadableQueries
from training.sources.held_out import held_out_files, held_out_queries
from training.teacher.query_writer import QueryWriter

LOGGER = logging.getLogger(__name__)
FORWARD_TOKENS = 4096  # of one forward of the writer


@dataclass(kw_only=True)
class Config:
    """Write queries for documents without clicks.

    Args:
        data: dataset folder: queries near its dev and test queries are not written, nor those of its candidates
        writer: checkpoint of pretrain_teacher --direction document-to-query
        out: the candidates file to write; counts go to a .report.json beside it
        documents: candidates file whose documents are written for; the dataset's candidates.parquet if left out
        clicks: click pairs whose documents need no written query; the dataset's clicks.parquet if left out, if there is
            one
        queries: how many queries to keep; documents are taken in random order until there are as many
        each: queries drawn for a document, of which the first that passes is kept
        temperature: of the draw; lower keeps to the likeliest words
        top_p: each word is drawn among the likeliest that make up this share
        round_trip: what a query must pass: bm25, its document is among the first `first` of all by BM25; writer, among
            the first `first` of the query's candidates by the writer's own likelihood of the query; or none
        first: see round_trip
        candidates: documents of each query: its own, half of them the best by BM25, the others at random
        personal_data: drop a query with an e-mail address, a long number and the like, or keep it; the privacy gate's
        batch_documents: documents that are written for together
        seed: another seed takes other documents and draws other queries
    """

    data: Path
    writer: Path
    out: Path
    documents: Path | None = None
    clicks: Path | None = None
    queries: int = 1000
    each: int = 4
    temperature: float = 1.0
    top_p: float = 0.95
    round_trip: Literal["bm25", "writer", "none"] = "bm25"
    first: int = 10
    candidates: int = 20
    personal_data: Literal["drop", "keep"] = "drop"
    batch_documents: int = 64
    seed: int = 1

    def __post_init__(self):
        for name in ("queries", "each", "first", "batch_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        if self.candidates < 2:
            raise ValueError(f"candidates is {self.candidates}: a query needs two documents to compare")
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature is {self.temperature} and top_p {self.top_p}: a positive number and a share are needed"
            )


class Collection:
    """Documents with their index, and what a query finds among them."""

    def __init__(self, path: Path):
        """path: a candidates file; a document that stands in many rows counts once. DataError if it cannot be read."""
        texts: dict[str, tuple[str, str]] = {}
        self.queries: set[str] = set()
        for rows in iter_table(path, "candidates"):
            self.queries.update(map(normalise_query, rows.column("query").unique().to_pylist()))
            columns = (rows.column(name).to_pylist() for name in ("doc_id", "title", "summary"))
            for doc_id, title, summary in zip(*columns):
                texts.setdefault(doc_id, (title, summary))
        self.ids, self.texts = list(texts), list(texts.values())
        self.index = Bm25(self.texts)

    def bm25(self, query: str) -> NDArray[np.float32]:
        """float32 [documents]: the scores of one query."""
        return next(self.index.scores([query]))

    def fields(self, numbers: NDArray[np.integer]) -> tuple[list[str], list[str]]:
        """Titles and summaries of documents by their numbers."""
        return [self.texts[number][0] for number in numbers], [self.texts[number][1] for number in numbers]

    def rows(self, name: str, query: str, numbers: NDArray[np.integer]) -> pa.Table:
        """The candidates table of one query, called `name`, with these documents."""
        titles, summaries = self.fields(numbers)
        columns = [[name] * len(numbers), [self.ids[number] for number in numbers], [query] * len(numbers)]
        schema = TABLES["candidates"].schema
        named = dict(zip(("query_id", "doc_id", "query", "title", "summary"), [*columns, titles, summaries]))
        return pa.table({field: named[field] for field in schema.names}, schema)


def candidates_of(own: int, scores: NDArray[np.float32], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Numbers of a query's documents, its own first: half of `count` the best by these scores, the others at random."""
    best = np.argsort(-scores, kind="stable")[: count // 2]
    chosen = dict.fromkeys([own, *best.tolist()])
    for number in rng.permutation(len(scores))[: 2 * count].tolist():
        if len(chosen) >= count:
            break
        chosen.setdefault(number)
    return np.array(list(chosen)[:count], np.int64)


def leads_back(own: int, scores: NDArray[np.floating], first: int) -> bool:
    """Whether fewer than `first` scores are above that of place `own`, and it is above the lowest of all."""
    return bool((scores > scores[own]).sum() < first and scores[own] > scores.min())


def write_queries(config: Config) -> dict:
    """Write the candidates of the written queries and a report; returns the report. InputError or DataError."""
    writer = QueryWriter(config.writer)
    collection = Collection(config.documents or config.data / "candidates.parquet")
    clicked = _clicked_documents(config)
    unclicked = [number for number, doc_id in enumerate(collection.ids) if doc_id not in clicked]
    if not unclicked:
        raise InputError(f"{config.clicks or config.data}: every document has a click, so none needs a written query")
    counts: Counter[str] = Counter()
    texts = _written(config, writer, collection, np.array(unclicked), counts)
    named = (collection.rows(f"written-{n:06d}", *query) for n, query in enumerate(texts, start=1))
    with tempfile.TemporaryDirectory(prefix=".written-", dir=config.out.parent) as scratch:
        whole = Path(scratch) / config.out.name
        pairs = write_table(whole, "candidates", named)
        if not pairs:
            raise InputError(f"{config.writer}: no query that it wrote can be kept: {dict(counts)}")
        whole.replace(config.out)
    if counts["kept"] < config.queries:
        LOGGER.warning("%d queries kept, %d were asked for: no document is left", counts["kept"], config.queries)
    report = {"pairs": pairs, "documents_without_clicks": len(unclicked), **counts}
    write_json(config.out.with_suffix(".report.json"), report)
    return report


def _written(
    config: Config, writer: QueryWriter, collection: Collection, unclicked: NDArray[np.int64], counts: Counter[str]
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Each kept query with the numbers of its documents, its own first; adds to the counts."""
    held_out = held_out_queries(held_out_files(config.data))
    gate = ReadableQueries(PrivacySettings(personal_data=config.personal_data))
    seen = set(collection.queries)
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(unclicked)
    with tqdm(total=config.queries, desc="written queries", unit="query") as bar:
        for start in range(0, len(order), config.batch_documents):
            batch = order[start : start + config.batch_documents]
            drawn = writer.write(
                *collection.fields(batch),
                each=config.each,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=int(rng.integers(1 << 31)),
            )
            for own, raw in zip(batch.tolist(), drawn):
                if counts["kept"] == config.queries:
                    return
                counts["documents"] += 1
                for query in map(normalise_query, raw):
                    counts["drawn"] += 1
                    if not query:
                        counts["empty"] += 1
                    elif query in seen:
                        counts["known"] += 1
                    elif query in held_out:
                        counts["near_dev_or_test"] += 1
                    elif not gate(query):
                        counts["personal_data"] += 1
                    elif (found := _round_trip(config, writer, collection, query, own, rng)) is None:
                        counts["not_led_back"] += 1
                    else:
                        counts["kept"] += 1
                        seen.add(query)
                        bar.update()
                        yield query, found
                        break


def _round_trip(
    config: Config, writer: QueryWriter, collection: Collection, query: str, own: int, rng: np.random.Generator
) -> NDArray[np.int64] | None:
    """The numbers of the query's documents, None if the query does not lead back to its own."""
    scores = collection.bm25(query)
    if config.round_trip == "bm25" and not leads_back(own, scores, config.first):
        return None
    found = candidates_of(own, scores, config.candidates, rng)
    if config.round_trip == "writer":
        fields = collection.fields(found)
        if not leads_back(0, writer.likelihoods([query] * len(found), *fields, FORWARD_TOKENS), config.first):
            return None
    return found


def _clicked_documents(config: Config) -> set[str]:
    """The documents that have a click."""
    path = config.clicks or config.data / "clicks.parquet"
    if config.clicks is None and not path.is_file():
        LOGGER.warning("%s is not there: queries are written for all documents", path)
        return set()
    return {doc_id for rows in iter_table(path, "clicks") for doc_id in rows.column("doc_id").to_pylist()}


def main(config: Config) -> None:
    """Write the queries and print the report."""
    print(json.dumps(write_queries(config), indent=2))


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m training.clicks.write_queries --data data/shop --writer runs/writer "
        "--out data/shop/candidates_written.parquet",
    )
