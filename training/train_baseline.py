"""Trains the baseline: a BERT cross-encoder on judgements alone, the model that a distilled student has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from ranking.card import ScoreCard, fingerprint
from ranking.program import run
from training.evaluation.calibration import Kind
from training.student.checkpoint import ScoreScale, save_student
from training.student.encoder import StudentModelSettings
from training.student.groups import first_queries, graded_sampler, judged_groups
from training.student.warm_up import start_student
from training.student.word_matching import start_by_matching
from training.trainer import losses
from training.trainer.ranking_trainer import RankingLoss, RankingTrainer
from training.trainer.trainer_setup import TrainingSettings


@dataclass(kw_only=True)
class Config(TrainingSettings, StudentModelSettings):
    """Train the baseline on judgements.

    Args:
        data: dataset folder, as prepare_data wrote it
        out: folder for the checkpoint; the run's states go to its subfolder training/
        loss: ranknet or hinge over graded pairs, or point: squared error to the standardised grade
        margin: margin of the hinge loss
        train_share: share of the judged train queries to use
        group_documents: documents of a query per step, every grade kept; 0 takes all
        calibrate: fit a map from score to probability on dev judgements; isotonic wants thousands, platt hundreds
    """

    data: Path
    out: Path
    loss: Literal["ranknet", "hinge", "point"] = "ranknet"
    margin: float = 1.0
    train_share: float = 1.0
    group_documents: int = 16
    calibrate: Kind | None = None

    def __post_init__(self):
        TrainingSettings.__post_init__(self)
        StudentModelSettings.__post_init__(self)
        if not 0 < self.train_share <= 1:
            raise ValueError(f"train_share is {self.train_share}: a share above 0, up to 1, is needed")
        if self.group_documents < 0:
            raise ValueError(f"group_documents is {self.group_documents}: must not be negative")


def train_baseline(config: Config) -> ScoreCard:
    """Train, write the checkpoint to config.out, and return its card."""
    student = start_student(config, config, config.data, config.out)
    judgments = {split: config.data / "judgments" / f"{split}.parquet" for split in ("train", "dev")}
    train = first_queries(judged_groups(judgments["train"], student.text), config.train_share, config.seed)
    dev = judged_groups(judgments["dev"], student.text)
    scale = ScoreScale()
    if config.loss == "point":
        scale = ScoreScale(float(train.targets.mean()), float(max(train.targets.std(), 1e-6)))
        train.targets = scale.standardise(train.targets)
    if config.match_steps and config.init is None:
        start_by_matching(student, train, config.match_steps, config.seed)
    trainer = RankingTrainer(
        student.model,
        config,
        train,
        dev,
        loss=judgement_loss(config.loss, config.margin),
        pad_id=student.text.pad_id,
        token_types=True,
        sample_group=graded_sampler(config.group_documents),
        out=config.out,
    )
    trainer.start()
    trained_on = {split: fingerprint(path) for split, path in judgments.items()}
    return save_student(
        student,
        trainer,
        dev,
        config.out,
        role="baseline",
        scale=scale,
        trained_on=trained_on,
        calibrate=config.calibrate,
    )


def judgement_loss(name: str, margin: float = 1.0) -> RankingLoss:
    """The loss of that name on grades."""
    if name == "point":
        return lambda scores, grades, _: losses.point_mse(scores, grades)
    return losses.ranknet if name == "ranknet" else partial(losses.hinge, margin=margin)


def main(config: Config) -> None:
    train_baseline(config)


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m training.train_baseline --data data/world --out runs/baseline --size mini-6 --warm-up-epochs 1",
    )
