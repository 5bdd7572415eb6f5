"""Several teachers against the best one: merged labels, and students with and without weights by disagreement.

python -m benchmarks.students.ensembles --out runs/ensembles                       # the built-in world, three seeds
python -m benchmarks.students.ensembles --data data/msrd --init minilm --out runs/ensembles_msrd

The judged train queries are dealt to three teachers that see none of each other's judgments. Their scores of the
candidates are merged in every way of training.blend_labels, and a student is distilled from each with the margin loss
of distill_student. Teachers and students are rankers of word embeddings alone, or, with --init, BERTs. A row that is
finished (a line in results.jsonl) is not run again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from benchmarks.students.runs import append_row, checkpoint_scores, finished_rows, judged_ranking, query_numbers
from benchmarks.students.word_rankers import LIMITS, WordRanker, word_format
from ranking.card import CARD_NAME
from ranking.files import replacing
from ranking.label_writer import write_labels
from ranking.metrics import mean
from ranking.program import run
from ranking.schema import read_table, write_table
from ranking.significance import paired_bootstrap
from ranking.text import StudentFormat
from training.distill_student import Config as StudentConfig
from training.distill_student import StudentLossSettings, distill_student, distillation_loss
from training.evaluation.blend_combination import disagreement, rank_fractions, ridge_weights
from training.evaluation.blend_weights import fit_weights
from training.student.checkpoint import ScoreScale
from training.student.student_groups import confidence_weights, labelled_groups, weighted
from training.train_baseline import Config as BaselineConfig
from training.train_baseline import train_baseline
from training.world.dataset import WorldConfig, write_world

LOGGER = logging.getLogger(__name__)
TEACHERS = 3
SPLITS = ("dev", "test")
BEST = "best single teacher"
Score = Callable[[pa.Table], NDArray[np.float32]]
Confidence = Literal["none", "disagreement"]


@dataclass
class Config:
    """Train teachers on disjoint judgments, merge them, distil students, and print the table.

    Args:
        out: folder for worlds, checkpoints, labels and results.jsonl
        data: dataset folder with judged train queries and candidates; none: a built-in world for each seed
        seeds: seeds of the world, the deal and the trainings
        init: start of BERT teachers and students; none: both are rankers of word embeddings
        teacher_steps: optimiser steps of a teacher
        steps: optimiser steps of a student
        learning_rate: peak learning rate of BERTs
        world_train_queries: judged train queries of the built-in world, a third for each teacher
        world_queries: unlabelled queries of the built-in world
        tables: print the results that are there and train nothing
    """

    out: Path = Path("runs/ensembles")
    data: Path | None = None
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    init: str | None = None
    teacher_steps: int = 300
    steps: int = 300
    learning_rate: float = 5e-5
    world_train_queries: int = 900
    world_queries: int = 2000
    tables: bool = False


class Seed:
    """One seed's world, teachers and their scores; everything is made when first asked for."""

    def __init__(self, config: Config, seed: int):
        self.config, self.seed, self.folder = config, seed, config.out / f"seed-{seed}"
        self.bert: dict[str, Any] = {"limits": LIMITS, "learning_rate": config.learning_rate, "init": config.init}
        self.bert |= {"batch_groups": 8, "group_documents": 8}

    @cached_property
    def data(self) -> Path:
        """The dataset folder: the one given, or a world made from the seed."""
        if self.config.data is not None:
            return self.config.data
        data = self.folder / "data"
        if not (data / "dataset.json").is_file():
            sizes: dict[str, Any] = {"train_queries": self.config.world_train_queries}
            sizes |= {"unlabelled_queries": self.config.world_queries}
            sizes |= {"documents": 10_000, "clicked_pairs": 2_000, "log_queries": 2_000, "test_queries": 400}
            write_world(WorldConfig(seed=self.seed, **sizes), data)
        return data

    def judgments(self, split: str) -> pa.Table:
        """The judgments of dev or test."""
        return read_table(self.data / "judgments" / f"{split}.parquet", "judgments")

    def part(self, number: int) -> Path:
        """A dataset folder whose train judgments are those dealt to one teacher."""
        folder = self.folder / f"part-{number}"
        if not (folder / "dataset.json").is_file():
            train = self.judgments("train")
            names = np.array(sorted(set(train.column("query_id").to_pylist())))
            mine = np.random.default_rng(self.seed).permutation(names)[number::TEACHERS]
            (folder / "judgments").mkdir(parents=True, exist_ok=True)
            kept = train.filter(pc.is_in(train.column("query_id"), value_set=pa.array(mine)))
            write_table(folder / "judgments" / "train.parquet", "judgments", kept)
            for name in ("judgments/dev.parquet", "judgments/test.parquet", "candidates.parquet", "dataset.json"):
                shutil.copyfile(self.data / name, folder / name)
        return folder

    @cached_property
    def text_format(self) -> StudentFormat:
        """The text format of word rankers."""
        return word_format(self.data, self.folder / "vocabulary")

    def teacher(self, number: int) -> Score:
        """A teacher of one part's judgments."""
        part, seed, steps = self.part(number), 10 * self.seed + number, self.config.teacher_steps
        train = read_table(part / "judgments" / "train.parquet", "judgments")
        if self.config.init is None:
            return WordRanker.of_table(self.text_format, [train], "grade", steps, seed).scores
        out = self.folder / f"teacher-{number}"
        if not (out / CARD_NAME).is_file():
            queries = len(set(train.column("query_id").to_pylist()))
            settings = self.bert | {"epochs": steps * 8 / queries, "eval_steps": steps, "seed": seed}
            train_baseline(BaselineConfig(data=part, out=out, loss="ranknet", **settings))
        return partial(checkpoint_scores, out, precision="auto")

    @cached_property
    def scores(self) -> dict[str, NDArray[np.float64]]:
        """Teachers' scores of candidates, dev and test, float [rows, teachers], on the candidates' scale."""
        raw: dict[str, list[NDArray[np.float64]]] = {where: [] for where in ("candidates", *SPLITS)}
        for number in range(TEACHERS):
            kept = self.folder / f"scores-{number}.npz"
            if not kept.is_file():
                score = self.teacher(number)
                found = {where: score(self.rows(where)) for where in raw}
                with replacing(kept) as aside, aside.open("wb") as stream:
                    np.savez(stream, **found)
            loaded = np.load(kept)
            for where, columns in raw.items():
                columns.append(loaded[where].astype(np.float64))
        scores = {where: np.stack(columns, axis=1) for where, columns in raw.items()}
        centre, spread = scores["candidates"].mean(axis=0), scores["candidates"].std(axis=0)
        return {where: (columns - centre) / spread for where, columns in scores.items()}

    @cached_property
    def candidates(self) -> pa.Table:
        """The pairs that the teachers label."""
        return read_table(self.data / "candidates.parquet", "candidates")

    def rows(self, where: str) -> pa.Table:
        """The candidates, or the judgments of dev or test."""
        return self.candidates if where == "candidates" else self.judgments(where)

    def order(self) -> NDArray[np.int64]:
        """Teachers by their NDCG@5 on dev, best first."""
        dev = self.judgments("dev")
        quality = [mean(judged_ranking(dev, column.astype(np.float32)).ndcg(5)) for column in self.scores["dev"].T]
        return np.argsort(-np.array(quality), kind="stable")

    def merged(self, row: str, where: str) -> NDArray[np.float32]:
        """One way's scores of candidates, dev or test: float32 [rows]."""
        scores, dev_scores = self.scores[where][:, self.order()], self.scores["dev"][:, self.order()]
        rows, dev = self.rows(where), self.judgments("dev")
        judged = dev.column("grade").to_numpy(), query_numbers(dev)
        ways: dict[str, Callable[[], NDArray[np.float64]]] = {
            BEST: lambda: scores[:, 0],
            "second teacher": lambda: scores[:, 1],
            "third teacher": lambda: scores[:, 2],
            "mean of two": lambda: scores[:, :2].mean(axis=1),
            "mean of three": lambda: scores.mean(axis=1),
            "rank mean of three": lambda: np.stack(
                [rank_fractions(column, query_numbers(rows)) for column in scores.T], axis=1
            ).mean(axis=1),
            "weights fitted on dev": lambda: scores @ fit_weights(dev_scores, *judged),
            "ridge on dev": lambda: scores @ ridge_weights(dev_scores, *judged),
        }
        return ways[row]().astype(np.float32)

    def student(self, row: str, confidence: Confidence) -> Score:
        """A student of one way's labels."""
        name = row.replace(" ", "-")
        labels, out = self.folder / f"labels-{name}", self.folder / f"student-{name}-{confidence}"
        candidates = self.data / "candidates.parquet"
        if not labels.exists():
            teachers = 2 if row == "mean of two" else TEACHERS
            apart = disagreement(self.scores["candidates"][:, self.order()[:teachers]])
            made_by = f"seed-{self.seed}-{name}"
            write_labels(labels, candidates, self.candidates, self.merged(row, "candidates"), made_by, {}, apart)
        if self.config.init is None:
            groups = labelled_groups(candidates, labels, self.text_format)
            groups.targets = ScoreScale.of(groups.targets).standardise(groups.targets)
            if confidence != "none":
                groups = weighted(groups, confidence_weights(candidates, labels))
            loss = distillation_loss(StudentLossSettings(loss="margin"))
            return WordRanker.fit(self.text_format, groups, self.config.steps, self.seed, loss).scores
        if not (out / CARD_NAME).is_file():
            queries = len(set(self.candidates.column("query_id").to_pylist()))
            steps: dict[str, Any] = {"epochs": self.config.steps * 8 / queries, "eval_steps": self.config.steps}
            distill_student(
                StudentConfig(
                    data=self.data,
                    out=out,
                    labels=labels,
                    confidence=confidence,
                    loss="margin",
                    seed=self.seed,
                    **steps,
                    **self.bert,
                )
            )
        return partial(checkpoint_scores, out, precision="auto")


ROWS = (
    BEST,
    "second teacher",
    "third teacher",
    "mean of two",
    "mean of three",
    "rank mean of three",
    "weights fitted on dev",
    "ridge on dev",
)
# rows of which students are distilled; of means also one whose labels are weighted by the teachers' disagreement
STUDENTS: tuple[tuple[str, Confidence], ...] = (
    *((row, "none") for row in ROWS if row not in ("second teacher", "third teacher")),
    ("mean of two", "disagreement"),
    ("mean of three", "disagreement"),
)


def main(config: Config) -> None:
    """Run what is not finished, then print the tables."""
    for seed in [] if config.tables else config.seeds:
        (config.out / f"seed-{seed}").mkdir(parents=True, exist_ok=True)
        of_seed = Seed(config, seed)
        finished = {(line["row"], line["seed"]) for line in finished_rows(config.out)}
        for row in ROWS:
            scores = {split: of_seed.merged(row, split) for split in SPLITS}
            measure(of_seed, f"teacher: {row}", scores, finished)
        for row, confidence in STUDENTS:
            name = f"student: {row}" + (", less weight where they disagree" if confidence != "none" else "")
            if (name, seed) not in finished:
                score = of_seed.student(row, confidence)
                found = {split: score(of_seed.judgments(split)) for split in SPLITS}
                measure(of_seed, name, found, finished)
    print(table(finished_rows(config.out)))


def measure(seed: Seed, name: str, scores: dict[str, NDArray[np.float32]], finished: set[tuple[str, int]]) -> None:
    """Append a row's line with NDCG@5 and PNR on dev and test, unless it is there."""
    if (name, seed.seed) in finished:
        return
    line: dict[str, Any] = {"row": name, "seed": seed.seed}
    for split in SPLITS:
        judged = judged_ranking(seed.judgments(split), scores[split])
        line |= {split: mean(judged.ndcg(5)), f"{split}_pnr": judged.pairs().pnr}
        line[f"{split}_per_query"] = judged.ndcg(5).round(5).tolist()
    append_row(seed.config.out, line)
    LOGGER.info("%s, seed %d: test NDCG@5 %.4f", name, seed.seed, line["test"])


def table(lines: list[dict[str, Any]]) -> str:
    """NDCG@5 and PNR on test, mean and deviation over seeds; the difference to the best single teacher's row.

    The difference is that of the queries of all seeds, with its 95% bootstrap interval; students are compared with the
    student of the best single teacher.
    """
    shown = ["| row | seeds | NDCG@5 | PNR | NDCG@5 against the best single teacher's |", "|---|--:|--:|--:|---|"]
    by_row: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        by_row.setdefault(line["row"], {})[line["seed"]] = line
    for name, found in by_row.items():
        rival = by_row.get(f"{name.partition(':')[0]}: {BEST}", {})
        shared = sorted(set(found) & set(rival))
        versus = ""
        if shared and not name.endswith(BEST):
            ours, theirs = (
                np.concatenate([rows[seed]["test_per_query"] for seed in shared]) for rows in (found, rival)
            )
            gap = paired_bootstrap(ours, theirs)
            versus = f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"
        quality, pnr = (np.array([line[key] for line in found.values()]) for key in ("test", "test_pnr"))
        shown.append(
            f"| {name} | {len(found)} | {quality.mean():.4f} ± {quality.std():.4f} | {pnr.mean():.2f} | {versus} |"
        )
    return "\n".join(shown)


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.students.ensembles --out runs/ensembles")
