"""Stage 2: a decoder becomes the teacher: a score from the end-of-sequence token, pairwise rank loss (docs/teacher.md).

python -m training.finetune_teacher --data data/world --model runs/pretrained --out runs/teacher
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import set_seed

from ranking.card import CARD_NAME, ScoreCard, fingerprint, model_name
from ranking.errors import InputError
from ranking.limits import DEFAULT_LIMITS, FieldLimits
from ranking.program import run
from ranking.text import FORMAT_VERSION, TEACHER_FORMAT, TeacherFormat
from training.teacher.decoder import open_tokenizer, padding_id, share_tokenizer
from training.teacher.likelihood import evidence_groups, sample_groups
from training.teacher.score_head import (
    LoraSettings,
    Pooling,
    add_lora,
    install_pooling,
    open_teacher,
    text_config,
)
from training.teacher.teacher_groups import judged_groups
from training.trainer.attention import fastest_attention
from training.trainer.batch_trainer import begin_run, fingerprints
from training.trainer.group_batches import sample_up_to
from training.trainer.losses import hinge, margin_mse, point_mse, ranknet
from training.trainer.ranking_trainer import RankingTrainer, dev_metrics
from training.trainer.training_settings import TrainingSettings, launched_processes

LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Config(TrainingSettings, LoraSettings):
    """Fine-tune a decoder on judgments into the teacher: one score per document, learned from pairs.

    Args:
        data: dataset folder with judgments/dev.parquet, and judgments/train.parquet (the likelihood loss:
            candidates.parquet)
        model: pre-trained checkpoint of stage 1, any other decoder, or a teacher to train further (no LoRA adapter); a
            folder or hub id
        out: checkpoint folder to write
        loss: hinge with margin, ranknet (logistic), or point: squared error to the grade, the point-wise ablation;
            likelihood: no judgments, but what the model of stage 1 says of candidates.parquet
                (training/teacher/likelihood.py)
        margin: score difference that hinge asks of every pair
        group_size: documents of a query per step, drawn anew each epoch over all its grades (for the likelihood loss:
            drawn once); 0 for all
        pooling: state that is scored: last_token (the end-of-sequence token), or mean for the ablation; only last_token
            serves
        reinitialise: draw all weights anew: the ablation without any pre-training
        limits: tokens of each field that the teacher reads, all three; none: as the checkpoint's score card says, and
            without a card as stage 1's default
        train_queries: use only so many queries: the first judged ones, or random ones of the candidates; 0 for all
    """

    data: Path
    model: str
    out: Path
    loss: Literal["hinge", "ranknet", "point", "likelihood"] = "hinge"
    margin: float = 1.0
    group_size: int = 8
    pooling: Pooling = "last_token"
    reinitialise: bool = False
    limits: FieldLimits | None = None
    train_queries: int = 0

    def __post_init__(self):
        TrainingSettings.__post_init__(self)
        LoraSettings.__post_init__(self)
        if not self.margin > 0:
            raise ValueError(f"margin is {self.margin}: a positive number is needed")
        if self.group_size == 1 or self.group_size < 0:
            raise ValueError(f"group_size is {self.group_size}: 0 for all documents, or at least 2")
        if self.train_queries < 0:
            raise ValueError(f"train_queries is {self.train_queries}: 0 for all, or a number of queries")
        if self.reinitialise and self.lora_rank:
            raise ValueError(
                "reinitialise trains from nothing: LoRA on random weights learns little; set lora_rank to 0"
            )
        if self.lora_rank and self.loss == "likelihood":
            raise ValueError(
                "the likelihood loss is a start to train on from, and training does not go on from LoRA adapters"
            )
        if self.reinitialise and self.loss == "likelihood":
            raise ValueError("the likelihood loss hands on what the weights know: reinitialise would throw them away")


def main(config: Config) -> None:
    """Fine-tune the teacher that the settings describe and write its checkpoint."""
    set_seed(config.seed)
    state = launched_processes()
    if config.loss == "likelihood" and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # FSDP's launcher loads weights into the first process only, and each needs a whole decoder here
        raise InputError("the likelihood loss does not run under FSDP: launch it on one device, or with DDP")
    base_card = _base_card(config.model, config.loss)
    source = "candidates" if config.loss == "likelihood" else "judgments/train"
    files = {name: config.data / f"{name}.parquet" for name in (source, "judgments/dev")}
    read = fingerprints(files)
    begin_run(config, config.out, state, read)
    tokenizer = open_tokenizer(config.model)
    model = open_teacher(config.model, reinitialise=config.reinitialise, frozen_bf16=config.frozen_bf16)
    text_config(model).pad_token_id = model.config.pad_token_id = padding_id(tokenizer)
    config.out.mkdir(parents=True, exist_ok=True)
    positions = getattr(text_config(model), "max_position_embeddings", None)
    limits = config.limits or (base_card.limits if base_card is not None else DEFAULT_LIMITS)
    text_format = share_tokenizer(tokenizer, config.out, limits, positions, state)
    _check_vocabulary(config.model, model, text_format)

    train_file, dev_file = files.values()
    if config.loss == "likelihood":
        drawn = sample_groups(train_file, config.train_queries, config.group_size, config.seed)
        dev = judged_groups(dev_file, text_format)
        train = evidence_groups(
            config.model,
            text_format,
            padding_id(tokenizer),
            drawn,
            bf16=config.bf16(),
            forward_tokens=config.forward_tokens,
        )
    else:
        train = judged_groups(train_file, text_format, config.train_queries)
        dev = judged_groups(dev_file, text_format)
    fastest_attention(model, text_format.max_tokens())
    install_pooling(model, config.pooling)
    if config.lora_rank:
        model = add_lora(model, config)
    LOGGER.info(
        "%d queries and %d documents to train on, %d and %d for dev; %d of %d parameters train",
        len(train), len(train.store), len(dev), len(dev.store),
        sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters()),
    )  # fmt: skip
    trainer = RankingTrainer(
        model,
        config,
        train,
        dev,
        loss=rank_loss(config.loss, config.margin),
        pad_id=padding_id(tokenizer),
        out=config.out,
        sample_group=sample_up_to(config.group_size) if config.group_size else None,
    )
    trainer.start()
    scores = trainer.score(dev)
    card = ScoreCard(
        role="teacher",
        text_format=TEACHER_FORMAT,
        format_version=FORMAT_VERSION,
        limits=limits,
        head="linear",
        pooling=config.pooling,
        score_mean=float(scores.mean()),
        score_spread=float(scores.std()),
        vocabulary=fingerprint(config.out / "tokenizer.json"),
        base_model=model_name(config.model) + (", weights drawn anew" if config.reinitialise else ""),
        trained_on={
            **(base_card.trained_on if base_card is not None and not config.reinitialise else {}),
            **read,
        },
        metrics=dev_metrics(scores, dev),
    )
    trainer.save_checkpoint(card)
    if state.is_main_process:
        LOGGER.info("dev NDCG@5 %.4f; checkpoint in %s", card.metrics["ndcg@5"], config.out)


def rank_loss(name: str, margin: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The training loss as a function of (scores, grades or evidence, groups)."""
    if name == "likelihood":
        return margin_mse  # the evidence of two documents of a query compares; that of two queries does not
    if name == "hinge":
        return partial(hinge, margin=margin)
    return ranknet if name == "ranknet" else lambda scores, grades, groups: point_mse(scores, grades)


def _base_card(model: str, loss: str) -> ScoreCard | None:
    """The card of the model to start from, None where it has none.

    InputError: a role, a format or a tokenizer that does not fit.
    """
    if not (Path(model) / CARD_NAME).is_file():
        return None
    # a teacher has unlearnt to predict words, and has no likelihood to hand on
    roles = ["pretrained"] if loss == "likelihood" else ["pretrained", "teacher"]
    card = ScoreCard.load(model).require(model, *roles)
    if (card.text_format, card.format_version) != (TEACHER_FORMAT, FORMAT_VERSION):
        raise InputError(f"{model}: text format {card.text_format!r} {card.format_version}: train stage 1 again")
    if card.vocabulary and card.vocabulary != fingerprint(Path(model) / "tokenizer.json"):
        raise InputError(
            f"{model}: tokenizer.json is not the one that its weights were trained with: put that back, or train this "
            "checkpoint again"
        )
    return card


def _check_vocabulary(name: str, model: Any, text_format: TeacherFormat) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if text_format.tokenizer.get_vocab_size() > rows:
        raise InputError(
            f"{name}: {text_format.tokenizer.get_vocab_size()} tokens but {rows} embeddings: another model's tokenizer"
        )


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m training.finetune_teacher --data data/world --model runs/pretrained --out runs/teacher",
    )
