"""Which pairs to label first: students by strategy of sample_candidates and by labels spent. One command, resumable.

python -m benchmarks.students.label_budget --out runs/label_budget                      # the built-in world
python -m benchmarks.students.label_budget --data data/msrd --labels runs/msrd/labels --init minilm --out runs/budget

All labels of the pool are there from the start, so a round costs its student alone. Every strategy goes through the
same budgets; its student of one budget chooses what the next one adds. Strategies that need a student share the first
round with `random`. The row `all` has every label of the pool. Students are linear in pairs of words and fitted by
margin MSE in a second (word_pair_ridge.py), or, with --init, BERTs by distill_student. A row that is finished (a line
in results.jsonl) is not run again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.students.runs import append_row, checkpoint_scores, finished_rows, judged_ranking, query_numbers
from benchmarks.students.word_pair_ridge import fit, pair_features, resampled_counts
from benchmarks.students.word_rankers import LIMITS, WordRanker, word_format
from ranking.card import CARD_NAME
from ranking.files import replacing
from ranking.metrics import mean
from ranking.program import run
from ranking.schema import read_table
from training.clicks.normalised_queries import normalise_query
from training.distill_student import DistillationSettings, distill
from training.evaluation.label_scores import label_scores
from training.sample_candidates import Config as SampleConfig
from training.sample_candidates import sample_candidates
from training.student.student_groups import groups_of
from training.student.student_training import start_student
from training.world.dataset import WorldConfig, write_world

LOGGER = logging.getLogger(__name__)
ALL = "all"
GOALS = (0.90, 0.98)  # shares of the NDCG@5 of all labels, whose price the table has

TEACHER_STEPS = 400
STUDENT, SECOND = "column:student", "column:second"  # the last round's students
Score = Callable[[pa.Table], NDArray[np.float32]]

# row -> settings of the draw
STRATEGIES: dict[str, dict[str, Any]] = {
    "random": {"strategy": "random"},
    "bands": {"strategy": "bands"},
    "diversity": {"strategy": "diversity"},
    "uncertainty": {"strategy": "uncertainty", "ranker": [STUDENT]},
    "uncertainty of two students": {"strategy": "uncertainty", "ranker": [STUDENT, SECOND]},
    "disagreement with BM25": {"strategy": "disagreement", "ranker": [STUDENT, "bm25"]},
    "disagreement of two students": {"strategy": "disagreement", "ranker": [STUDENT, SECOND]},
}


@dataclass
class Config:
    """Train students by strategy and budget, and print the table.

    Args:
        out: folder for the world, checkpoints and results.jsonl
        data: dataset folder whose candidates are the pool; none: a built-in world, labelled by a ranker of its judged
            train queries
        labels: finished labels of these candidates; needed with data
        strategies: rows to run; none: all
        shares: budgets as shares of the pool's labels, rising
        documents: documents of a query
        oversample: as in sample_candidates
        usefulness_power: as in sample_candidates
        seeds: seeds of draws and students
        init: start of BERT students; none: students are linear in pairs of words
        steps: optimiser steps of every BERT student, whatever its budget
        learning_rate: peak learning rate of BERT students
        world_queries: unlabelled queries of the built-in world
        tables: print the results that are there and train nothing
    """

    out: Path = Path("runs/label_budget")
    data: Path | None = None
    labels: Path | None = None
    strategies: list[str] = field(default_factory=lambda: list(STRATEGIES))
    shares: list[float] = field(default_factory=lambda: [0.025, 0.05, 0.1, 0.2, 0.4])
    documents: int = 8
    oversample: float = 4.0
    usefulness_power: float = 1.0
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    init: str | None = None
    steps: int = 500
    learning_rate: float = 5e-5
    world_queries: int = 4000
    tables: bool = False

    def __post_init__(self):
        if unknown := sorted(set(self.strategies) - set(STRATEGIES)):
            raise ValueError(f"strategies: {', '.join(unknown)} unknown; there are {', '.join(STRATEGIES)}")
        if (self.data is None) != (self.labels is None):
            raise ValueError("data and labels: both or neither")
        if not self.shares or any(not low < high <= 1 for low, high in pairwise([0, *self.shares])):
            raise ValueError(f"shares is {self.shares}: rising shares above 0, up to 1, are needed")


class Bench:
    """The pool with its labels, and what is trained on parts of it."""

    def __init__(self, config: Config):
        self.config = config
        self.data = config.data or make_world(config)
        self.pool_path = self.data / "candidates.parquet"
        pool = read_table(self.pool_path, "candidates")
        scores = label_scores(config.labels, pool) if config.labels else self._world_labels(pool)
        self.pool = pool.append_column("teacher_score", pa.array(scores, pa.float32()))
        self.dev, self.test = (
            read_table(self.data / "judgments" / f"{split}.parquet", "judgments") for split in ("dev", "test")
        )
        if config.init is None:
            self.features = {"pool": pair_features(pool), "test": pair_features(self.test)}
            self.dev_features = pair_features(self.dev), self.dev
        self.row_of = {key: row for row, key in enumerate(text_keys(pool))}

    def _world_labels(self, pool: pa.Table) -> NDArray[np.float32]:
        """Scores of the pool by the world's teacher: word embeddings that learnt the judged train queries."""
        kept = self.config.out / "labels.npy"
        if not kept.is_file():
            train = read_table(self.data / "judgments" / "train.parquet", "judgments")
            text_format = word_format(self.data, self.config.out / "vocabulary")
            teacher = WordRanker.of_table(text_format, [train], "grade", TEACHER_STEPS, 0)
            with replacing(kept) as aside, aside.open("wb") as stream:
                np.save(stream, teacher.scores(pool))
        return np.load(kept)

    def rows(self, files: list[Path]) -> NDArray[np.int64]:
        """Which rows of the pool candidates files name."""
        keys = [key for path in files for key in text_keys(read_table(path, "candidates"))]
        return np.array([self.row_of[key] for key in keys], np.int64)

    def student(
        self, out: Path, rows: NDArray[np.int64], seed: int, second: bool = False
    ) -> dict[str, NDArray[np.float32]]:
        """What a student of these rows' labels scores: "pool" and "test", float32 [rows], kept in scores.npz.

        second: another student of the same labels, for strategies that compare two.
        """
        kept = out / "scores.npz"
        if not kept.is_file():
            out.mkdir(parents=True, exist_ok=True)
            labelled = self.pool.take(pa.array(rows))
            if self.config.init is None:
                scores = self._linear(labelled, rows, seed if second else None)
            else:
                score = self._bert(out, labelled, seed + 50 * second)
                scores = {"pool": score(self.pool), "test": score(self.test)}
            with replacing(kept) as aside, aside.open("wb") as stream:
                np.savez(stream, **scores)
        found = np.load(kept)
        return {name: found[name] for name in ("pool", "test")}

    def _linear(
        self, labelled: pa.Table, rows: NDArray[np.int64], resampled: int | None
    ) -> dict[str, NDArray[np.float32]]:
        """Scores of a ranker of word pairs; resampled: seed of a draw of its queries with replacement, None for all."""
        counts = None if resampled is None else resampled_counts(labelled, resampled)
        targets = labelled.column("teacher_score").to_numpy()
        weights = fit(self.features["pool"][rows], targets, query_numbers(labelled), self.dev_features, counts)
        return {name: (features @ weights).astype(np.float32) for name, features in self.features.items()}

    def _bert(self, out: Path, labelled: pa.Table, seed: int) -> Score:
        if not (out / CARD_NAME).is_file():
            queries, steps = len(set(labelled.column("query_id").to_pylist())), self.config.steps
            settings = DistillationSettings(
                data=self.data,
                out=out,
                init=self.config.init,
                learning_rate=self.config.learning_rate,
                epochs=steps * 8 / queries,
                eval_steps=steps,
                batch_groups=8,
                group_documents=8,
                limits=LIMITS,
                seed=seed,
            )
            model = start_student(settings)
            groups = groups_of([labelled], "teacher_score", model.text_format)
            distill(settings, model, groups, None, {"labels": "pool"})
        return partial(checkpoint_scores, out, precision="auto")

    def draw(
        self, out: Path, row: str, queries: int, before: list[Path], students: list[NDArray[np.float32]], seed: int
    ) -> None:
        """Draw the pairs of one round into the file `out`; students: their scores of the pool."""
        if out.is_file():
            return
        pool, settings = self.pool_path, dict(STRATEGIES[row])
        if students:
            pool = out.with_name("pool.parquet")
            table = self.pool.drop_columns("teacher_score")
            for name, scores in zip(("student", "second"), students):
                table = table.append_column(name, pa.array(scores))
            pq.write_table(table, pool)
        half = self.config.documents // 2
        if settings["strategy"] == "bands":
            settings["bands"] = [f"{2 * half}:{half}", f"rest:{self.config.documents - half}"]
        else:
            settings["documents"] = self.config.documents
        sample_candidates(
            SampleConfig(
                pool=str(pool),
                out=out,
                queries=queries,
                oversample=self.config.oversample,
                usefulness_power=self.config.usefulness_power,
                labelled=before,
                exclude=[self.data / "judgments" / f"{split}.parquet" for split in ("dev", "test")],
                seed=seed,
                duckdb_threads=1,
                **settings,
            )
        )
        if students:
            pool.unlink()

    def measure(self, row: str, seed: int, share: float, labels: int, scores: NDArray[np.float32]) -> None:
        """Append the row's line: NDCG@5 on test. share: the budget, which short queries may leave some labels short."""
        line = {"row": row, "seed": seed, "share": share, "labels": labels}
        line["test"] = mean(judged_ranking(self.test, scores).ndcg(5))
        append_row(self.config.out, line)
        LOGGER.info("%s", line)


def text_keys(rows: pa.Table) -> list[tuple[str, str]]:
    """The normalised query and the document of each row: a draw gives all spellings of a query one id."""
    spelled = rows.column("query").to_pylist()
    clean = {query: normalise_query(query) for query in set(spelled)}
    return [(clean[query], document) for query, document in zip(spelled, rows.column("doc_id").to_pylist())]


def make_world(config: Config) -> Path:
    """A world without much of a log, since the pool's labels come from judgments here."""
    data = config.out / "world"
    if not (data / "dataset.json").is_file():
        write_world(
            WorldConfig(
                documents=10_000,
                clicked_pairs=2_000,
                log_queries=2_000,
                train_queries=1_500,
                test_queries=400,
                unlabelled_queries=config.world_queries,
            ),
            data,
        )
    return data


def run_rounds(bench: Bench, row: str, seed: int) -> None:
    """All budgets of one strategy, those that are not finished."""
    config = bench.config
    finished = {(line["row"], line["seed"], line["share"]) for line in finished_rows(config.out)}
    rankers = STRATEGIES[row].get("ranker", [])
    drawn: list[Path] = []
    students: list[NDArray[np.float32]] = []
    budgets = [round(share * len(bench.pool)) // config.documents for share in config.shares]
    for number, (before, queries) in enumerate(pairwise([0, *budgets]), start=1):
        # the first round of all strategies that need a student is random's
        name = "random" if rankers and number == 1 else row
        folder = config.out / f"seed-{seed}" / name.replace(" ", "-") / f"round-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        bench.draw(folder / "asked.parquet", name, queries - before, drawn, students, seed * 100 + number)
        drawn.append(folder / "asked.parquet")
        labelled = bench.rows(drawn)
        scores = bench.student(folder / "student", labelled, seed)
        share = config.shares[number - 1]
        if (row, seed, share) not in finished:
            bench.measure(row, seed, share, len(labelled), scores["test"])
        students = [scores["pool"]] if rankers else []
        if SECOND in rankers and number < len(budgets):
            students.append(bench.student(folder / "second", labelled, seed, second=True)["pool"])


def main(config: Config) -> None:
    """Run what is not finished, then print the table."""
    if not config.tables:
        config.out.mkdir(parents=True, exist_ok=True)
        bench = Bench(config)
        for seed in config.seeds:
            if (ALL, seed) not in {(line["row"], line["seed"]) for line in finished_rows(config.out)}:
                scores = bench.student(config.out / f"seed-{seed}" / ALL, np.arange(len(bench.pool)), seed)
                bench.measure(ALL, seed, 1.0, len(bench.pool), scores["test"])
            for row in config.strategies:
                run_rounds(bench, row, seed)
    print(table(finished_rows(config.out)))


def table(lines: list[dict[str, Any]]) -> str:
    """NDCG@5 on test by strategy and labels, mean and standard deviation over seeds, and the labels for each goal."""
    full = [line["test"] for line in lines if line["row"] == ALL]
    if not full:
        return "no finished row"
    goals = {goal: goal * float(np.mean(full)) for goal in GOALS}
    drawn = [line for line in lines if line["row"] != ALL]
    shares = sorted({line["share"] for line in drawn})
    budgets = {share: round(np.mean([line["labels"] for line in drawn if line["share"] == share])) for share in shares}
    shown = [
        f"all labels: {np.mean(full):.4f} ± {np.std(full):.4f} over {len(full)} seeds; "
        + ", ".join(f"{share:.0%} of it is {goal:.4f}" for share, goal in goals.items()),
        "",
        f"| strategy | {' | '.join(f'{budget:,}' for budget in budgets.values())} | "
        f"{' | '.join(f'labels for {share:.0%}' for share in goals)} |",
        "|---|" + "--:|" * (len(budgets) + len(goals)),
    ]
    for row in dict.fromkeys(line["row"] for line in drawn):
        found = {
            share: [line["test"] for line in drawn if (line["row"], line["share"]) == (row, share)] for share in shares
        }
        cells = [f"{np.mean(each):.4f} ± {np.std(each):.4f}" if each else "" for each in found.values()]
        means = {budgets[share]: float(np.mean(each)) for share, each in found.items() if each}
        prices = [labels_for(goal, means) for goal in goals.values()]
        shown.append(f"| {row} | {' | '.join([*cells, *prices])} |")
    return "\n".join(shown)


def labels_for(goal: float, means: dict[int, float]) -> str:
    """Labels at which NDCG@5 first reaches the goal, between two budgets on a line over log(labels)."""
    budgets = sorted(means)
    if means[budgets[0]] >= goal:
        return f"at most {budgets[0]:,}"
    for low, high in pairwise(budgets):
        if means[high] >= goal:
            share = (goal - means[low]) / (means[high] - means[low])
            return f"{round(low * (high / low) ** share, -2):,.0f}"
    return f"more than {budgets[-1]:,}"


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.students.label_budget --out runs/label_budget")
