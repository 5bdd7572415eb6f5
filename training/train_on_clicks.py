"""Trains a BERT ranker on clicks, corrected for position bias: for teams that have a log and few judgments, or none to train on.

The result is a checkpoint to start from: `train_baseline --init` goes on with judgments, `distill_student --init` with
labels, and `blend_labels --ranker checkpoint:` makes it a part of the teacher.

A document's target is its number of satisfied clicks over its expected examinations, the sum of the propensities of the
positions it was shown at (clicks over expected clicks, Zhang and Jones, WWW 2007; the position-based model of Joachims,
Swaminathan and Schnabel, WSDM 2017). The loss is RankNet on the documents of a query, each pair weighted by the
difference of its targets.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ranking.card import ScoreCard, fingerprint
from ranking.errors import InputError
from ranking.program import run
from ranking.schema import read_table
from training.student.checkpoint import ScoreScale
from training.student.student_groups import groups_of, judged_groups, sampler, with_different_targets
from training.student.student_training import StudentTrainingSettings, start_student, train_student
from training.trainer import losses

LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Config(StudentTrainingSettings):
    """Train a ranker on the impressions of a click log.

    Args:
        impressions: impressions file, as prepare_clicks --impressions wrote it; without it the dataset's impressions.parquet
        smoothing: examinations of an average document that every document is given beside its own; more trusts rarely
            shown documents less
        group_documents: documents of a query per step, over the whole range of targets; 0 takes all
    """

    impressions: Path | None = None
    smoothing: float = 1.0
    group_documents: int = 8

    def __post_init__(self):
        super().__post_init__()
        if not self.smoothing > 0:
            raise ValueError(f"smoothing is {self.smoothing}: a positive number is needed")
        if self.group_documents < 0:
            raise ValueError(f"group_documents is {self.group_documents}: must not be negative")


def train_on_clicks(config: Config) -> ScoreCard:
    """Train, write the checkpoint to config.out, and return its card."""
    path = config.impressions or config.data / "impressions.parquet"
    rows = read_table(path, "impressions")
    rates = click_rates(rows, config.smoothing)
    student = start_student(config)
    targets = rows.append_column("query_id", rows.column("query")).append_column("click_rate", pa.array(rates))
    train = with_different_targets(groups_of([targets], "click_rate", student.text_format))
    LOGGER.info("%s: %d documents shown for %d queries with a click", path, len(train.targets), len(train))
    dev_path = config.data / "judgments" / "dev.parquet"
    return train_student(
        config,
        student,
        train,
        judged_groups(dev_path, student.text_format),
        word_groups=train,
        loss=losses.click_ranknet,
        sample_group=sampler("stratified", config.group_documents),
        role="baseline",
        scale=ScoreScale(),
        judged_queries=0,
        trained_on={"impressions": fingerprint(path), "dev": fingerprint(dev_path)},
    )


def click_rates(impressions: pa.Table, smoothing: float = 1.0) -> NDArray[np.float32]:
    """Clicks over expected examinations of each row, float32 [rows], pulled to the log's mean rate by `smoothing`.

    A document that nobody can have seen has the mean rate: it stands below what was clicked and above what was seen and
    skipped. InputError if nothing was clicked.
    """
    clicks, examinations = (
        impressions.column(name).to_numpy().astype(np.float64) for name in ("clicks", "examinations")
    )
    if not clicks.sum():
        raise InputError("no impression was clicked: nothing can be learnt from this log")
    mean_rate = clicks.sum() / examinations.sum()
    return ((clicks + smoothing * mean_rate) / (examinations + smoothing)).astype(np.float32)


def main(config: Config) -> None:
    """Train the ranker that the settings describe."""
    train_on_clicks(config)


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m training.train_on_clicks --data data/shop --init minilm --out runs/clicked",
    )
