"""Judgments after labels: a distilled student is tuned on judged queries, as far as dev judgments want it.

A few hundred judged queries can improve a student that thousands of labels have taught, or make it forget them. So the
weights are interpolated between those before and after the tuning (WiSE-FT, Wortsman et al., arXiv 2109.01903), and the
mixture with the best dev NDCG@5 is kept; one of the mixtures is the student as it was.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from training.student.encoder import StudentModel
from training.student.student_groups import graded_sampler
from training.trainer import losses
from training.trainer.group_batches import RankingGroups
from training.trainer.ranking_trainer import RankingTrainer, dev_metrics
from training.trainer.training_settings import TrainingSettings

LOGGER = logging.getLogger(__name__)

MIXTURES = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the tuned weights


@dataclass(kw_only=True)
class JudgedTuningSettings:
    """How a student goes on from the labels to judgments.

    Args:
        judged_epochs: passes over the judged train queries after the labels, with RankNet; 0 for none
        judged_learning_rate: peak learning rate of these passes
        judged_documents: documents of a query per step in them, every grade kept; 0 takes all
    """

    judged_epochs: float = 0.0
    judged_learning_rate: float = 3e-5
    judged_documents: int = 12

    def __post_init__(self):
        if min(self.judged_epochs, self.judged_documents) < 0 or not self.judged_learning_rate > 0:
            raise ValueError(
                "judged_epochs and judged_documents must not be negative, judged_learning_rate must be positive"
            )
        if self.judged_documents == 1:
            raise ValueError("judged_documents is 1: one document of a query has no order; 0 for all, or at least 2")


def tune_on_judgments(
    student: StudentModel,
    settings: TrainingSettings,
    tuning: JudgedTuningSettings,
    judged: RankingGroups,
    dev: RankingGroups,
    *,
    work: Path,
) -> float:
    """Tune the student in place on judged groups; returns the share of the tuned weights that was kept, 0 to 1.

    judged, dev: groups with grades; work: folder of this training's state.
    """
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    own = replace(
        TrainingSettings(**{name: getattr(settings, name) for name in TrainingSettings.__dataclass_fields__}),
        epochs=tuning.judged_epochs,
        learning_rate=tuning.judged_learning_rate,
        eval_steps=0,
        patience=0,
    )
    trainer = RankingTrainer(
        student.model,
        own,
        judged,
        None,
        loss=losses.ranknet,
        pad_id=student.text_format.pad_id,
        token_types=student.text_format.token_types,
        sample_group=graded_sampler(tuning.judged_documents),
        out=work,
    )
    trainer.start()
    after = {name: value.clone() for name, value in student.model.state_dict().items()}
    found = {}
    for share in MIXTURES:
        student.model.load_state_dict({name: _mixed(before[name], after[name], share) for name in before})
        found[share] = dev_metrics(trainer.score(dev), dev)["ndcg@5"]
    best = max(MIXTURES, key=lambda share: (found[share], -share))
    student.model.load_state_dict({name: _mixed(before[name], after[name], best) for name in before})
    LOGGER.info(
        "tuned on %d judged queries: dev NDCG@5 %.4f before, %.4f after; kept %g of the way with %.4f",
        len(judged),
        found[0.0],
        found[1.0],
        best,
        found[best],
    )
    return best


def _mixed(before: torch.Tensor, after: torch.Tensor, share: float) -> torch.Tensor:
    return torch.lerp(before, after, share) if before.is_floating_point() else before
