"""Distils a teacher's scores of unlabelled candidates into a BERT cross-encoder (DisRanker, arXiv 2411.04539, stage 3)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from ranking.card import ScoreCard, fingerprint
from ranking.labels import LabelSet
from ranking.program import run
from training.evaluation.calibration import Kind
from training.student.checkpoint import ScoreScale, save_student
from training.student.encoder import StudentModel, StudentModelSettings
from training.student.groups import Sampling, graded_sampler, joined, judged_groups, labelled_groups, sampler
from training.student.warm_up import start_student
from training.student.word_matching import start_by_matching
from training.trainer import losses
from training.trainer.group_batches import GroupSampler, RankingGroups
from training.trainer.ranking_trainer import RankingLoss, RankingTrainer
from training.trainer.trainer_setup import TrainingSettings

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class StudentLossSettings:
    """How a student learns from the teacher's scores.

    Args:
        loss: hybrid = alpha * point-wise MSE + beta * margin MSE; point and margin alone; ranknet on the teacher's order;
            kl: list-wise softmax cross-entropy
        alpha: weight of point-wise MSE in hybrid; more keeps scores comparable between queries (thresholds)
        beta: weight of margin MSE in hybrid; more spends capacity on the order within a query
        temperature: of kl, on standardised scores; lower looks at the top of the list only
        judged_weight: weight of RankNet on the judged train queries mixed in beside the labels; 0 leaves them out
        group_sampling: documents of a query per step: stratified over its score range, uniform, or top scores only
        group_documents: how many of them; 0 takes all
    """

    loss: Literal["hybrid", "point", "margin", "ranknet", "kl"] = "hybrid"
    alpha: float = 1.0
    beta: float = 1.0
    temperature: float = 0.5
    judged_weight: float = 0.0
    group_sampling: Sampling = "stratified"
    group_documents: int = 12

    def __post_init__(self):
        for name in ("alpha", "beta", "judged_weight", "group_documents"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: must not be negative")
        if self.loss == "hybrid" and not self.alpha + self.beta:
            raise ValueError("alpha and beta are both 0: hybrid would teach nothing")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: a positive number is needed")


@dataclass(kw_only=True)
class Config(TrainingSettings, StudentModelSettings, StudentLossSettings):
    """Distil teacher labels into a student.

    Args:
        data: dataset folder: candidates.parquet, dev judgements, and train judgements for judged_weight
        labels: finished labels folder of those candidates, as clients/label_corpus.py wrote it
        teacher: checkpoint whose card has the scores' mean and spread; without it they are taken from the labels
        out: folder for the checkpoint; the run's states go to its subfolder training/
        calibrate: fit a map from score to probability on dev judgements; isotonic wants thousands, platt hundreds
    """

    data: Path
    labels: Path
    out: Path
    teacher: Path | None = None
    calibrate: Kind | None = None

    def __post_init__(self):
        TrainingSettings.__post_init__(self)
        StudentModelSettings.__post_init__(self)
        StudentLossSettings.__post_init__(self)


def distill_student(config: Config) -> ScoreCard:
    """Train, write the checkpoint to config.out, and return its card."""
    card = None if config.teacher is None else ScoreCard.load(config.teacher)
    student = start_student(config, config, config.data, config.out)
    candidates = config.data / "candidates.parquet"
    labelled = labelled_groups(candidates, config.labels, student.text)
    trained_on = {"candidates": fingerprint(candidates), "labels": LabelSet.load(config.labels).teacher_id}
    return distill(config, student, labelled, card, trained_on)


def distill(
    config: Config,
    student: StudentModel,
    labelled: RankingGroups,
    card: ScoreCard | None,
    trained_on: dict[str, str],
) -> ScoreCard:
    """Train a student on labelled groups (raw teacher scores as targets), save it and return its card."""
    scale = teacher_scale(labelled, card)
    labelled.targets = scale.standardise(labelled.targets)
    dev_path, train_path = (config.data / "judgments" / f"{split}.parquet" for split in ("dev", "train"))
    dev = judged_groups(dev_path, student.text)
    groups, sample = labelled, sampler(config.group_sampling, config.group_documents)
    if config.judged_weight:
        groups = joined(labelled, judged_groups(train_path, student.text))
        sample = _by_source(sample, graded_sampler(config.group_documents))
        trained_on = trained_on | {"train": fingerprint(train_path)}
    if config.match_steps and config.init is None:
        start_by_matching(student, labelled, config.match_steps, config.seed)
    trainer = RankingTrainer(
        student.model,
        config,
        groups,
        dev,
        loss=distillation_loss(config),
        pad_id=student.text.pad_id,
        token_types=True,
        sample_group=sample,
        out=config.out,
    )
    trainer.start()
    return save_student(
        student,
        trainer,
        dev,
        config.out,
        role="student",
        scale=scale,
        trained_on=trained_on | {"dev": fingerprint(dev_path)},
        calibrate=config.calibrate,
    )


def teacher_scale(labelled: RankingGroups, card: ScoreCard | None) -> ScoreScale:
    """Mean and spread of the teacher's raw scores: its card's, or the labels' own."""
    if card is not None:
        return ScoreScale(card.score_mean, card.score_spread)
    scale = ScoreScale(float(labelled.targets.mean()), float(max(labelled.targets.std(), 1e-6)))
    log.info("no teacher card: labels standardised by their own mean %.3f and spread %.3f", scale.mean, scale.spread)
    return scale


def distillation_loss(config: StudentLossSettings) -> RankingLoss:
    """The student's loss on standardised teacher scores, [n] or, with judged queries mixed in, [n, 2] (see joined)."""

    def on_labels(scores: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        if config.loss == "point":
            return losses.point_mse(scores, targets, "sum")
        if config.loss == "margin":
            return losses.margin_mse(scores, targets, groups, "sum")
        if config.loss == "ranknet":
            return losses.ranknet(scores, targets, groups, "sum")
        if config.loss == "kl":
            return losses.listwise_kl(scores, targets, groups, config.temperature, "sum")
        return losses.hybrid(scores, targets, groups, config.alpha, config.beta, "sum")

    def loss(scores: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        if targets.dim() == 1:
            return on_labels(scores, targets, groups) / len(scores)
        judged = targets[:, 1] == 1
        total = on_labels(scores[~judged], targets[~judged, 0], groups[~judged])
        graded = losses.ranknet(scores[judged], targets[judged, 0], groups[judged], "sum")
        return (total + config.judged_weight * graded) / len(scores)

    return loss


def _by_source(labelled: GroupSampler | None, judged: GroupSampler | None) -> GroupSampler:
    def sample(targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        chosen = judged if targets[0, 1] == 1 else labelled
        return np.arange(len(targets)) if chosen is None else chosen(targets, rng)

    return sample


def main(config: Config) -> None:
    distill_student(config)


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m training.distill_student --data data/world --labels runs/labels --teacher runs/teacher "
        "--out runs/student --size mini-6 --warm-up-epochs 1",
    )
