"""Shared by the students' benchmarks: a table's texts, a checkpoint's scores, rankings, finished rows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ranking.card import CARD_NAME
from ranking.metrics import JudgedRanking
from ranking.program import parse
from ranking.significance import paired_bootstrap, randomisation_test, seeds_bootstrap
from training.evaluation.checkpoint_scores import Precision, Scorer
from training.trainer.training_settings import RUN_FOLDER

LOGGER = logging.getLogger(__name__)
CONFIGS = Path(__file__).parents[2] / "training" / "configs"


def train_as_shipped(program: ModuleType, settings: str, out: Path, **flags: object) -> Path:
    """Train with a shipped settings file into `out`, unless that is finished; an interrupted training goes on.

    program: a training of training/, such as training.train_baseline; settings: name of the file in training/configs;
    flags: win over the file. Returns `out`.
    """
    if not (out / CARD_NAME).is_file():
        words = ["--config", str(CONFIGS / settings), "--out", str(out)]
        words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        words += ["--resume", "true"] if started(out) else []
        LOGGER.info("%s: %s", out.name, " ".join(words))
        program.main(parse(program.Config, words))
    return out


def started(out: Path) -> bool:
    """Whether an interrupted training with a saved state lies in an output folder, so that it can be resumed."""
    return any((out / RUN_FOLDER).glob("checkpoint-*/trainer_state.json"))


def text_columns(rows: pa.Table) -> tuple[list[str], list[str], list[str]]:
    """(queries, titles, summaries) of a judgments or candidates table."""
    query, title, summary = (rows.column(name).to_pylist() for name in ("query", "title", "summary"))
    return query, title, summary


def checkpoint_scores(checkpoint: Path, rows: pa.Table, precision: Precision = "float32") -> NDArray[np.float32]:
    """float32 [rows]: a checkpoint's raw scores of a judgments or candidates table."""
    return Scorer.load(checkpoint).score(*text_columns(rows), precision=precision, progress=checkpoint.name)


def query_numbers(rows: pa.Table) -> NDArray[np.int64]:
    """int [rows]: the number of each row's query."""
    return np.unique(rows.column("query_id").to_numpy(zero_copy_only=False), return_inverse=True)[1]


def judged_ranking(rows: pa.Table, scores: NDArray[np.float32]) -> JudgedRanking:
    """A judgments table ranked by scores, float [rows]."""
    return JudgedRanking(scores, rows.column("grade").to_numpy(), query_numbers(rows))


def paired_gain(differences: NDArray[np.float64]) -> tuple[str, str]:
    """Mean gain with its 95% interval, and its p, as a table shows them. differences: float [seeds, queries].

    The interval draws seeds and queries anew where there are several seeds, else queries alone; the p is of a
    randomisation test of each query's mean over seeds.
    """
    mean, zero = differences.mean(axis=0), np.zeros(differences.shape[1])
    gap = seeds_bootstrap(differences) if len(differences) > 1 else paired_bootstrap(mean, zero)
    return f"{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]", f"{randomisation_test(mean, zero):.4f}"


def finished_rows(out: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl in a benchmark's output folder; none if it is not there yet."""
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def append_row(out: Path, row: dict[str, Any]) -> None:
    """Add the line that says that a row of the benchmark is finished."""
    with (out / "results.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
