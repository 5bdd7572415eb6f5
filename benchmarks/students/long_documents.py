"""Long documents: what chunks recover of the ranking quality that a student has on short ones.

python -m benchmarks.students.long_documents --source beir:../shared/data/msrd --out runs/long_documents

Every summary of MSRD is buried at a random place in a text of 1,500 tokens, whose rest is summaries of documents of
other queries. A MiniLM-L6 is trained on the short summaries, and one checkpoint then ranks
  short       the summaries themselves
  cut         the long texts, of which it reads the beginning
  max, mean   the long texts in overlapping chunks, by the highest or the mean score of a document's chunks
With --long-epochs it also goes on to train on the long texts through the highest score, and ranks them (row: trained).
A step that is finished is not run again, and an interrupted training goes on where it was.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.students.runs import append_row, finished_rows, judged_ranking, text_columns, train_as_shipped
from ranking.card import ScoreCard
from ranking.chunks import Chunking, Pooling, pool
from ranking.files import new_folder
from ranking.metrics import mean
from ranking.program import run
from ranking.schema import read_table, write_table
from ranking.significance import paired_bootstrap
from ranking.text import StudentFormat
from training import prepare_data, train_baseline
from training.evaluation.checkpoint_scores import Scorer

LOGGER = logging.getLogger(__name__)
SPLITS = ("train", "dev", "test")


@dataclass
class Config:
    """Train on short summaries, rank long texts.

    Args:
        source: dataset as prepare_data names it
        out: folder for datasets, checkpoints and results.jsonl
        train_queries: judged train queries
        dev_queries: dev queries, for the choice of the checkpoint
        test_queries: test queries to measure on
        init: where the student starts; a checkpoint of an earlier run of this program trains it further
        least_steps: optimiser steps of the training on short summaries
        learning_rate: peak learning rate of it
        summary_tokens: tokens of a summary, or of a chunk, that the student reads
        long_tokens: tokens of a long text
        overlap: tokens of a chunk that the next one begins with again
        titles: let documents keep their titles; without them the summary alone tells what a document is
        long_epochs: passes over the long texts of the train queries; 0 for no such row
        seed: of the places where summaries are buried
        tables: print the results that are there and run nothing
    """

    source: str = "beir:../shared/data/msrd"
    out: Path = Path("runs/long_documents")
    train_queries: int = 60
    dev_queries: int = 30
    test_queries: int = 20
    init: str = "minilm"
    least_steps: int = 80
    learning_rate: float = 1e-4
    summary_tokens: int = 96
    long_tokens: int = 1500
    overlap: int = 32
    titles: bool = True
    long_epochs: float = 0.0
    seed: int = 1
    tables: bool = False

    @property
    def chunks(self) -> int:
        """As many as a whole long text has."""
        return 1 + -(-(self.long_tokens - self.summary_tokens) // (self.summary_tokens - self.overlap))


def main(config: Config) -> None:
    """Run the steps that are not finished, then print the table."""
    if not config.tables:
        short, long = config.out / "short", config.out / "long"
        prepare(config, short)
        flags = {"data": short, "init": config.init, "least_steps": config.least_steps, "group_documents": 8}
        flags |= {"learning_rate": config.learning_rate, "limits.max_summary_tokens": config.summary_tokens}
        student = train_as_shipped(train_baseline, "baseline_minilm.yaml", config.out / "student", **flags)
        bury(config, short, long, student)
        measure(config, ["short"], student, short)
        measure(config, ["cut"], student, long)
        measure(config, ["max", "mean"], in_chunks(config, student), long)
        if config.long_epochs:
            flags = {"data": long, "init": student, "chunks": config.chunks, "chunk_overlap": config.overlap}
            flags |= {"epochs": config.long_epochs, "least_steps": 0, "batch_groups": 2, "calibrate": "null"}
            trained = train_as_shipped(train_baseline, "baseline_minilm.yaml", config.out / "trained", **flags)
            measure(config, ["trained"], trained, long)
    show(config)


def prepare(config: Config, folder: Path) -> None:
    """The dataset of short summaries."""
    if (folder / "dataset.json").is_file():
        return
    prepare_data.main(
        prepare_data.Config(
            source=config.source,
            out=folder,
            train_queries=config.train_queries,
            dev_queries=config.dev_queries,
            test_queries=config.test_queries,
            unlabelled_queries=1,
        )
    )
    if not config.titles:
        for split in SPLITS:
            path = folder / "judgments" / f"{split}.parquet"
            table = read_table(path, "judgments")
            write_table(path, "judgments", _with(table, "title", [""] * len(table)))


def bury(config: Config, short: Path, long: Path, student: Path) -> None:
    """The same judgments with every summary at a random place of a long text.

    The rest of the text is summaries of random documents of other queries, as many as fit.
    """
    if (long / "dataset.json").is_file():
        return
    text = StudentFormat.of_checkpoint(student)
    tables = {split: read_table(short / "judgments" / f"{split}.parquet", "judgments") for split in SPLITS}
    everything = pa.concat_tables(tables.values())
    summaries = everything.column("summary").to_pylist()
    queries = np.asarray(everything.column("query_id").to_pylist(), dtype=object)
    sizes = [len(ids) for ids in text.tokenise_fields(summaries, config.long_tokens)]
    rng = np.random.default_rng(config.seed)
    with new_folder(long) as aside:
        (aside / "judgments").mkdir()
        first = 0
        for split, table in tables.items():
            buried = []
            for row in range(first, first + len(table)):
                before = int(rng.integers(0, config.long_tokens - sizes[row] + 1))
                parts = [
                    _fill(rng, summaries, sizes, queries, row, tokens)
                    for tokens in (before, config.long_tokens - sizes[row] - before)
                ]
                buried.append(" ".join((*parts[0], summaries[row], *parts[1])))
            write_table(aside / "judgments" / f"{split}.parquet", "judgments", _with(table, "summary", buried))
            first += len(table)
        shutil.copyfile(short / "dataset.json", aside / "dataset.json")
    lengths = [len(ids) for ids in text.tokenise_fields(buried, 10 * config.long_tokens)]
    LOGGER.info("long texts of the test split: %.0f tokens in the mean", np.mean(lengths))


def _fill(rng, summaries: list[str], sizes: list[int], queries, row: int, tokens: int) -> list[str]:
    """Summaries of other queries' documents, of at most so many tokens together and nearly as many."""
    found: list[str] = []
    for other in rng.permutation(len(summaries))[:500]:
        if queries[other] != queries[row] and 0 < sizes[other] <= tokens and summaries[other] != summaries[row]:
            found.append(summaries[other])
            tokens -= sizes[other]
    return found


def _with(table: pa.Table, column: str, values: list[str]) -> pa.Table:
    place = table.schema.get_field_index(column)
    return table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))


def in_chunks(config: Config, student: Path) -> Path:
    """A copy of the checkpoint whose card says that it reads long summaries in chunks."""
    folder = config.out / "student-in-chunks"
    if not folder.is_dir():
        with new_folder(folder) as aside:
            for file in (file for file in student.iterdir() if file.is_file()):
                shutil.copyfile(file, aside / file.name)
            replace(ScoreCard.load(student), chunking=Chunking(config.chunks, config.overlap)).save(aside)
    return folder


def measure(config: Config, names: list[str], checkpoint: Path, data: Path) -> None:
    """Score the test judgments of a dataset and append a row to results.jsonl, unless it is there.

    names: of one row, or `max` and `mean`, which pool the scores of the same chunks.
    """
    if set(names) <= {row["row"] for row in finished_rows(config.out)}:
        return
    test = read_table(data / "judgments" / "test.parquet", "judgments")
    scorer = Scorer.load(checkpoint)
    assert scorer.card is not None
    store, starts = scorer.encode(*text_columns(test))
    of_chunks = replace(scorer, encode=lambda *_: (store, None))  # a score for each text of the store
    started = time.process_time()
    scores = of_chunks.score(*text_columns(test), precision="bfloat16", progress=names[0])
    seconds = time.process_time() - started
    for name in names:
        pooling: Pooling = "mean" if name == "mean" else scorer.card.chunking.pooling
        judged = judged_ranking(test, scores if starts is None else pool(scores, starts, pooling))
        row = {
            "row": name,
            "ndcg@5": mean(judged.ndcg(5)),
            "queries": len(judged),
            "documents": len(test),
            "chunks": len(store) / len(test),
            "processor_seconds": round(seconds, 1),
            "per_query": judged.ndcg(5).round(6).tolist(),
        }
        append_row(config.out, row)
        LOGGER.info("%s: nDCG@5 %.4f, %.1f chunks a document", name, row["ndcg@5"], row["chunks"])


def show(config: Config) -> None:
    """The table in Markdown: NDCG@5 (linear gain), its share of the short row's, the difference with 95% interval."""
    rows = {row["row"]: row for row in finished_rows(config.out)}
    print("| row | chunks a document | NDCG@5 | of short | difference to short |\n|---|--:|--:|--:|---|")
    for name, row in rows.items():
        short, versus = rows["short"], ""
        if name != "short":
            gap = paired_bootstrap(np.array(row["per_query"]), np.array(short["per_query"]))
            versus = f"{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
        share = row["ndcg@5"] / short["ndcg@5"]
        print(f"| {name} | {row['chunks']:.1f} | {row['ndcg@5']:.4f} | {share:.1%} | {versus} |")


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.students.long_documents --source beir:../shared/data/msrd")
