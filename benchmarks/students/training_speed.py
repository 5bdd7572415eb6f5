"""Distilling beside sentence-transformers' CrossEncoderTrainer: same labels, start, schedule and processor time.

python -m benchmarks.students.training_speed --data data/msrd --labels runs/labels --seconds 300 --seeds 1 2 3

Ways to train one start on one set of labels, the trained model measured on the test judgments:
  ours         each document of a group encoded once a step, the hybrid loss over all pairs of the group, forwards of
               like lengths
  st-point     MSELoss on (query, document) rows: point-wise on the raw logit
  st-triplets  MarginMSELoss on (query, document, document) rows: two encodings a pair, its usual form
  st-lists     MarginMSELoss on (query, first, others...) rows: one encoding a document, pairs with the first only
All have the same documents a step and the same learning rate, which warms up over 20 steps and falls to 0 as the time
runs out. Time is that of the process by default, all threads, because another program on the machine then changes
little; what runs on other devices needs --clock wall. Tokenising counts: ours is done before the first step, theirs in
each. Two steps before the clock starts do not count. A (way, seed) that is finished is not run again.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BertForSequenceClassification, ProgressCallback, TrainerCallback

from benchmarks.students.runs import append_row, finished_rows, paired_gain
from ranking.errors import InputError
from ranking.labels import iter_labelled
from ranking.limits import FieldLimits
from ranking.metrics import JudgedRanking
from ranking.program import run
from ranking.schema import read_table
from training.student.encoder import StudentModel, StudentModelSettings, create_student
from training.student.student_groups import groups_of, judged_groups, sampler
from training.trainer.group_batches import RankingGroups
from training.trainer.losses import hybrid
from training.trainer.ranking_trainer import RankingTrainer
from training.trainer.training_settings import TrainingSettings

LOGGER = logging.getLogger(__name__)

Way = Literal["ours", "st-point", "st-triplets", "st-lists"]
UNCOUNTED_STEPS, WARM_UP_STEPS = 2, 20


@dataclass(kw_only=True)
class Config(StudentModelSettings):
    """Train the same student in several ways for the same time and compare.

    Args:
        data: dataset folder with test judgments
        labels: labels folder of its candidates; left out, the grades of its train judgments stand for teacher scores
        out: folder for test scores and finished rows
        seeds: of the trainings: order of the documents, and the score head's weights
        seconds: training time of each
        clock: cpu (seconds of this process, all threads) or wall
        documents: documents of a group
        batch_groups: groups per step; the other ways get as many documents per step
        learning_rate: highest, of all ways
        alpha: of the hybrid loss of ours, see training/configs
        precision: bf16 or fp32, for all ways
        threads: CPU threads
        ways: what to run
    """

    data: Path
    labels: Path | None = None
    out: Path = Path("runs/training_speed")
    seeds: list[int] = field(default_factory=lambda: [1])
    seconds: float = 300
    clock: Literal["cpu", "wall"] = "cpu"
    init: str | None = "minilm"
    limits: FieldLimits = field(default_factory=lambda: FieldLimits(16, 24, 64))
    documents: int = 8
    batch_groups: int = 8
    learning_rate: float = 1e-4
    alpha: float = 0.2
    precision: Literal["bf16", "fp32"] = "bf16"
    threads: int = 1
    ways: list[Way] = field(default_factory=lambda: list(get_args(Way)))

    def __post_init__(self):
        super().__post_init__()
        if not self.seeds or not self.ways:
            raise ValueError("seeds, ways: at least one of each is needed")


@dataclass
class Tally:
    """Steps, encoded documents and pairs in the loss of a training, and how long it took by the clock."""

    steps: int
    documents: int
    pairs: int
    seconds: float


class Stopwatch(TrainerCallback):
    """Starts after two steps, sets the learning rate by the time that is left, and stops training when it is up.

    before: seconds of work that was done ahead of training and counts.
    """

    def __init__(self, config: Config, before: float = 0.0):
        self.clock = _clock(config)
        self.limit, self.learning_rate, self.before = config.seconds, config.learning_rate, before
        self.steps, self.seconds = 0, before

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        """Both trainers have a constant schedule, which this one overrides."""
        share = min(1.0, (state.global_step + 1) / WARM_UP_STEPS) * max(0.0, 1 - self.seconds / self.limit)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate * share

    def on_step_end(self, args, state, control, **_):
        """Count the step, and stop the trainer once the time is up."""
        if state.global_step == UNCOUNTED_STEPS:
            self.start = self.clock()
        elif state.global_step > UNCOUNTED_STEPS:
            self.steps += 1
            self.seconds = self.before + self.clock() - self.start
            control.should_training_stop |= self.seconds >= self.limit


def main(config: Config) -> None:
    """Train what is not finished, then print the table."""
    torch.set_num_threads(config.threads)
    rows = labelled_rows(config)
    config.out.mkdir(parents=True, exist_ok=True)
    finished = {(row["way"], row["seed"]): row for row in finished_rows(config.out)}
    if any(row["settings"] != shared_settings(config) for row in finished.values()):
        raise InputError(f"{config.out}: trainings of other settings lie here; give another --out")
    for seed in config.seeds:
        for way in config.ways:
            if (way, seed) not in finished:
                finished[way, seed] = train_and_measure(config, way, seed, rows)
    print(table(config, finished))


def shared_settings(config: Config) -> dict[str, str]:
    """What all trainings of one table have in common."""
    return {name: str(value) for name, value in vars(config).items() if name not in ("out", "seeds", "ways")}


def labelled_rows(config: Config) -> pa.Table:
    """What is learnt from: query_id, query, title, summary and teacher_score with mean 0 and spread 1."""
    if config.labels is None:
        rows = read_table(config.data / "judgments" / "train.parquet", "judgments")
        scores = rows.column("grade").to_numpy()
    else:
        rows = pa.concat_tables(iter_labelled(config.data / "candidates.parquet", config.labels))
        scores = rows.column("teacher_score").to_numpy()
    if not len(scores) or not scores.std():
        raise InputError(f"{config.labels or config.data}: no two labels differ, so there is nothing to learn")
    standardised = pa.array((scores - scores.mean()) / scores.std(), pa.float32())
    return rows.select(["query_id", "query", "title", "summary"]).append_column("teacher_score", standardised)


def train_and_measure(config: Config, way: Way, seed: int, rows: pa.Table) -> dict[str, Any]:
    """One training; keeps its test scores and its line of results."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        student = create_student(config, config.data, out, seed=seed)
        if way == "ours":
            tally = train_ours(config, student, rows, out, seed)
        else:
            tally = train_theirs(config, way, student, rows, out, seed)
        test = judged_groups(config.data / "judgments" / "test.parquet", student.text_format)
        # all ways are measured alike: our text, our batches
        scores = make_trainer(config, student, out / "measured", test, seed).score(test)
    np.savez(_scores_file(config, way, seed), scores=scores, grades=test.targets, queries=test.group_of_document())
    row = {"way": way, "seed": seed, **vars(tally), "settings": shared_settings(config)}
    LOGGER.info(
        "%s", vars(tally) | {"way": way, "seed": seed, "ndcg@5": float(ranked(config, way, seed).ndcg(5).mean())}
    )
    append_row(config.out, row)
    return row


def train_ours(config: Config, student: StudentModel, rows: pa.Table, out: Path, seed: int) -> Tally:
    """Train group-wise, each document encoded once a step, until the time is up."""
    clock = _clock(config)
    began = clock()
    groups = groups_of([rows], "teacher_score", student.text_format)
    watch = Stopwatch(config, before=clock() - began)
    trainer = make_trainer(config, student, out, groups, seed)
    # documents of each group, step by step: queries may have few, epochs a short last step
    sizes: list[NDArray[np.int64]] = []
    loss = trainer.loss

    def counted(scores: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        sizes.append(groups.unique(return_counts=True)[1].numpy())
        return loss(scores, targets, groups)

    trainer.loss = counted
    trainer.add_callback(watch)
    trainer.start()
    of_steps = np.concatenate(sizes[UNCOUNTED_STEPS:])
    return Tally(watch.steps, int(of_steps.sum()), int((of_steps * (of_steps - 1) // 2).sum()), watch.seconds)


def make_trainer(config: Config, student: StudentModel, out: Path, groups: RankingGroups, seed: int) -> RankingTrainer:
    """Our trainer without a dev set: it trains until it is stopped, and scores."""
    settings = TrainingSettings(
        epochs=10_000, learning_rate=config.learning_rate, warmup=0, schedule="constant_with_warmup", seed=seed,
        batch_groups=config.batch_groups, forward_tokens=4096, precision=config.precision, eval_steps=10**9,
        log_steps=10**9,
    )  # fmt: skip
    return RankingTrainer(
        student.model, settings, groups, None, loss=partial(hybrid, alpha=config.alpha, beta=1.0),
        pad_id=student.text_format.pad_id, out=out / "run", token_types=True,
        sample_group=sampler("stratified", config.documents),
    )  # fmt: skip


def train_theirs(config: Config, way: Way, student: StudentModel, rows: pa.Table, out: Path, seed: int) -> Tally:
    """Train with sentence-transformers until the time is up."""
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import MarginMSELoss, MSELoss

    make, loss, documents, pairs = _their_form(config, way, MSELoss, MarginMSELoss)
    student.model.save_pretrained(out / "start")
    for file in student.tokenizer_folder.iterdir():
        shutil.copyfile(file, out / "start" / file.name)
    encoder = CrossEncoder(str(out / "start"), num_labels=1, max_length=student.text_format.max_tokens(), device="cpu")
    batch = config.batch_groups * config.documents // documents
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(out / "st"), max_steps=10**6, per_device_train_batch_size=batch, seed=seed,
        learning_rate=config.learning_rate, lr_scheduler_type="constant", weight_decay=0.01,
        bf16=config.precision == "bf16", optim="adamw_torch_fused", save_strategy="no", logging_strategy="no",
        report_to="none", dataloader_pin_memory=False, dataloader_drop_last=True, use_cpu=True,
    )  # fmt: skip
    trainer = CrossEncoderTrainer(
        model=encoder, args=arguments, train_dataset=Dataset.from_list(list(make(rows))), loss=loss(encoder)
    )
    trainer.remove_callback(ProgressCallback)  # it prints its figures to stdout, between ours
    watch = Stopwatch(config)
    trainer.add_callback(watch)
    trainer.train()
    inner: Any = next(module for module in encoder.modules() if isinstance(module, BertForSequenceClassification))
    student.model.load_state_dict(inner.state_dict())
    return Tally(watch.steps, watch.steps * batch * documents, watch.steps * batch * pairs, watch.seconds)


def _their_form(
    config: Config, way: Way, point: Any, margin: Any
) -> tuple[Callable[[pa.Table], Iterator[dict]], Any, int, int]:
    """How rows are made, the loss, and the documents and pairs of a row."""
    if way == "st-point":
        return point_rows, point, 1, 0
    if way == "st-triplets":
        return triplet_rows, margin, 2, 1
    return partial(list_rows, documents=config.documents), margin, config.documents, config.documents - 1


def point_rows(rows: pa.Table) -> Iterator[dict]:
    """(query, document, teacher score) of each row."""
    for row in rows.to_pylist():
        yield {"query": row["query"], "document": _text(row), "label": row["teacher_score"]}


def triplet_rows(rows: pa.Table) -> Iterator[dict]:
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


def _clock(config: Config) -> Callable[[], float]:
    return time.process_time if config.clock == "cpu" else time.perf_counter


def _scores_file(config: Config, way: Way, seed: int) -> Path:
    return config.out / f"{way}-{seed}.npz"


def ranked(config: Config, way: Way, seed: int) -> JudgedRanking:
    """The judged test documents in the order of a finished training's scores."""
    with np.load(_scores_file(config, way, seed)) as kept:
        return JudgedRanking(kept["scores"], kept["grades"].astype(np.int64), kept["queries"])


def table(config: Config, finished: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Markdown: speeds are of all seeds together; the last column is ours less that way, paired by query and seed."""
    lines = [
        "| way | steps | documents/s | pairs/s | ours / this | NDCG@5 | PNR | ours less this, NDCG@5 | p |",
        "|---|--:|--:|--:|--:|--:|--:|---|--:|",
    ]
    runs = {way: [finished[way, seed] for seed in config.seeds] for way in config.ways}
    by_seed = {way: [ranked(config, way, seed) for seed in config.seeds] for way in config.ways}
    quality = {way: np.stack([one.ndcg(5) for one in rankings]) for way, rankings in by_seed.items()}

    def rate(way: Way, what: str) -> float:
        return sum(one[what] for one in runs[way]) / sum(one["seconds"] for one in runs[way])

    for way in config.ways:
        ratio = f"{rate('ours', 'documents') / rate(way, 'documents'):.2f}" if "ours" in runs else ""
        gap, p = paired_gain(quality["ours"] - quality[way]) if "ours" in quality and way != "ours" else ("", "")
        cells = [
            way, str(round(np.mean([one["steps"] for one in runs[way]]))), f"{rate(way, 'documents'):.0f}",
            f"{rate(way, 'pairs'):.0f}", ratio, f"{quality[way].mean():.4f}",
            f"{np.mean([one.pairs().pnr for one in by_seed[way]]):.2f}", gap, p,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.students.training_speed --data data/msrd --labels runs/labels")
