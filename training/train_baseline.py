"""Trains the baseline: a BERT cross-encoder on judgments alone, the model that a distilled student has to beat.

With `--learn-from clicks` it learns from what a click log shows instead, for teams that have a log and few judgments.
Its checkpoint is a start: `train_baseline --init` goes on with judgments, `distill_student --init` with labels, and
`blend_labels --ranker checkpoint:` makes it a part of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from ranking.card import ScoreCard, fingerprint
from ranking.program import run
from training.student.checkpoint import ScoreScale
from training.student.clicked_groups import clicked_groups
from training.student.student_groups import first_queries, graded_sampler, judged_groups, sampler
from training.student.student_training import StudentTrainingSettings, start_student, train_student
from training.trainer import losses
from training.trainer.batch_trainer import fingerprints
from training.trainer.ranking_trainer import RankingLoss


@dataclass(kw_only=True)
class Config(StudentTrainingSettings):
    """Train the baseline on judgments, or a ranker on clicks.

    Args:
        learn_from: judgments, or clicks: RankNet on click rates that are corrected for position bias
        loss: ranknet or hinge over graded pairs, or point: squared error to the standardised grade; of judgments alone
        margin: margin of the hinge loss
        train_share: share of the judged train queries to use
        group_documents: documents of a query per step, every grade kept; of clicks, over the range of click rates; 0
            takes all
        shown_documents: what prepare_clicks --shown-documents wrote; left out, the dataset's shown_documents.parquet
        click_smoothing: examinations at the log's mean click rate that every document is given beside its own; more
            trusts rarely shown documents less
    """

    learn_from: Literal["judgments", "clicks"] = "judgments"
    loss: Literal["ranknet", "hinge", "point"] = "ranknet"
    margin: float = 1.0
    train_share: float = 1.0
    group_documents: int = 16
    shown_documents: Path | None = None
    click_smoothing: float = 5.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.train_share <= 1:
            raise ValueError(f"train_share is {self.train_share}: a share above 0, up to 1, is needed")
        if self.group_documents < 0:
            raise ValueError(f"group_documents is {self.group_documents}: must not be negative")
        if self.group_documents == 1:
            raise ValueError("group_documents is 1: one document of a query has no order; 0 for all, or at least 2")
        if not self.click_smoothing > 0:
            raise ValueError(f"click_smoothing is {self.click_smoothing}: a positive number is needed")


def train_baseline(config: Config) -> ScoreCard:
    """Train, write the checkpoint to config.out, and return its card."""
    if config.learn_from == "clicks":
        return _train_on_clicks(config)
    student = start_student(config)
    judgments = {split: config.data / "judgments" / f"{split}.parquet" for split in ("train", "dev")}
    train = first_queries(judged_groups(judgments["train"], student.text_format), config.train_share, config.seed)
    dev = judged_groups(judgments["dev"], student.text_format)
    scale = ScoreScale()
    if config.loss == "point":
        scale = ScoreScale.of(train.targets)
        train.targets = scale.standardise(train.targets)
    return train_student(
        config,
        student,
        train,
        dev,
        word_groups=train,
        loss=judgment_loss(config.loss, config.margin),
        sample_group=graded_sampler(config.group_documents),
        role="baseline",
        scale=scale,
        trained_on={split: fingerprint(path) for split, path in judgments.items()},
        judged_queries=len(train),
    )


def _train_on_clicks(config: Config) -> ScoreCard:
    shown = config.shown_documents or config.data / "shown_documents.parquet"
    dev_path = config.data / "judgments" / "dev.parquet"
    read = fingerprints({"shown_documents": shown})
    student = start_student(config, read)
    train = clicked_groups(shown, student.text_format, config.click_smoothing)
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
        trained_on=read | {"dev": fingerprint(dev_path)},
        judged_queries=0,
    )


def judgment_loss(name: str, margin: float = 1.0) -> RankingLoss:
    """The loss of that name on grades."""
    if name == "point":
        return lambda scores, grades, _: losses.point_mse(scores, grades)
    return losses.ranknet if name == "ranknet" else partial(losses.hinge, margin=margin)


def main(config: Config) -> None:
    """Train the baseline that the settings describe."""
    train_baseline(config)


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m training.train_baseline --data data/world --out runs/baseline --size mini-6 "
        "--warm-up-epochs 1",
    )
