"""Does the loop close? Rounds of serve, log, retrain on a world whose taste drifts, against a student that stays.

python -m benchmarks.loop --seeds 1 --out runs/loop             # goes on after any interruption
python -m benchmarks.loop --seeds 1 2 3 --report docs/results   # and writes loop.md of all rounds that are there

In every round two arms serve five days each: the student of the first day (frozen) and the one that demo.retrain made
of the rounds before (loop). From the second round on, people want what nobody wanted before, and words change meaning.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.retraining.daily_watch import alerts_of, ctr_of, keep_version, read_json
from benchmarks.retraining.loop_report import write_report
from benchmarks.retraining.searches import Wishes, pairs_table
from benchmarks.retraining.served_days import CheckpointScores, plan_day, serve
from demo import retrain
from demo.stages import Stages, run_program
from ranking.card import CARD_NAME
from ranking.errors import InputError
from ranking.files import write_json, write_text
from ranking.metrics import JudgedRanking
from ranking.program import run
from ranking.schema import read_table
from training.evaluation.checkpoint_scores import Scorer
from training.world.dataset import WorldConfig, make_world, write_world
from training.world.drift import DriftSettings

LOGGER = logging.getLogger(__name__)
FIRST_DAY = date(2026, 3, 2)
FROZEN, LOOP = "frozen", "loop"
REFUSED = "refused.json"


def loop_world() -> WorldConfig:
    """A world small enough that a round of it ends in minutes on one core, two fifths of whose heads drift."""
    drift = DriftSettings(new_intents=0.2, moved_meanings=0.2)
    return WorldConfig(
        documents=6000, clicked_pairs=12_000, log_queries=5000, train_queries=250, dev_queries=150, test_queries=50,
        unlabelled_queries=1200, drift=drift,
    )  # fmt: skip


@dataclass
class Config:
    """Serve, log, watch and retrain round by round, and measure the loop against a frozen student.

    Args:
        out: folder of the run, seed by seed and round by round
        seeds: worlds; each is also the seed of its traffic
        rounds: rounds of serving; there is a retraining between any two
        days: days of a round
        pages: pages of a day, of both arms together
        users: people who search
        wishes: distinct things that they want, typed as their round types them
        tested: further wishes, which nobody types: NDCG@5 of each round is measured on them
        min_pairs: click pairs below which demo.retrain trains nothing
        teacher_tolerance: NDCG@5 on dev that a new teacher may lose, as demo.retrain's
        in_stock: documents of a page; which of a query's candidates are there changes from page to page
        teacher: clicks: a BERT that goes on learning from every round's shown documents (demo.retrain --teacher
            clicks); renew: a decoder, pre-trained on the clicks of every round and fine-tuned, some ten times as long
        student_config: settings of the first student
        next_student_config: settings of those that demo.retrain makes
        teacher_config: settings of the teacher that learns from clicks
        world: sizes of the world, and its drift
        report: folder for loop.md; none: print it only
        tables: report what is there and run nothing
        note: a line on the machine and the date for the page
    """

    out: Path = Path("runs/loop")
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    rounds: int = 5
    days: int = 5
    pages: int = 2400
    users: int = 1500
    wishes: int = 700
    tested: int = 400
    min_pairs: int = 200
    teacher_tolerance: float = 0.01
    in_stock: int = 16
    teacher: Literal["clicks", "renew"] = "clicks"
    student_config: str = "training/configs/student_small.yaml"
    next_student_config: str = "benchmarks/retraining/next_student.yaml"
    teacher_config: str = "benchmarks/retraining/clicks_teacher.yaml"
    world: WorldConfig = field(default_factory=loop_world)
    report: Path | None = None
    tables: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("rounds", "days", "pages", "users", "wishes", "tested", "in_stock"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        if self.in_stock > self.world.candidates:
            raise ValueError(f"in_stock is {self.in_stock}: a query has {self.world.candidates} candidates")


@dataclass
class Seed:
    """One world's folder: its first models, and its rounds."""

    config: Config
    seed: int

    def __post_init__(self) -> None:
        self.folder = self.config.out / f"seed-{self.seed}"
        self.data = self.folder / "data"
        self.log = self.folder / "ab" / "data"
        self.repository = self.folder / "served"

    def run(self) -> None:
        """The first models, then every round that is not finished."""
        self._first_models()
        world = make_world(self._world_config())
        wishes = Wishes.draw(world, self.config.wishes, self.config.tested)
        for number in range(1, self.config.rounds + 1):
            self._round(number, wishes)

    def _world_config(self) -> WorldConfig:
        return WorldConfig(**{**vars(self.config.world), "seed": self.seed})

    def _first_models(self) -> None:
        """Dataset, teacher, labels and student of the world before its drift."""
        base, data = self.folder / "base", self.data
        stages = Stages(base, total=6)
        stages.run("data", "the world before any drift", lambda: write_world(self._world_config(), data)["counts"])
        seed = ["--seed", str(self.seed)]
        if self.config.teacher == "renew":
            for name, program, config, model in (
                ("pretrained", "pretrain_teacher", "pretrain_small", None),
                ("start", "finetune_teacher", "likelihood_small", "pretrained"),
                ("teacher", "finetune_teacher", "finetune_small", "start"),
            ):
                start = ["--model", str(base / model)] if model else []
                stages.program(
                    name, f"the first {name}", "-m", f"training.{program}", "--config",
                    f"training/configs/{config}.yaml", "--data", data, "--out", base / name, *start, *seed,
                    made=base / name,
                )  # fmt: skip
        else:
            stages.program(
                "clicks", "what the first log showed", "-m", "training.prepare_clicks", "--events",
                data / "events.parquet", "--out", base / "clicks.parquet", "--shown-documents",
                data / "shown_documents.parquet", "--privacy.min-users", "1", "--privacy.personal-data", "keep",
            )  # fmt: skip
            stages.program(
                "teacher", "the first teacher, on clicks", "-m", "training.train_baseline", "--config",
                self.config.teacher_config, "--learn-from", "clicks", "--data", data, "--out", base / "teacher", *seed,
                made=base / "teacher",
            )  # fmt: skip
        stages.run("label", "labels", lambda: label(data, base / "teacher", base), made=base / "labels")
        stages.program(
            "student", "the student that is frozen", "-m", "training.distill_student", "--config",
            self.config.student_config, "--data", data, "--labels", base / "labels", "--out", base / "student", *seed,
            made=base / "student",
        )  # fmt: skip

    def _round(self, number: int, wishes: Wishes) -> None:
        """Serve a round's days, watch them, measure both students on its taste, and retrain for the next round."""
        folder = self.folder / f"round-{number}"
        stages = Stages(folder, total=3)
        serving = self.models(number)
        stages.run("serve", f"round {number}: {self.config.days} days", lambda: self._serve(number, wishes))
        found = stages.run(
            "watch", "the watch, day by day", lambda: {"days": [self._watch(day) for day in self._days(number)]}
        )
        measured = stages.run("test", "NDCG@5 of both", lambda: ndcg_of(wishes, number, serving))
        LOGGER.info("seed %d round %d: %s; %s", self.seed, number, measured["ndcg@5"], found)
        if number < self.config.rounds:
            self._retrain(number)

    def models(self, number: int) -> dict[str, Path]:
        """The checkpoints that serve a round: frozen, and the last one that a retraining finished."""
        return {FROZEN: self.folder / "base" / "student", LOOP: self._latest(number, "student")}

    def _last_retrained(self, before: int) -> int:
        """The last round before this one whose retraining ended with a student; 0 if there is none."""
        made = [n for n in range(1, before) if (self._retrained(n) / "student" / CARD_NAME).is_file()]
        return max(made, default=0)

    def _retrained(self, number: int) -> Path:
        return self.folder / f"round-{number}" / "retrain"

    def _latest(self, before: int, name: str) -> Path:
        """The folder `name` of the last retraining before a round that ended with a student, else the first one."""
        if last := self._last_retrained(before):
            return self._retrained(last) / name
        return self.data if name == "data" else self.folder / "base" / name

    def _days(self, number: int) -> list[date]:
        first = (number - 1) * self.config.days
        return [FIRST_DAY + timedelta(days=first + day) for day in range(self.config.days)]

    def _serve(self, number: int, wishes: Wishes) -> dict[str, Any]:
        """A round's traffic into the raw log, and the raw log into Parquet by day."""
        before, after = (wishes.of_round(n, wishes.typed) for n in (number - 1, number))
        searches = {(one.text, one.rows): one for one in (*before, *after) if one is not None}
        pairs = pairs_table(wishes.world, list(searches.values()))
        scores = CheckpointScores()
        for model, checkpoint in self.models(number).items():
            version = "1" if model == FROZEN else str(number)
            scores.add(model, version, checkpoint, pairs)
            trained = self._latest(number, "data") if model == LOOP else self.data
            keep_version(checkpoint, trained, self.repository / model / version)
        folder = self.folder / f"round-{number}"
        experiment, raw = folder / "experiment.yaml", folder / "raw"
        write_text(experiment, experiment_text())
        shutil.rmtree(raw, ignore_errors=True)
        counts = {"pages": 0, "clicks": 0}
        for place, day in enumerate(self._days(number)):
            turned = (place + 1) / self.config.days  # the taste turns within the round's days
            rng = np.random.default_rng([self.seed, number, place])
            pages = plan_day(
                day,
                before,
                after,
                turned,
                wishes.share,
                self.config.pages,
                self.config.users,
                self.config.in_stock,
                rng,
            )
            served = asyncio.run(serve(pages, wishes.world.documents, scores, experiment, raw))
            counts = {name: counts[name] + served[name] for name in counts}
        run_program("clients/ab_compact.py", "--log", raw, "--out", self.log)
        return counts

    def _watch(self, day: date) -> dict[str, Any]:
        """Alerts of a day, and page CTR of both arms against the days before the drift."""
        quiet_rounds = self.config.world.drift.first_round - 1
        quiet = [one for number in range(1, quiet_rounds + 1) for one in self._days(number) if one < day]
        figures = {model: ctr_of(self.log, model, day, quiet) for model in (FROZEN, LOOP)} if quiet else {}
        return {"day": str(day), "alerts": alerts_of(self.log, self.repository, day), "ctr": figures}

    def _retrain(self, number: int) -> None:
        """demo.retrain from the log to the new student. A gate that refuses leaves the serving one where it is."""
        out = self._retrained(number)
        unlearnt = self._last_retrained(number) + 1  # rounds that were refused are learnt from with the next one
        config = retrain.Config(
            log=self.log,
            data=self._latest(number, "data"),
            student=self.models(number)[LOOP],
            repository=self.repository,
            out=out,
            since=str(self._days(unlearnt)[0]),
            until=str(self._days(number)[-1]),
            teacher=self.config.teacher,
            pretrained=self._latest(number, "pretrained"),
            last_teacher=self._latest(number, "teacher"),
            student_config=self.config.next_student_config,
            teacher_config=self.config.teacher_config,
            min_pairs=self.config.min_pairs,
            teacher_tolerance=self.config.teacher_tolerance,
        )
        stages = Stages(out, total=5 + retrain.TEACHER_STAGES[config.teacher])
        try:
            retrain.learn(stages, config, lambda: label(out / "data", out / "teacher", out))
        except InputError as problem:
            if not str(problem).startswith("stopped: "):
                raise
            write_json(out / REFUSED, {"stopped": str(problem)})
            LOGGER.warning("seed %d round %d: %s", self.seed, number, problem)

    def found(self) -> list[dict[str, Any]]:
        """What the finished rounds say: days with alerts and CTR, NDCG@5 by query, and why a retraining stopped."""
        rounds = []
        for number in range(1, self.config.rounds + 1):
            folder = self.folder / f"round-{number}"
            known = read_json(folder / "stages.json") if (folder / "stages.json").is_file() else {}
            if known.get("test", {}).get("seconds") is None:
                break
            refused = folder / "retrain" / REFUSED
            report = folder / "retrain" / "data" / "clicks.report.json"
            rounds.append(
                {
                    "seed": self.seed,
                    "round": number,
                    "days": known["watch"]["found"]["days"],
                    "test": known["test"]["found"],
                    "refused": read_json(refused)["stopped"] if refused.is_file() else "",
                    "clicks": read_json(report) if report.is_file() else None,
                }
            )
        return rounds


def ndcg_of(wishes: Wishes, number: int, models: dict[str, Path]) -> dict[str, Any]:
    """NDCG@5 of each query of the round's taste that nobody typed: {"kinds", model -> per query, "ndcg@5": means}."""
    typed = {search.text for search in wishes.of_round(number, wishes.typed) if search is not None}
    of_round = wishes.of_round(number, wishes.tested)
    wanted = [search for search in of_round if search is not None and search.text not in typed]
    values: dict[str, Any] = {"kinds": [search.kind for search in wanted]}
    table = pairs_table(wishes.world, wanted)
    columns = [table.column(name).to_pylist() for name in ("query", "title", "summary")]
    groups = np.repeat(np.arange(len(wanted)), [len(search.rows) for search in wanted])
    for model, checkpoint in models.items():
        scores = Scorer.load(checkpoint).score(*columns)
        values[model] = JudgedRanking(scores, table.column("grade").to_numpy(), groups).ndcg(5).tolist()
    return values | {"ndcg@5": {model: float(np.mean(values[model])) for model in models}}


def label(data: Path, teacher: Path, out: Path) -> None:
    """The teacher's scores of a dataset's candidates as the labels folder out/labels. No server: scored in process."""
    rows = read_table(data / "candidates.parquet", "candidates")
    columns = [rows.column(name).to_pylist() for name in ("query", "title", "summary")]
    scores = pa.array(Scorer.load(teacher).score(*columns), pa.float32())
    file = out / "scores.parquet"
    pq.write_table(rows.select(["query_id", "doc_id"]).append_column("score", scores), file)
    run_program(
        "clients/import_labels.py",
        "--candidates",
        data / "candidates.parquet",
        "--scores",
        file,
        "--out",
        out / "labels",
    )


def experiment_text() -> str:
    """Both arms on half of the users each."""
    arms = [{"name": model, "model": model, "weight": 0.5} for model in (FROZEN, LOOP)]
    one = {"name": "loop", "seed": "loop-1", "coverage": 1.0, "arms": arms, "control": FROZEN}
    return yaml.safe_dump({"default_model": FROZEN, "experiments": [one]}, sort_keys=False)


def main(config: Config) -> None:
    """Run the seeds, one after the other, and print the page of what is there."""
    seeds = [Seed(config, seed) for seed in config.seeds]
    for seed in [] if config.tables else seeds:
        seed.run()
    found = [one for seed in seeds for one in seed.found()]
    if not found:
        raise InputError(f"{config.out}: no finished round to report")
    command = f"python -m benchmarks.loop --seeds {' '.join(map(str, config.seeds))} --report docs/results"
    print(write_report(found, config.rounds, config.world.drift, config.report, config.note, command))


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.loop --seeds 1 --out runs/loop")
