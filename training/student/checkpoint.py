"""Ends a student's or baseline's training: scale of the head, dev figures, calibration, checkpoint, card."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ranking import calibration_fit
from ranking.card import CARD_NAME, ScoreCard, fingerprint
from ranking.metrics import JudgedRanking, mean
from ranking.text import FORMAT_VERSION
from training.student.encoder import StudentModel, scale_head
from training.student.model_card import describe_for_others, limit_other_tokenizers, write_model_card
from training.trainer.group_batches import RankingGroups
from training.trainer.ranking_trainer import RankingTrainer

LOGGER = logging.getLogger(__name__)


@dataclass
class ScoreScale:
    """The targets' raw scale: training sees (target - mean) / spread, the saved model scores on the raw scale again."""

    mean: float = 0.0
    spread: float = 1.0

    @classmethod
    def of(cls, targets: np.ndarray) -> ScoreScale:
        """The scale of targets, float [n]; targets that are all equal have a spread just above zero."""
        return cls(float(targets.mean()), float(max(targets.std(), 1e-6)))

    def standardise(self, targets: np.ndarray) -> np.ndarray:
        """float32 [n] of mean 0 and spread 1 where the targets are on this scale."""
        return ((targets - self.mean) / self.spread).astype(np.float32)


def save_student(
    student: StudentModel,
    trainer: RankingTrainer,
    dev: RankingGroups,
    out: Path,
    *,
    role: Literal["student", "baseline"],
    scale: ScoreScale,
    trained_on: dict[str, str],
    judged_queries: int,
    calibrate: calibration_fit.Kind | None,
) -> ScoreCard:
    """Fold the scale into the head, score dev, calibrate, and (on the main process) write the checkpoint folder.

    Folding is exact and costs nothing when served: whoever loads the checkpoint reads raw scores on the teacher's
    scale. It holds for chunks too: the maximum and the mean of scores on another scale are theirs on that scale.
    """
    scale_head(student.model, scale.spread, scale.mean)
    scores = trainer.score(dev)
    grades = dev.targets.astype(np.int64)
    card = ScoreCard(
        role=role,
        text_format=student.text_format.name,
        format_version=FORMAT_VERSION,
        limits=student.text_format.limits,
        head="linear",
        pooling="cls",
        chunking=student.text_format.chunking,
        score_mean=float(scores.mean()),
        score_spread=float(max(scores.std(), 1e-6)),
        vocabulary=fingerprint(student.tokenizer_folder / "tokenizer.json"),
        base_model=student.base,
        trained_on=trained_on,
        judged_queries=judged_queries,
        metrics=_dev_figures(scores, grades, dev.group_of_document()),
    )
    if trainer.args.process_index == 0:
        (out / CARD_NAME).unlink(missing_ok=True)  # of a finished run that was resumed
        describe_for_others(student.model.config)
        student.model.save_pretrained(out)
        for file in student.tokenizer_folder.iterdir():
            shutil.copyfile(file, out / file.name)
        limit_other_tokenizers(out, student.text_format.max_tokens())
        write_model_card(out, card)
        card.save(out)  # last: a folder with a card is a whole checkpoint
    if calibrate is not None:  # after saving: judgments that cannot be calibrated on must not cost the training
        card.calibration = calibration_fit.fit(calibrate, scores, grades > 0)
        if trainer.args.process_index == 0:
            write_model_card(out, card)
            card.save(out)
    trainer.accelerator.wait_for_everyone()
    figures = ", ".join(f"{name} {value:.4f}" for name, value in card.metrics.items())
    LOGGER.info("%s in %s: dev %s", role, out, figures)
    return card


def _dev_figures(scores: np.ndarray, grades: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    judged = JudgedRanking(scores, grades, groups)
    figures = {f"ndcg@{k}": mean(judged.ndcg(k)) for k in (5, 10)} | {"pnr": judged.pairs().pnr}
    # a tiny dev split can have no discordant pair at all, and JSON knows no infinity
    return {name: value for name, value in figures.items() if np.isfinite(value)}
