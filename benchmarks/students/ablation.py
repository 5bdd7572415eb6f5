"""Does each stage earn its place? Every row of the paper's ablation on the built-in world, several seeds, one command.

python -m benchmarks.students.ablation --out runs/ablation                # everything; go on after any interruption
python -m benchmarks.students.ablation --out runs/ablation --report docs/results

A seed is a world (documents, queries, hidden synonyms, clicks) and a training seed; with --data, a training seed alone.
With --world-seeds every training seed runs on every one of those worlds.
A row that is finished (a line in results.jsonl) is never run again, an interrupted training goes on where it was, and
what rows share (world, pre-trained decoder, teacher, labels) is made once a seed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from benchmarks.students.ablation_report import folder_of, write_report
from benchmarks.students.runs import (
    append_row,
    checkpoint_scores,
    finished_rows,
    query_numbers,
    started,
    text_columns,
)
from ranking.bm25 import bm25_scores
from ranking.card import CARD_NAME, ScoreCard, fingerprint
from ranking.errors import InputError
from ranking.files import replacing
from ranking.limits import FieldLimits
from ranking.metrics import JudgedRanking, mean
from ranking.program import parse, run
from ranking.schema import read_table
from training import finetune_teacher, pretrain_teacher
from training.distill_student import DistillationSettings, distill
from training.student.student_groups import groups_of
from training.student.student_training import start_student
from training.train_baseline import Config as BaselineConfig
from training.train_baseline import train_baseline
from training.world.dataset import WorldConfig, make_world, write_world
from training.world.drift import DriftSettings

LOGGER = logging.getLogger(__name__)

CONFIGS = Path(__file__).parents[2] / "training" / "configs"


@dataclass
class Config:
    """Run the ablation's rows and write its table and plots.

    Args:
        out: folder for worlds, checkpoints, scores and results.jsonl
        seeds: seeds of world and training; three or more for a mean and a spread
        world_seeds: worlds, on each of which every seed trains; none: a seed's world has its own number
        rows: rows to run, in this order; none: all of them, the main ones first
        data: dataset folder for all seeds; none: each seed makes a world of its own
        teachers: --runs folder of benchmarks/teacher/pretraining_gain.py on that data, whose teachers need not be
            trained again
        sample: small makes a tiny world and trains for moments, to see that everything runs; full is what is reported
        student_size: shape of students and baselines, see docs/students.md
        student_epochs: passes over the labelled queries
        baseline_epochs: passes over the judged train queries
        match_steps: late-interaction steps on their own training groups from which students and baselines start
        learning_rate: peak learning rate of students and baselines
        labelled_queries: unlabelled queries that the teacher labels; 0 for all
        report: folder for ablation.md and ablation.png; none: print the table only
        tables: report the results that are there and train nothing
    """

    out: Path = Path("runs/ablation")
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    world_seeds: list[int] | None = None
    rows: list[str] | None = None
    data: Path | None = None
    teachers: Path | None = None
    sample: Literal["full", "small"] = "full"
    student_size: str = "mini-3"
    student_epochs: float = 4
    baseline_epochs: float = 10
    match_steps: int = 300
    learning_rate: float = 1e-3
    labelled_queries: int = 0
    report: Path | None = None
    tables: bool = False

    def __post_init__(self):
        unknown = sorted(set(self.rows or []) - set(ROWS))
        if unknown:
            raise ValueError(f"rows: {', '.join(unknown)} unknown; there are {', '.join(ROWS)}")
        if not self.seeds:
            raise ValueError("seeds: at least one is needed")
        if self.world_seeds is not None and self.data is not None:
            raise ValueError("world_seeds make worlds, data is one dataset for all seeds: give one of the two")
        if self.teachers is not None and self.data is None:
            raise ValueError("teachers were trained on one dataset: data is needed with them")


@dataclass
class Seed:
    """One seed's folder and what its rows share; everything is made when first asked for."""

    config: Config
    seed: int
    world_seed: int | None = None

    @property
    def name(self) -> str:
        """What its folder is called, which its lines of results.jsonl refer to."""
        return f"seed-{self.seed}" if self.world_seed is None else f"world-{self.world_seed}-seed-{self.seed}"

    @property
    def folder(self) -> Path:
        """The folder of all that this seed makes."""
        return self.config.out / self.name

    def data(self) -> Path:
        """The dataset folder: the one given, or a world made from the seed."""
        if self.config.data is not None:
            return self.config.data
        shared = self.world_seed is not None
        data = self.config.out / f"world-{self.world_seed}" if shared else self.folder / "data"
        if not (data / "dataset.json").is_file():
            small, seed = self.config.sample == "small", self.seed if self.world_seed is None else self.world_seed
            write_world(WorldConfig.small(seed=seed) if small else WorldConfig(seed=seed), data)
        return data

    def held_out_intents(self) -> set[str] | None:
        """The test queries whose intent occurs in no query of the log or of the candidates; None if the dataset is no
        world: nobody knows the intents of others.
        """
        content = json.loads((self.data() / "dataset.json").read_text(encoding="utf-8"))
        if "world" not in content:
            return None
        settings = content["world"] | {"drift": DriftSettings(**content["world"].get("drift", {}))}
        world = make_world(WorldConfig(**settings))
        known = {query.intent() for query in (*world.logged, *world.unlabelled)}
        return {f"test-q{n:05d}" for n, query in enumerate(world.judged["test"]) if query.intent() not in known}

    def judgments(self, split: str) -> pa.Table:
        """The judgments of train, dev or test."""
        return read_table(self.data() / "judgments" / f"{split}.parquet", "judgments")

    def pretrained(self, queries: str = "clicked") -> Path:
        """A pre-trained decoder; queries: "clicked", or "document": words of the document stand for its query."""
        knobs = {"queries": queries}
        return self._made(
            f"pretrained-{queries}", lambda out: self._teacher_stage(pretrain_teacher, "pretrain_small", out, knobs)
        )

    def start(self, name: str = "start", **knobs: Any) -> Path:
        """A teacher that has learnt its own likelihood and no judgment; knobs as for teacher."""
        knobs = {"model": self.pretrained()} | knobs
        return self._made(name, lambda out: self._teacher_stage(finetune_teacher, "likelihood_small", out, knobs))

    def teacher(self, name: str = "teacher", model: Path | None = None, **knobs: Any) -> Path:
        """A fine-tuned teacher; knobs: settings of finetune_teacher that differ from the small configuration."""
        knobs = {"model": model or self.start()} | knobs
        return self._made(name, lambda out: self._teacher_stage(finetune_teacher, "finetune_small", out, knobs))

    def labels(self) -> pa.Table:
        """The candidates with the teacher's scores, computed in process: the same numbers that Triton serves."""
        candidates = read_table(self.data() / "candidates.parquet", "candidates")
        if self.config.labelled_queries:
            chosen = candidates.column("query_id").unique()[: self.config.labelled_queries]
            candidates = candidates.filter(pc.is_in(candidates.column("query_id"), value_set=chosen))
        kept = self.folder / "labels.npy"
        if not kept.is_file():
            scores = checkpoint_scores(self.teacher(), candidates)
            with replacing(kept) as aside, aside.open("wb") as stream:
                np.save(stream, scores)
        scores = np.load(kept)
        if len(scores) != len(candidates):
            raise InputError(f"{kept}: {len(scores)} labels for {len(candidates)} candidates; give another --out")
        return candidates.append_column("teacher_score", pa.array(scores, pa.float32()))

    def student(self, name: str, size: str | None = None, **knobs: Any) -> Path:
        """A distilled student; knobs: settings of distill_student that differ from the other students'."""

        def make(out: Path) -> None:
            settings = DistillationSettings(
                data=self.data(),
                out=out,
                seed=self.seed,
                epochs=self.config.student_epochs,
                resume=started(out),
                **(self._start_knobs(size) | knobs),
            )
            model = start_student(settings)
            card = ScoreCard.load(self.teacher())
            labelled = groups_of([self.labels()], "teacher_score", model.text_format)
            distill(settings, model, labelled, card, {"labels": fingerprint(self.teacher() / "model.safetensors")})

        return self._made(name, make)

    def baseline(self, name: str, loss: Any) -> Path:
        """A baseline trained on the judgments with that loss."""

        def make(out: Path) -> None:
            epochs = self.config.baseline_epochs
            train_baseline(
                BaselineConfig(
                    data=self.data(),
                    out=out,
                    loss=loss,
                    epochs=epochs,
                    patience=3,
                    seed=self.seed,
                    resume=started(out),
                    **self._start_knobs(None),
                )
            )

        return self._made(name, make)

    def _start_knobs(self, size: str | None) -> dict[str, Any]:
        return {
            "limits": LIMITS,
            "size": size or self.config.student_size,
            "match_steps": self.config.match_steps,
            "learning_rate": self.config.learning_rate,
            "warmup": 20,
            "batch_groups": 8,
            "group_documents": 8,
            "log_steps": 50,
        }

    def _teacher_stage(self, program: Any, config: str, out: Path, knobs: dict[str, Any]) -> None:
        if self.config.sample == "small":
            knobs = knobs | ({"epochs": 1} if program is finetune_teacher else {"epochs": 0.5, "vocabulary": 1000})
        knobs = {"data": self.data(), "out": out, "seed": self.seed} | knobs
        argv = ["--config", str(CONFIGS / f"{config}.yaml")]
        argv += [
            f"--{name.replace('_', '-')}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in knobs.items()
        ]
        program.main(parse(program.Config, [*argv, *(["--resume"] if started(out) else [])], prog=config))

    def _made(self, name: str, make: Callable[[Path], None], mark: str = CARD_NAME) -> Path:
        if self.config.teachers is not None:
            made = self.config.teachers / f"{SAME_AS_GAIN.get(name, name)}-{self.seed}"
            if (made / mark).is_file():
                return made
        out = self.folder / name
        if not (out / mark).is_file():
            make(out)
        return out


# rows whose checkpoints benchmarks/teacher/pretraining_gain.py makes under another name
SAME_AS_GAIN = {
    "start": "start-clicked",
    "start-no-cpt": "start-document",
    "teacher": "teacher-clicked",
    "teacher-no-cpt": "teacher-document",
}
# the best of those tried for a teacher that goes from stage 1 to judgments at once
RATE_WITHOUT_START = 8e-4

PAPERS_LOSS: dict[str, Any] = {"loss": "hybrid", "alpha": 1.0}
LIMITS = FieldLimits(max_query_tokens=16, max_title_tokens=24, max_summary_tokens=48)

# row -> (checkpoint or None for BM25, the row it must beat); the main rows first
ROWS: dict[str, tuple[Callable[[Seed], Path] | None, str | None]] = {
    "bm25": (None, None),
    "teacher": (lambda s: s.teacher(), "teacher-no-cpt"),
    "baseline-pair": (lambda s: s.baseline("baseline-pair", "ranknet"), "bm25"),
    "student-hybrid": (lambda s: s.student("student-hybrid", **PAPERS_LOSS), "baseline-pair"),
    "student-point": (lambda s: s.student("student-point", loss="point"), "baseline-pair"),
    "student-margin": (lambda s: s.student("student-margin", loss="margin"), "baseline-pair"),
    "teacher-no-cpt": (
        lambda s: s.teacher("teacher-no-cpt", s.start("start-no-cpt", model=s.pretrained("document"))),
        "bm25",
    ),
    "teacher-no-judgments": (lambda s: s.start(), "bm25"),
    "teacher-no-likelihood": (
        lambda s: s.teacher("teacher-no-likelihood", s.pretrained(), learning_rate=RATE_WITHOUT_START),
        "bm25",
    ),
    "teacher-random": (
        lambda s: s.teacher("teacher-random", s.pretrained(), learning_rate=RATE_WITHOUT_START, reinitialise=True),
        "bm25",
    ),
    "baseline-point": (lambda s: s.baseline("baseline-point", "point"), "bm25"),
    "teacher-point": (lambda s: s.teacher("teacher-point", loss="point"), "bm25"),
    "teacher-mean-pool": (
        lambda s: s.teacher("teacher-mean-pool", s.start("start-mean-pool", pooling="mean"), pooling="mean"),
        "bm25",
    ),
    "student-ranknet": (lambda s: s.student("student-ranknet", loss="ranknet"), "baseline-pair"),
    "student-kl": (lambda s: s.student("student-kl", loss="kl"), "baseline-pair"),
    "student-6": (lambda s: s.student("student-6", size="mini-6", **PAPERS_LOSS), "baseline-pair"),
    # twelve layers from scratch stay at random order with the others' rate and short warm-up
    "student-12": (
        lambda s: s.student("student-12", size="mini-12", **PAPERS_LOSS, learning_rate=3e-4, warmup=0.1),
        "baseline-pair",
    ),
}


def main(config: Config) -> None:
    """Run the rows that are not finished, then print the table of all that are."""
    worlds: list[int | None] = [*config.world_seeds] if config.world_seeds else [None]
    seeds = [Seed(config, seed, world) for world in worlds for seed in config.seeds]
    finished = {(row["row"], folder_of(row)) for row in finished_rows(config.out)}
    for name in [] if config.tables else config.rows or list(ROWS):
        for seed in seeds:
            if (name, seed.name) not in finished:
                run_row(config, name, seed)
    beats = {name: rival for name, (_, rival) in ROWS.items()}
    print(write_report(finished_rows(config.out), config.out, beats, config.report))


def run_row(config: Config, name: str, seed: Seed) -> None:
    """Make the row's checkpoint, score dev and test, keep the scores, and append the line that says it is finished."""
    LOGGER.info("row %s, seed %d", name, seed.seed)
    start = time.perf_counter()
    make = ROWS[name][0]
    checkpoint = None if make is None else make(seed)
    train_seconds = time.perf_counter() - start
    score = bm25_of(seed) if checkpoint is None else partial(checkpoint_scores, checkpoint)
    line: dict[str, Any] = {"row": name, "seed": seed.seed, "train_seconds": round(train_seconds, 1)}
    if seed.world_seed is not None:
        line["world"] = seed.world_seed
    held_out = seed.held_out_intents()
    for split in ("dev", "test"):
        judged = seed.judgments(split)
        scores = score(judged)
        (seed.folder / "scores").mkdir(parents=True, exist_ok=True)
        np.savez(
            seed.folder / "scores" / f"{name}-{split}.npz",
            scores=scores,
            grades=judged.column("grade").to_numpy(),
            groups=query_numbers(judged),
            **_marked(judged, held_out if split == "test" else None),
        )
        line |= {f"{split}_{metric}": value for metric, value in figures(seed, name, split).items()}
    append_row(config.out, line)
    LOGGER.info("row %s, seed %d: %s", name, seed.seed, line)


def _marked(judged: pa.Table, queries: set[str] | None) -> dict[str, NDArray[np.bool_]]:
    """`held_out`, bool [rows]: whether the row's query is one of these; nothing where they are not known."""
    if queries is None:
        return {}
    return {"held_out": np.array([query in queries for query in judged.column("query_id").to_pylist()])}


def figures(seed: Seed, name: str, split: str) -> dict[str, float]:
    """NDCG@5 and PNR of a row, from its stored scores."""
    stored = np.load(seed.folder / "scores" / f"{name}-{split}.npz")
    judged = JudgedRanking(stored["scores"], stored["grades"], stored["groups"])
    return {"ndcg@5": mean(judged.ndcg(5)), "pnr": judged.pairs().pnr}


def bm25_of(seed: Seed) -> Callable[[pa.Table], NDArray[np.float32]]:
    """BM25 of a judgments table, its word statistics taken from the candidates too."""
    documents = read_table(seed.data() / "candidates.parquet", "candidates")
    corpus = list(dict.fromkeys(zip(documents.column("title").to_pylist(), documents.column("summary").to_pylist())))
    return lambda judged: bm25_scores(*text_columns(judged), corpus=corpus)


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.students.ablation --out runs/ablation --report docs/results")
