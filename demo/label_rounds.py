"""Spends a budget of labels in rounds: sample, label what is new, distil, and let the student choose the next pairs.

python -m demo.label_rounds --data data/shop --out runs/rounds --budget 5000,10000,20000 --strategy disagreement \
    --label "clients/label_corpus.py --store runs/store --url localhost:8001"

Each round draws queries that no round before has drawn, labels all pairs drawn so far (the store has the old ones) and
trains a student on them. A stage that is done is not run again, so an interrupted run goes on, and a larger budget at
the end adds rounds. OUT/rounds.json has NDCG@5 on dev against labels spent, after every round.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from demo.stages import ROOT, Stages, note, one_run, run_program
from ranking.card import ScoreCard
from ranking.files import write_json
from ranking.labels import LabelSet
from ranking.program import run
from ranking.schema import read_table, write_table

NDCG = "ndcg@5"
ASKS_A_TEACHER = ("label_corpus.py", "label_over_http.py", "clients.label_corpus", "clients.label_over_http")
EXIT_REJECTS = 3  # of the labelling programs: finished, some pairs have no score
MISSING_NAME = "missing.parquet"  # of a labels folder that was made through a store: the rows that the store lacked
FROM_STUDENTS = ("disagreement", "uncertainty")


@dataclass
class Config:
    """Label in rounds: every round's student says which pairs the next one asks for.

    Args:
        data: dataset folder; its candidates are the pool, its dev judgments measure each round
        out: folder of the run; a second run goes on where the first one stopped
        label: the labelling program and its flags in one text, "clients/label_corpus.py --store runs/store --url ..."
            or "-m training.blend_labels --data ..."; candidates and out are added to it
        budget: labels in all after each round, rising
        pool: candidates file, folder or glob to draw from, if not the dataset's candidates
        strategy: how rounds after the first are drawn, as in sample_candidates
        first_strategy: how the first round is drawn, when there is no student yet
        documents: documents of a query; of the strategy bands, half of them among BM25's best `documents`
        students: students trained a round, by different seeds; with two, disagreement is theirs
        ranker: further rankers of the strategies disagreement and uncertainty; with one student disagreement wants one
        sample_flags: further flags of sample_candidates in one text, such as "--events logs --oversample 8"
        student_config: settings of the students' training
        student_flags: further flags of distill_student in one text, such as "--init minilm"
        seed: of draws and students
    """

    data: Path
    out: Path
    label: str
    budget: list[int]
    pool: str = ""
    strategy: Literal["bands", "random", "disagreement", "uncertainty", "diversity"] = "disagreement"
    first_strategy: Literal["bands", "random", "diversity"] = "bands"
    documents: int = 8
    students: int = 1
    ranker: list[str] = field(default_factory=lambda: ["bm25"])
    sample_flags: str = ""
    student_config: Path = Path("training/configs/student_small.yaml")
    student_flags: str = ""
    seed: int = 1

    def __post_init__(self) -> None:
        if self.documents < 1 or self.students < 1:
            raise ValueError("documents and students must be at least 1")
        if not self.budget or any(later - spent < self.documents for spent, later in pairwise([0, *self.budget])):
            raise ValueError(
                f"budget is {self.budget}: each must be at least documents ({self.documents}) above the one before"
            )
        if self.strategy == "disagreement" and self.students + len(self.ranker) < 2:
            raise ValueError("strategy disagreement: two students, or one and a --ranker such as bm25, are needed")
        words = shlex.split(self.label)
        if not words:
            raise ValueError("label: a labelling program is needed, such as clients/label_corpus.py --store ...")
        asks = any(word.endswith(ASKS_A_TEACHER) for word in words)
        if asks and not any(word.split("=")[0] == "--store" for word in words):
            raise ValueError("label: --store is missing; without it every round pays for the rounds before it")


def flow(config: Config) -> dict[str, Any]:
    """Run the rounds that are not finished; returns what rounds.json says. InputError names a command that failed."""
    stages = Stages(config.out, total=len(config.budget) * (3 + config.students))
    report: dict[str, Any] = {"strategy": config.strategy, "rounds": [], "stopped": ""}
    students: list[Path] = []
    drawn: list[Path] = []
    spent = 0
    for number, budget in enumerate(config.budget, start=1):
        folder = config.out / f"round-{number}"
        folder.mkdir(exist_ok=True)
        # what queries with few documents left over is spent here
        sampled = sample_round(stages, config, folder, (budget - spent) // config.documents, drawn, students)
        spent += sampled["pairs"]
        drawn = [*drawn, folder / "asked.parquet"]
        candidates, labels = folder / "candidates.parquet", folder / "labels"
        stages.run(
            f"join_{number}", "all pairs drawn so far", joining(drawn, candidates), [str(path) for path in drawn]
        )
        command = [*shlex.split(config.label), "--candidates", str(candidates), "--out", str(labels)]
        stages.run(
            f"label_{number}", "labels of what is new", labelling(command), command, made=labels
        )  # an interrupted labelling goes on in its folder
        students = train_students(stages, config, folder, number)
        report["rounds"].append(
            {
                "round": number,
                "strategy": sampled["strategy"],
                "queries": sampled["queries"],
                "labels": LabelSet.load(labels).labels,
                "asked_of_teacher": asked_of_teacher(labels, sampled["pairs"]),
                NDCG: [ScoreCard.load(student).metrics[NDCG] for student in students],
            }
        )
        if sampled["pool_queries"] == sampled["queries"] and number < len(config.budget):
            report["stopped"] = "every query of the pool has been drawn"
        write_json(config.out / "rounds.json", report)
        if report["stopped"]:
            break
    return report


def sample_round(
    stages: Stages, config: Config, folder: Path, queries: int, drawn: list[Path], students: list[Path]
) -> dict[str, Any]:
    """Draw this round's pairs into folder/asked.parquet; returns the report of the draw."""
    number = len(drawn) + 1
    strategy = config.strategy if students else config.first_strategy
    rankers = [f"checkpoint:{student}" for student in students] + config.ranker if strategy in FROM_STUDENTS else []
    held_out = [path for split in ("dev", "test") if (path := config.data / "judgments" / f"{split}.parquet").is_file()]
    asked, half = folder / "asked.parquet", config.documents // 2
    size = ["--documents", str(config.documents)]
    if strategy == "bands":
        size = ["--bands", f"{config.documents}:{half},rest:{config.documents - half}"]
    command = [
        "-m", "training.sample_candidates", "--pool", config.pool or str(config.data / "candidates.parquet"),
        "--out", str(asked), "--strategy", strategy, "--queries", str(queries), *size,
        "--seed", str(config.seed + number - 1),
        *(word for ranker in rankers for word in ("--ranker", ranker)),
        *(word for path in held_out for word in ("--exclude", str(path))),
        *(word for path in drawn for word in ("--labelled", str(path))),
        *shlex.split(config.sample_flags),
    ]  # fmt: skip

    def work() -> dict[str, Any]:
        run_program(*command)
        return json.loads(asked.with_suffix(".report.json").read_text(encoding="utf-8"))

    return stages.run(f"sample_{number}", f"round {number}: {queries} queries by {strategy}", work, command)


def joining(drawn: list[Path], out: Path) -> Callable[[], None]:
    """Work that writes the rows of several candidates files into one, in their order."""
    return lambda: write_joined(drawn, out)


def write_joined(drawn: list[Path], out: Path) -> None:
    """Write the rows of several candidates files into one, in their order; rounds have no query in common."""
    write_table(out, "candidates", (read_table(path, "candidates") for path in drawn))


def asked_of_teacher(labels: Path, drawn: int) -> int:
    """Pairs that a round's labelling asked its teacher for: what the store lacked, without a store all that were drawn.

    drawn: the round's new pairs.
    """
    missing = labels / MISSING_NAME
    return pq.read_metadata(missing).num_rows if missing.is_file() else drawn


def labelling(command: list[str]) -> Callable[[], None]:
    """Work that runs the labelling command; pairs that the teacher refused do not stop the rounds."""
    return lambda: run_program(*command, accept=(0, EXIT_REJECTS))


def train_students(stages: Stages, config: Config, folder: Path, number: int) -> list[Path]:
    """Train the round's students on all labels so far; returns their checkpoints."""
    trained = [folder / f"student-{member}" for member in range(1, config.students + 1)]
    for member, out in enumerate(trained):
        stages.program(
            f"student_{number}_{member + 1}", f"student {member + 1} of round {number}",
            "-m", "training.distill_student", "--config", config.student_config, "--data", config.data,
            "--candidates", folder / "candidates.parquet", "--labels", folder / "labels", "--out", out,
            "--seed", str(config.seed + member), *shlex.split(config.student_flags), made=out,
        )  # fmt: skip
    return trained


def main(config: Config) -> None:
    """Run the rounds and print NDCG@5 on dev against the labels spent."""
    for name in ("data", "out"):
        setattr(config, name, ROOT / getattr(config, name))  # the commands run from the repository's root
    with one_run(config.out):
        found = flow(config)
    if found["stopped"]:
        note(found["stopped"])
    print(f"{'labels':>10}  {NDCG} on dev")
    for row in found["rounds"]:
        print(f"{row['labels']:>10}  {'  '.join(f'{value:.4f}' for value in row[NDCG])}")


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m demo.label_rounds --data data/shop --out runs/rounds --budget 5000,10000,20000 "
        "--label 'clients/label_corpus.py --store runs/store --url localhost:8001'",
    )
