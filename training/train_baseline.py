"""Trains the baseline: a BERT cross-encoder on judgments alone, the model that a distilled student has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from ranking.card import ScoreCard, fingerprint
from ranking.program import run
from training.student.checkpoint import ScoreScale
from training.student.student_groups import first_queries, graded_sampler, judged_groups
from training.student.student_training import StudentTrainingSettings, start_student, train_student
from training.trainer import losses
from training.trainer.ranking_trainer import RankingLoss


@dataclass(kw_only=True)
class Config(StudentTrainingSettings):
    """Train the baseline on judgments.

    Args:
        loss: ranknet or hinge over graded pairs, or point: squared error to the standardised grade
        margin: margin of the hinge loss
        train_share: share of the judged train queries to use
        group_documents: documents of a query per step, every grade kept; 0 takes all
    """

    loss: Literal["ranknet", "hinge", "point"] = "ranknet"
    margin: float = 1.0
    train_share: float = 1.0
    group_documents: int = 16

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.train_share <= 1:
            raise ValueError(f"train_share is {self.train_share}: a share above 0, up to 1, is needed")
        if self.group_documents < 0:
            raise ValueError(f"group_documents is {self.group_documents}: must not be negative")


def train_baseline(config: Config) -> ScoreCard:
    """Train, write the checkpoint to config.out, and return its card."""
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
