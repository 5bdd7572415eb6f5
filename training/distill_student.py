"""Distils a teacher's scores of candidates into a BERT cross-encoder (DisRanker, arXiv 2411.04539, stage 3)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
from torch import Tensor

from ranking.card import ScoreCard, fingerprint
from ranking.errors import InputError
from ranking.labels import LabelSet
from ranking.program import run
from training.sources.held_out import held_out_files
from training.student.checkpoint import ScoreScale
from training.student.encoder import StudentModel
from training.student.judged_tuning import JudgedTuningSettings
from training.student.student_groups import (
    Sampling,
    confidence_weights,
    first_queries,
    graded_sampler,
    joined,
    judged_groups,
    labelled_groups,
    sampler,
    weighted,
)
from training.student.student_training import StudentTrainingSettings, start_student, train_student
from training.student.value_relations import RelationSettings, ValueRelations, check_relation_teacher, relation_card
from training.trainer import losses
from training.trainer.batch_trainer import fingerprints
from training.trainer.group_batches import GroupSampler, RankingGroups
from training.trainer.ranking_trainer import RankingLoss

LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class StudentLossSettings:
    """How a student learns from the teacher's scores.

    Args:
        loss: hybrid = alpha * point-wise MSE + beta * margin MSE; point and margin alone; ranknet on the teacher's
            order; ranknet_point = ranknet + anchor * point-wise MSE; kl: list-wise softmax cross-entropy
        alpha: weight of point-wise MSE in hybrid; more keeps scores comparable between queries (thresholds), 1 is the
            paper's
        beta: weight of margin MSE in hybrid; more spends capacity on the order within a query
        anchor: weight of point-wise MSE in ranknet_point; more keeps scores comparable between queries (thresholds)
        temperature: of kl, on standardised scores; lower looks at the top of the list only
        judged_weight: weight of RankNet on the judged train queries mixed in beside the labels; 0 leaves them out
        confidence: weight of a label: none, or disagreement: less where the teachers behind it lie further apart
        group_sampling: documents of a query per step: stratified over its score range, uniform, or top scores only
        group_documents: how many of them; 0 takes all
    """

    loss: Literal["hybrid", "point", "margin", "ranknet", "ranknet_point", "kl"] = "hybrid"
    alpha: float = 0.1
    beta: float = 1.0
    anchor: float = 0.1
    temperature: float = 0.5
    judged_weight: float = 0.0
    confidence: Literal["none", "disagreement"] = "none"
    group_sampling: Sampling = "stratified"
    group_documents: int = 12

    def __post_init__(self):
        for name in ("alpha", "beta", "anchor", "judged_weight", "group_documents"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: must not be negative")
        if self.group_documents == 1:
            raise ValueError("group_documents is 1: one document of a query has no order; 0 for all, or at least 2")
        if self.loss == "hybrid" and not self.alpha + self.beta:
            raise ValueError("alpha and beta are both 0: hybrid would teach nothing")
        if self.confidence != "none" and self.loss not in ("hybrid", "point", "margin"):
            raise ValueError(f"confidence {self.confidence} weights squared errors: loss {self.loss} has none")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: a positive number is needed")


@dataclass(kw_only=True)
class DistillationSettings(StudentTrainingSettings, StudentLossSettings, RelationSettings, JudgedTuningSettings):
    """What shapes a distilled student, wherever its labels come from.

    Args:
        train_share: share of the judged train queries that judged_weight and judged_epochs use
    """

    train_share: float = 1.0

    def __post_init__(self):
        if self.init is None and self.tokenizer is None:
            # relations compare token with token, whatever the dataset of today would make the vocabulary
            self.tokenizer = self.relation_teacher
        StudentTrainingSettings.__post_init__(self)
        StudentLossSettings.__post_init__(self)
        RelationSettings.__post_init__(self)
        JudgedTuningSettings.__post_init__(self)
        if not 0 <= self.train_share <= 1:
            raise ValueError(f"train_share is {self.train_share}: a share from 0 to 1 is needed")


@dataclass(kw_only=True)
class Config(DistillationSettings):
    """Distil teacher labels into a student.

    Args:
        labels: finished labels folder of the candidates, as label_corpus, label_over_http, import_labels or
            blend_labels wrote it
        candidates: the file that was labelled, if not the dataset's candidates.parquet
        teacher: checkpoint that labelled, whose card has the scores' mean and spread; without it they are taken from
            the labels
    """

    labels: Path
    candidates: Path | None = None
    teacher: Path | None = None


def distill_student(config: Config) -> ScoreCard:
    """Train, write the checkpoint to config.out, and return its card."""
    card = None if config.teacher is None else teacher_card(config.teacher)
    relation_card(config)  # a student from scratch takes this teacher's tokenizer
    labels, candidates = LabelSet.load(config.labels), config.candidates or config.data / "candidates.parquet"
    labels.check_candidates(candidates)
    trained_on = {"candidates": fingerprint(candidates), "labels": labels.teacher_id}
    held_out = fingerprints({f"{path.stem} judgments": path for path in held_out_files(config.data)})
    student = start_student(config, trained_on | held_out | {"labels": labels.mark()})
    check_relation_teacher(config, student)  # before the labels are read, which may take long
    labelled = labelled_groups(candidates, config.labels, student.text_format, config.data)
    weights = None if config.confidence == "none" else confidence_weights(candidates, config.labels, config.data)
    return distill(config, student, labelled, card, trained_on, weights)


def distill(
    settings: DistillationSettings,
    student: StudentModel,
    labelled: RankingGroups,
    card: ScoreCard | None,
    trained_on: dict[str, str],
    weights: np.ndarray | None = None,
) -> ScoreCard:
    """Train a student on labelled groups (raw teacher scores as targets), save it and return its card.

    card: the teacher's, None to take the scores' mean and spread from the labels; trained_on: name -> fingerprint;
    weights: of the labels (confidence_weights), None if all count alike.
    """
    _check_order(settings, labelled)
    relations = ValueRelations.load(settings, student)
    scale = teacher_scale(labelled, card)
    labelled.targets = scale.standardise(labelled.targets)
    dev_path, train_path = (settings.data / "judgments" / f"{split}.parquet" for split in ("dev", "train"))
    dev = judged_groups(dev_path, student.text_format)
    groups, sample = labelled, sampler(settings.group_sampling, settings.group_documents)
    judged = None
    if settings.judged_weight or settings.judged_epochs:
        judged = _train_judgments(train_path, student, settings.train_share, settings.seed)
    if judged is not None:
        trained_on = trained_on | {"train": fingerprint(train_path)}
    if judged is not None and settings.judged_weight:
        groups = joined(labelled, judged)
        sample = _by_source(sample, graded_sampler(settings.group_documents))
    if weights is not None:
        groups = weighted(groups, weights)
    if relations is not None:
        trained_on = trained_on | {"relation teacher": relations.mark}
    return train_student(
        settings,
        student,
        groups,
        dev,
        word_groups=labelled,
        loss=distillation_loss(settings),
        sample_group=sample,
        role="student",
        scale=scale,
        trained_on=trained_on | {"dev": fingerprint(dev_path)},
        judged_queries=0 if judged is None else len(judged),
        judged=judged if settings.judged_epochs else None,
        tuning=settings,
        relations=relations,
    )


def _train_judgments(path: Path, student: StudentModel, share: float, seed: int) -> RankingGroups | None:
    """The judged train queries that the student may use, None where there are none: labels alone teach it then."""
    if not share or not path.is_file() or not pq.read_metadata(path).num_rows:
        LOGGER.info("no judged train query: the student learns from labels alone")
        return None
    return first_queries(judged_groups(path, student.text_format), share, seed)


def _check_order(settings: StudentLossSettings, labelled: RankingGroups) -> None:
    """InputError if no query has two labelled documents and the loss compares those of a query alone."""
    if np.diff(labelled.group_starts).max() > 1 or settings.loss == "point":
        return
    if settings.loss in ("margin", "ranknet", "kl") or (settings.loss == "hybrid" and not settings.alpha):
        raise InputError(
            f"every query has one labelled document, and loss {settings.loss} compares the documents of a query: label "
            "more of them, or take --loss point"
        )
    LOGGER.warning("every query has one labelled document: only the point-wise part of the loss teaches anything")


def teacher_card(folder: Path) -> ScoreCard:
    """The card of a checkpoint that labelled. InputError if it does not rank, or scored all of its dev split alike."""
    card = ScoreCard.load(folder).require(folder, "teacher", "baseline", "student")  # an arm can label, too
    if not card.score_spread:
        raise InputError(f"{folder}: its card has score_spread 0: it scores all documents alike and can teach nothing")
    return card


def teacher_scale(labelled: RankingGroups, card: ScoreCard | None) -> ScoreScale:
    """Mean and spread of the teacher's raw scores: its card's, or the labels' own.

    Warns where the two are far apart, since the card may be another teacher's: targets would be too flat or too steep.
    """
    own = ScoreScale.of(labelled.targets)
    if card is None:
        LOGGER.info("no teacher card: labels standardised by their own mean %.3f and spread %.3f", own.mean, own.spread)
        return own
    scale = ScoreScale(card.score_mean, card.score_spread)
    if not 0.5 <= own.spread / scale.spread <= 2 or abs(own.mean - scale.mean) > scale.spread:
        LOGGER.warning(
            "the labels have the mean %.3f and the spread %.3f, the card of --teacher says %.3f and %.3f: is it the "
            "teacher that gave them? Leave --teacher out to standardise the labels by their own",
            own.mean, own.spread, scale.mean, scale.spread,
        )  # fmt: skip
    return scale


def distillation_loss(settings: StudentLossSettings) -> RankingLoss:
    """The student's loss on standardised teacher scores.

    Targets are [n], with judged queries mixed in [n, 2] (see joined), with weighted labels [n, 3] (see weighted).
    """

    def on_labels(scores: Tensor, targets: Tensor, groups: Tensor, weights: Tensor | None = None) -> Tensor:
        if settings.loss == "point":
            return losses.point_mse(scores, targets, "sum", weights)
        if settings.loss == "margin":
            return losses.margin_mse(scores, targets, groups, "sum", weights)
        if settings.loss == "ranknet":
            return losses.ranknet(scores, targets, groups, "sum")
        if settings.loss == "ranknet_point":
            return losses.ranknet_point(scores, targets, groups, settings.anchor, "sum")
        if settings.loss == "kl":
            return losses.listwise_kl(scores, targets, groups, settings.temperature, "sum")
        return losses.hybrid(scores, targets, groups, settings.alpha, settings.beta, "sum", weights)

    def loss(scores: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        if targets.dim() == 1:
            return on_labels(scores, targets, groups) / len(scores)
        judged = targets[:, 1] == 1
        weights = targets[~judged, 2] if targets.shape[1] > 2 else None
        total = on_labels(scores[~judged], targets[~judged, 0], groups[~judged], weights)
        graded = losses.ranknet(scores[judged], targets[judged, 0], groups[judged], "sum")
        return (total + settings.judged_weight * graded) / len(scores)

    return loss


def _by_source(labelled: GroupSampler | None, judged: GroupSampler | None) -> GroupSampler:
    def sample(targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        chosen = judged if targets[0, 1] == 1 else labelled
        return np.arange(len(targets)) if chosen is None else chosen(targets, rng)

    return sample


def main(config: Config) -> None:
    """Distil the student that the settings describe."""
    distill_student(config)


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m training.distill_student --data data/world --labels runs/labels --teacher runs/teacher "
        "--out runs/student --size mini-6 --warm-up-epochs 1",
    )
