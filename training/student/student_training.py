"""One training of a student or baseline from its settings to its checkpoint: start, warm-up, groups in, card out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self, cast

from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from ranking.calibration_fit import Kind
from ranking.card import ScoreCard
from ranking.errors import InputError
from ranking.files import replacing
from ranking.object_store import hand_over
from ranking.schema import read_judgments
from training.student.checkpoint import ScoreScale, save_student
from training.student.encoder import StudentModel, StudentModelSettings, create_student
from training.student.judged_tuning import JudgedTuningSettings, tune_on_judgments
from training.student.masked_lm_warm_up import WarmUpSettings, warm_up
from training.student.model_card import push_to_hub
from training.student.value_relations import ValueRelations
from training.student.word_embedding_start import WordEmbeddingSettings, fit_word_embeddings
from training.trainer.batch_trainer import begin_run, fingerprints
from training.trainer.group_batches import GroupSampler, RankingGroups
from training.trainer.ranking_trainer import RankingLoss, RankingTrainer
from training.trainer.training_settings import RUN_FOLDER, TrainingSettings, launched_processes


@dataclass(kw_only=True)
class StudentTrainingSettings(TrainingSettings, StudentModelSettings, WarmUpSettings, WordEmbeddingSettings):
    """What every training of a student or baseline needs, whatever its targets.

    Args:
        data: dataset folder, as prepare_data wrote it
        out: folder for the checkpoint; the run's states go to its subfolder training/
        calibrate: fit a map from score to probability on dev judgments; isotonic wants thousands, platt hundreds
        least_steps: optimiser steps at least, whatever the epochs: a small set is passed over more often, and dev is
            then evaluated four times in all
        push_to_hub: repository (owner/name) of a model hub to upload the finished checkpoint to; made private if new
    """

    data: Path
    out: Path
    calibrate: Kind | None = None
    least_steps: int = 0
    push_to_hub: str | None = None

    def __post_init__(self):
        TrainingSettings.__post_init__(self)
        StudentModelSettings.__post_init__(self)
        WarmUpSettings.__post_init__(self)
        WordEmbeddingSettings.__post_init__(self)
        if self.least_steps < 0:
            raise ValueError(f"least_steps is {self.least_steps}: must not be negative")

    def for_queries(self, queries: int) -> Self:
        """These settings with as many epochs over `queries` as least_steps wants; themselves if they have them."""
        wanted = self.least_steps * self.batch_groups * self.accumulation / queries
        if wanted <= self.epochs:
            return self
        return replace(self, epochs=wanted, eval_steps=self.eval_steps or max(1, self.least_steps // 4))


def start_student(settings: StudentTrainingSettings, content: Mapping[str, str] | None = None) -> StudentModel:
    """The model to train: created as the settings say and, if they ask for it, warmed up on the dataset's candidates.

    A finished warm-up is kept below the output folder, so that a resumed run starts from the same weights.
    content: name -> fingerprint of what is trained on beside the dataset's judgments; a resumed run must find the same.
    InputError if the output folder holds another training (begin_run), or the start does not fit (create_student).
    """
    work, judgments = settings.out / RUN_FOLDER, settings.data / "judgments"
    files = {f"{split} judgments": judgments / f"{split}.parquet" for split in ("train", "dev")}
    if settings.warm_up_epochs:
        files["warm-up candidates"] = settings.data / "candidates.parquet"
    read = fingerprints(files)
    begin_run(settings, settings.out, launched_processes(), {**read, **(content or {})})
    student = create_student(settings, settings.data, work, settings.seed, settings.resume)
    if not settings.warm_up_epochs:
        return student
    if not isinstance(student.model, BertForSequenceClassification):
        raise InputError(f"warm_up_epochs: of BERT alone; {student.base} is a {student.model.config.model_type} model")
    read_judgments(judgments / "dev.parquet")  # no student is chosen without them: said before the warm-up, not after
    kept = work / "warm_up.safetensors"
    if not (settings.resume and kept.is_file()):
        of_warm_up = TrainingSettings(
            epochs=settings.warm_up_epochs,
            learning_rate=settings.warm_up_learning_rate,
            forward_tokens=settings.forward_tokens,
            precision=settings.precision,
            log_steps=50,
            seed=settings.seed,
            resume=settings.resume,
        )
        candidates = settings.data / "candidates.parquet"
        trainer = warm_up(
            cast(BertForSequenceClassification, student.model),
            student.text_format,
            candidates,
            work / "warm_up",
            of_warm_up,
        )
        if trainer.args.process_index == 0:
            with replacing(kept) as aside:
                save_file(student.model.state_dict(), aside)
        hand_over(kept, trainer.args.process_index == 0, trainer.accelerator.wait_for_everyone)
    student.model.load_state_dict(load_file(kept))
    student.base += f" + {settings.warm_up_epochs:g} epochs masked LM"
    return student


def train_student(
    settings: StudentTrainingSettings,
    student: StudentModel,
    train: RankingGroups,
    dev: RankingGroups,
    *,
    word_groups: RankingGroups,
    loss: RankingLoss,
    sample_group: GroupSampler | None,
    role: Literal["student", "baseline"],
    scale: ScoreScale,
    trained_on: dict[str, str],
    judged_queries: int,
    judged: RankingGroups | None = None,
    tuning: JudgedTuningSettings | None = None,
    relations: ValueRelations | None = None,
) -> ScoreCard:
    """Train, keep the weights with the best dev NDCG@5, write the checkpoint to settings.out, return its card.

    train: groups with targets on the standardised scale; dev: groups with grades; word_groups: groups with one target
    per document, from which word embeddings are fitted first where the settings ask for it (a start from scratch only);
    scale: the targets' raw scale, to which the saved model's scores are brought back; trained_on: name -> fingerprint;
    judged_queries: judged train queries behind the targets or the tuning;
    judged, tuning: judged groups that the model is tuned on afterwards, and how (training/student/judged_tuning.py);
    relations: a teacher whose value relations are a further target.
    """
    if settings.match_steps and settings.init is None:
        fit_word_embeddings(student, word_groups, settings.match_steps, settings.seed)
    with nullcontext() if relations is None else relations.text_loss_of(student.model) as text_loss:
        trainer = RankingTrainer(
            student.model,
            settings.for_queries(len(train)),
            train,
            dev,
            loss=loss,
            pad_id=student.text_format.pad_id,
            token_types=student.text_format.token_types,
            sample_group=sample_group,
            out=settings.out,
            text_loss=text_loss,
        )
        trainer.start()
    if judged is not None and tuning is not None:
        tune_on_judgments(student, settings, tuning, judged, dev, work=settings.out / RUN_FOLDER / "judged")
    card = save_student(
        student,
        trainer,
        dev,
        settings.out,
        role=role,
        scale=scale,
        trained_on=trained_on,
        judged_queries=judged_queries,
        calibrate=settings.calibrate,
    )
    if settings.push_to_hub and trainer.args.process_index == 0:
        push_to_hub(settings.out, settings.push_to_hub)
    return card
