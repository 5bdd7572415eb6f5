"""Distilling speed beside sentence-transformers' CrossEncoderTrainer with MarginMSELoss: same data, model and time.

python -m benchmarks.students.training_speed --data data/world --seconds 120

Three ways to train the same start on the same groups of documents with teacher scores:
  ours        each document of a group encoded once a step, margin MSE over all pairs of the group, length-bucketed
  st-triplets MarginMSELoss on (query, document, document) rows: two encodings a pair, its usual form
  st-lists    MarginMSELoss on (query, first, others...) rows: one encoding a document, pairs with the first only
Pairs/s counts the score margins that enter the loss. The clock is CPU seconds by default, because another program on
the machine then changes little; what runs on other devices needs --clock wall.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from transformers import BertForSequenceClassification, TrainerCallback

from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.metrics import ndcg
from ranking.program import run
from ranking.schema import read_table
from training.student.encoder import StudentModel, StudentModelSettings, create_student
from training.student.student_groups import groups_of, judged_groups, sampler
from training.trainer.group_batches import RankingGroups
from training.trainer.losses import margin_mse
from training.trainer.ranking_trainer import RankingTrainer
from training.trainer.training_settings import TrainingSettings

LOGGER = logging.getLogger(__name__)

SHORT = FieldLimits(max_query_tokens=16, max_title_tokens=24, max_summary_tokens=48)
WAYS = ("ours", "st-triplets", "st-lists")


@dataclass(kw_only=True)
class Config(StudentModelSettings):
    """Train the same student three ways for the same time and compare.

    Args:
        data: dataset folder; the grades of its train judgments stand for teacher scores, dev gives NDCG@5
        seconds: training time of each way, after two steps that do not count
        clock: cpu (seconds of this process, all threads) or wall
        documents: documents of a group
        batch_groups: groups per step; st-triplets gets as many documents per step
        learning_rate: for all ways
        precision: bf16 or fp32, for all ways
        threads: CPU threads
        ways: what to run
    """

    data: Path
    seconds: float = 120
    clock: Literal["cpu", "wall"] = "cpu"
    size: str = "mini-3"
    limits: FieldLimits = SHORT
    documents: int = 8
    batch_groups: int = 8
    learning_rate: float = 2e-4
    precision: Literal["bf16", "fp32"] = "bf16"
    threads: int = 1
    ways: tuple[str, ...] = WAYS


@dataclass
class Tally:
    """Steps, encoded documents and margins in the loss over `seconds` of the clock, and dev NDCG@5 afterwards."""

    steps: int
    documents: int
    pairs: int
    seconds: float
    ndcg: float = float("nan")


class Stopwatch(TrainerCallback):
    """Starts after two steps and stops training when the time is up."""

    def __init__(self, config: Config):
        self.clock = time.process_time if config.clock == "cpu" else time.perf_counter
        self.limit, self.steps, self.seconds = config.seconds, 0, 0.0

    def on_step_end(self, args, state, control, **_):
        """Count the step, and stop the trainer once the time is up."""
        if state.global_step == 2:
            self.start = self.clock()
        elif state.global_step > 2:
            self.steps += 1
            self.seconds = self.clock() - self.start
            control.should_training_stop |= self.seconds >= self.limit


def main(config: Config) -> None:
    """Train the start each way, measure it on dev, print the table."""
    torch.set_num_threads(config.threads)
    rows = read_table(config.data / "judgments" / "train.parquet", "judgments")
    spread = float(rows.column("grade").to_numpy().std())
    if not spread:
        raise InputError(f"{config.data}: all train grades are equal, so there is no margin to learn")
    rows = rows.append_column("teacher_score", pa.array(rows.column("grade").to_numpy() / spread, pa.float32()))
    found: dict[str, Tally] = {}
    for way in config.ways:
        with tempfile.TemporaryDirectory() as folder:
            student = create_student(config, config.data, folder, seed=1)
            train = train_ours if way == "ours" else partial(train_theirs, lists=way == "st-lists")
            found[way] = train(config, student, rows, Path(folder))
            found[way].ndcg = dev_ndcg(config, student, Path(folder))
            LOGGER.info("%s: %s", way, found[way])
    print(table(found))


def train_ours(config: Config, student: StudentModel, rows: pa.Table, out: Path) -> Tally:
    """Train group-wise, each document encoded once a step, until the time is up."""
    trainer = make_trainer(config, student, out, groups_of([rows], "teacher_score", student.text_format))
    watch = Stopwatch(config)
    trainer.add_callback(watch)
    trainer.start()
    documents = watch.steps * config.batch_groups * config.documents
    return Tally(watch.steps, documents, documents * (config.documents - 1) // 2, watch.seconds)


def make_trainer(config: Config, student: StudentModel, out: Path, groups: RankingGroups) -> RankingTrainer:
    """Our trainer without a dev set: it trains until it is stopped, and scores."""
    settings = TrainingSettings(
        epochs=10_000, learning_rate=config.learning_rate, warmup=20, schedule="constant_with_warmup",
        batch_groups=config.batch_groups, precision=config.precision, eval_steps=10**9, log_steps=10**9,
    )  # fmt: skip
    return RankingTrainer(
        student.model, settings, groups, None, loss=margin_mse, pad_id=student.text_format.pad_id, out=out / "run",
        token_types=True, sample_group=sampler("uniform", config.documents),
    )  # fmt: skip


def dev_ndcg(config: Config, student: StudentModel, out: Path) -> float:
    """All ways are measured alike: our text, our batches."""
    dev = judged_groups(config.data / "judgments" / "dev.parquet", student.text_format)
    shutil.rmtree(out / "run", ignore_errors=True)
    scores = make_trainer(config, student, out, dev).score(dev)
    return ndcg(scores, dev.targets.astype(np.int64), dev.group_of_document(), 5)


def train_theirs(config: Config, student: StudentModel, rows: pa.Table, out: Path, lists: bool) -> Tally:
    """Train with sentence-transformers until the time is up; lists: one encoding a document, else triplets."""
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import MarginMSELoss

    student.model.save_pretrained(out / "start")
    for file in student.tokenizer_folder.iterdir():
        shutil.copyfile(file, out / "start" / file.name)
    encoder = CrossEncoder(str(out / "start"), num_labels=1, max_length=student.text_format.max_tokens(), device="cpu")
    count = 1 if lists else config.documents // 2  # triplets: as many encoded documents a step
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(out / "st"), max_steps=10**6, per_device_train_batch_size=config.batch_groups * count,
        learning_rate=config.learning_rate, warmup_steps=20, lr_scheduler_type="constant_with_warmup",
        bf16=config.precision == "bf16", optim="adamw_torch_fused", weight_decay=0.01, seed=1,
        save_strategy="no", logging_strategy="no", report_to="none", dataloader_pin_memory=False, use_cpu=True,
    )  # fmt: skip
    make = list_rows if lists else triplet_rows
    trainer = CrossEncoderTrainer(
        model=encoder, args=arguments, train_dataset=Dataset.from_list(list(make(rows, config.documents))),
        loss=MarginMSELoss(encoder),
    )  # fmt: skip
    watch = Stopwatch(config)
    trainer.add_callback(watch)
    trainer.train()
    inner: Any = next(module for module in encoder.modules() if isinstance(module, BertForSequenceClassification))
    student.model.load_state_dict(inner.state_dict())
    documents = watch.steps * config.batch_groups * config.documents
    return Tally(
        watch.steps,
        documents,
        watch.steps * config.batch_groups * count * (config.documents - 1 if lists else 1),
        watch.seconds,
    )


def triplet_rows(rows: pa.Table, documents: int) -> Iterator[dict]:
    """(query, document, document, margin) for all pairs of each query's documents with different scores."""
    for group in _groups(rows):
        for one, other in combinations(group, 2):
            margin = one["teacher_score"] - other["teacher_score"]
            if margin:
                yield {"query": one["query"], "first": _text(one), "second": _text(other), "label": margin}


def list_rows(rows: pa.Table, documents: int) -> Iterator[dict]:
    """(query, first, others..., margins to the first), the best document of a query first, in rows of `documents`."""
    for group in _groups(rows):
        best = max(group, key=lambda row: row["teacher_score"])
        others = [row for row in group if row is not best]
        for start in range(0, len(others) - documents + 2, documents - 1):
            chosen = others[start : start + documents - 1]
            margins = [best["teacher_score"] - row["teacher_score"] for row in chosen]
            yield (
                {"query": best["query"], "first": _text(best)}
                | {f"other{i}": _text(row) for i, row in enumerate(chosen)}
                | {"label": margins}
            )


def _groups(rows: pa.Table) -> list[list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in rows.to_pylist():
        groups.setdefault(row["query_id"], []).append(row)
    return list(groups.values())


def _text(row: dict) -> str:
    return f"{row['title']} {row['summary']}"


def table(found: dict[str, Tally]) -> str:
    """Markdown; ratios are ours over each."""
    lines = ["| way | steps | documents/s | pairs/s | ours / this, pairs/s | dev NDCG@5 |", "|---|---|---|---|---|---|"]
    ours = found.get("ours")
    for way, tally in found.items():
        documents, pairs = tally.documents / tally.seconds, tally.pairs / tally.seconds
        ratio = f"{ours.pairs / ours.seconds / pairs:.1f}" if ours else ""
        lines.append(f"| {way} | {tally.steps} | {documents:.0f} | {pairs:.0f} | {ratio} | {tally.ndcg:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.students.training_speed --data data/world --seconds 120")
