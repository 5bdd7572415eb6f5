"""Do queries that a decoder wrote help a student? Students of few real queries, with and without written ones beside.

python -m benchmarks.students.written_queries --out runs/written_queries

A built-in world in which clicks exist for part of the documents. A decoder from scratch learns from them to write
queries; it writes for the documents without clicks, and a ranker of word embeddings that learnt the judged train
queries labels everything. A student is linear in pairs of words and fitted in a second (word_pair_ridge.py). The rows
beside it say what the written queries are worth: as many real ones, and words of the document itself in their place,
which need no decoder. A row that is finished (a line in results.jsonl) is not run again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.students.runs import CONFIGS, append_row, finished_rows, judged_ranking, query_numbers, started
from benchmarks.students.word_pair_ridge import fit, pair_features
from benchmarks.students.word_rankers import WordRanker, word_format
from ranking.card import CARD_NAME
from ranking.metrics import mean
from ranking.program import parse, run
from ranking.schema import read_table, write_table
from training import pretrain_teacher
from training.clicks.normalised_queries import normalise_query
from training.clicks.write_queries import Collection, candidates_of, write_queries
from training.clicks.write_queries import Config as WriterConfig
from training.world.dataset import WorldConfig, write_world

LOGGER = logging.getLogger(__name__)
TEACHER_STEPS = 400
ALONE = "real queries alone"


@dataclass
class Config:
    """Fit students with and without written queries and print the table.

    Args:
        out: folder for the world, the writer, written queries and results.jsonl
        rows: rows to run; none: all
        seeds: seeds of draws and of the writer's samples; world and writer stay
        real: real unlabelled queries that every student has
        added: queries beside them
        candidates: documents of each added query that is not real
        epochs: passes of the writer over the click pairs
        world: the built-in world; clicks for part of its documents, and no synonym that the judgments lack
        tables: print the results that are there and fit nothing
    """

    out: Path = Path("runs/written_queries")
    rows: list[str] | None = None
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    real: int = 300
    added: int = 600
    candidates: int = 12
    epochs: float = 3
    world: WorldConfig = field(
        default_factory=lambda: WorldConfig(
            documents=6_000, clicked_pairs=6_000, log_queries=3_000, train_queries=1_000, test_queries=400,
            unlabelled_queries=1_500, candidates=12, hidden_share=0.0,
        )
    )  # fmt: skip
    tables: bool = False

    def __post_init__(self):
        if unknown := sorted(set(self.rows or []) - set(ROWS)):
            raise ValueError(f"rows: {', '.join(unknown)} unknown; there are {', '.join(ROWS)}")


class Bench:
    """The world, its writer and its teacher; each is made when first asked for."""

    def __init__(self, config: Config):
        self.config = config
        self.data = config.out / "world"
        if not (self.data / "dataset.json").is_file():
            write_world(config.world, self.data)
        self.pool = read_table(self.data / "candidates.parquet", "candidates")
        self.dev, self.test = (
            read_table(self.data / "judgments" / f"{split}.parquet", "judgments") for split in ("dev", "test")
        )
        self.judged_features = {"dev": pair_features(self.dev), "test": pair_features(self.test)}

    @cached_property
    def teacher(self) -> WordRanker:
        """Word embeddings that learnt the judged train queries."""
        train = read_table(self.data / "judgments" / "train.parquet", "judgments")
        text_format = word_format(self.data, self.config.out / "vocabulary")
        return WordRanker.of_table(text_format, [train], "grade", TEACHER_STEPS, 0)

    @cached_property
    def writer(self) -> Path:
        """A decoder that learnt from the clicks how people ask."""
        out = self.config.out / "writer"
        if not (out / CARD_NAME).is_file():
            words = ["--config", str(CONFIGS / "pretrain_small.yaml"), "--direction", "document-to-query"]
            words += ["--data", str(self.data), "--out", str(out), "--epochs", str(self.config.epochs)]
            words += ["--resume", "true"] if started(out) else []
            pretrain_teacher.main(parse(pretrain_teacher.Config, words))
        return out

    def queries(self, seed: int) -> list[str]:
        """The ids of the pool's queries in the seed's order."""
        ids = np.array(sorted(set(self.pool.column("query_id").to_pylist())))
        return np.random.default_rng(seed).permutation(ids).tolist()

    def of_queries(self, ids: list[str]) -> pa.Table:
        """The pool's rows of these queries."""
        return self.pool.filter(pc.is_in(self.pool.column("query_id"), value_set=pa.array(ids)))

    def real(self, seed: int) -> pa.Table:
        """As many real queries as are added otherwise, beside those that every student has."""
        return self.of_queries(self.queries(seed)[self.config.real : self.config.real + self.config.added])

    def written(self, seed: int, round_trip: Any) -> pa.Table:
        """Written queries with their candidates."""
        out = self.config.out / f"written-{round_trip}-{seed}.parquet"
        if not out.is_file():
            writer, config = self.writer, self.config
            settings = {"queries": config.added, "candidates": config.candidates, "personal_data": "keep"}
            write_queries(
                WriterConfig(data=self.data, writer=writer, out=out, round_trip=round_trip, seed=seed, **settings)
            )
        return read_table(out, "candidates")

    def own_words(self, seed: int) -> pa.Table:
        """One to three words of a document in place of a written query; documents as those of written queries."""
        out = self.config.out / f"own-words-{seed}.parquet"
        if not out.is_file():
            collection = Collection(self.data / "candidates.parquet")
            clicked = set(read_table(self.data / "clicks.parquet", "clicks").column("doc_id").to_pylist())
            rng = np.random.default_rng(seed)
            numbers = rng.permutation([n for n, doc_id in enumerate(collection.ids) if doc_id not in clicked])
            tables: dict[str, pa.Table] = {}
            for own in numbers.tolist():
                query = normalise_query(pretrain_teacher.own_words(" ".join(collection.texts[own]), rng))
                if query and query not in tables and len(tables) < self.config.added:
                    found = candidates_of(own, collection.bm25(query), self.config.candidates, rng)
                    tables[query] = collection.rows(f"words-{len(tables)}", query, found)
            write_table(out, "candidates", pa.concat_tables(tables.values()))
        return read_table(out, "candidates")

    def measure(self, name: str, seed: int) -> dict[str, Any]:
        """Fit the row's student and measure it: the line of results.jsonl."""
        real = self.of_queries(self.queries(seed)[: self.config.real])
        added = ROWS[name](self, seed)
        labelled = real if added is None else pa.concat_tables([real, added])
        targets = self.teacher.scores(labelled)
        dev = self.judged_features["dev"], self.dev
        weights = fit(pair_features(labelled), targets, query_numbers(labelled), dev)
        scores = (self.judged_features["test"] @ weights).astype(np.float32)
        line = {"row": name, "seed": seed, "labels": len(labelled)}
        return line | {"test": mean(judged_ranking(self.test, scores).ndcg(5))}


# row -> the rows of the candidates table that a student has beside the real queries
ROWS: dict[str, Callable[[Bench, int], pa.Table | None]] = {
    ALONE: lambda bench, seed: None,
    "with words of documents": lambda bench, seed: bench.own_words(seed),
    "with written queries by BM25": lambda bench, seed: bench.written(seed, "bm25"),
    "with written queries by the writer": lambda bench, seed: bench.written(seed, "writer"),
    "with written queries unchecked": lambda bench, seed: bench.written(seed, "none"),
    "with as many real queries": lambda bench, seed: bench.real(seed),
}


def main(config: Config) -> None:
    """Fit what is not finished, then print the table."""
    if not config.tables:
        config.out.mkdir(parents=True, exist_ok=True)
        bench = Bench(config)
        done = {(line["row"], line["seed"]) for line in finished_rows(config.out)}
        for seed in config.seeds:
            for name in config.rows or list(ROWS):
                if (name, seed) not in done:
                    line = bench.measure(name, seed)
                    append_row(config.out, line)
                    LOGGER.info("%s", line)
    print(table(finished_rows(config.out)))


def table(lines: list[dict[str, Any]]) -> str:
    """NDCG@5 on test by row, and its difference from the real queries alone, mean and deviation over seeds."""
    alone = {line["seed"]: line["test"] for line in lines if line["row"] == ALONE}
    shown = ["| student | seeds | labels | test NDCG@5 | less real alone |", "|---|--:|--:|--:|--:|"]
    for name in ROWS:
        found = [line for line in lines if line["row"] == name]
        if found:
            apart = [line["test"] - alone[line["seed"]] for line in found if line["seed"] in alone]
            labels = np.mean([line["labels"] for line in found])
            cells = [_spread([line["test"] for line in found]), _spread(apart) if apart and name != ALONE else ""]
            shown.append(f"| {name} | {len(found)} | {labels:,.0f} | {' | '.join(cells)} |")
    return "\n".join(shown)


def _spread(values: list[float]) -> str:
    deviation = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{deviation}"


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.students.written_queries --out runs/written_queries")
