"""The cross-encoder that students and baselines are: where its weights and its vocabulary come from.

Four starting points: a pretrained checkpoint (`--init minilm`, a folder or a hub id), a part of a larger one
(`--init-layers 0,2,4,6,8,10`, `--init-inner 512`), a baseline or student of ours (`--init runs/baseline`), or from
scratch by size, with a WordPiece vocabulary trained on the dataset and, if asked for, a masked-LM warm-up on its
candidates.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    set_seed,
)

from ranking.card import CARD_NAME, ScoreCard, model_name
from ranking.chunks import Chunking, Pooling
from ranking.encoder_families import ENCODER_FAMILIES, longest_input, refused_family
from ranking.errors import InputError
from ranking.limits import DEFAULT_LIMITS, FieldLimits
from ranking.object_store import hand_over
from ranking.pretrained import checkpoint_of
from ranking.text import PairFormat, StudentFormat, load_tokenizer
from training.student.vocabulary import train_wordpiece
from training.trainer.attention import fastest_attention
from training.trainer.training_settings import launched_processes

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """layers, width, heads, inner width of a BERT encoder."""

    layers: int
    width: int
    heads: int
    inner: int


SIZES = {
    "bert-12": Shape(12, 768, 12, 3072),
    "bert-6": Shape(6, 768, 12, 3072),
    "minilm-6": Shape(6, 384, 12, 1536),
    "small-4": Shape(4, 256, 4, 1024),
    "mini-12": Shape(12, 128, 2, 512),  # the two shapes of the paper, narrow enough for a CPU
    "mini-6": Shape(6, 128, 2, 512),
    "mini-3": Shape(3, 128, 2, 512),
    "tiny-2": Shape(2, 32, 2, 64),
}


@dataclass(kw_only=True)
class StudentModelSettings:
    """Where a student starts.

    Args:
        init: encoder to start from (BERT, RoBERTa, XLM-R, ModernBERT, DeBERTa): minilm (docs/students.md), a folder
            or a hub id, a baseline or student of ours included; none: a BERT from scratch
        init_layers: layers of that checkpoint to keep, e.g. 0,2,4,6,8,10 for a BERT-6 from a BERT-12; none: all
        init_inner: inner neurons of each layer's feed-forward to keep of that checkpoint, those with the largest
            weights; none: all
        size: shape of a model from scratch, see docs/students.md
        vocabulary_size: WordPiece tokens of a model from scratch
        tokenizer: checkpoint folder whose tokenizer a model from scratch takes; none: one is trained on the dataset
        dropout: dropout of the encoder and before the head; 0.1 for long runs on a GPU, 0 is faster on a CPU
        limits: tokens of each field that the model reads; with --init of a checkpoint of ours, those of its card
        chunks: read a summary beyond its limit as up to so many chunks of that length, in training and when served;
            left out, this and the next two are as in the card of --init, else one chunk without overlap
        chunk_overlap: tokens of a chunk that the next one begins with again; what answers a query has to
            stand in one chunk: half a chunk for short passages, an eighth or a quarter for long texts
        chunk_pooling: the document's score: that of its best chunk (max), or the mean of all chunks
    """

    init: str | None = None
    init_layers: list[int] | None = None
    init_inner: int | None = None
    size: str = "bert-6"
    vocabulary_size: int = 8000
    tokenizer: Path | None = None
    dropout: float = 0.0
    limits: FieldLimits = DEFAULT_LIMITS
    chunks: int | None = None
    chunk_overlap: int | None = None
    chunk_pooling: Pooling | None = None

    def __post_init__(self):
        self.chunking(Chunking())
        if self.size not in SIZES:
            raise ValueError(f"size is {self.size!r}: one of {', '.join(SIZES)} is needed")
        if self.init_layers and self.init is None:
            raise ValueError("init_layers selects layers of a checkpoint: init is needed with it")
        if self.init_inner is not None and (self.init is None or self.init_inner < 1):
            raise ValueError(f"init_inner is {self.init_inner}: at least 1, of a checkpoint that init names, is needed")
        if self.tokenizer is not None and self.init is not None:
            raise ValueError("tokenizer is for a model from scratch: a checkpoint named by init has its own")
        if self.init_layers and min(self.init_layers) < 0:
            raise ValueError(f"init_layers is {self.init_layers}: layers count from 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: a number from 0 to below 1 is needed")
        if self.vocabulary_size < 100:
            raise ValueError(f"vocabulary_size is {self.vocabulary_size}: at least 100 is needed")

    def chunking(self, start: Chunking) -> Chunking:
        """How long summaries are read: as `start` but for what these settings say."""
        said: dict[str, Any] = {"most": self.chunks, "overlap": self.chunk_overlap, "pooling": self.chunk_pooling}
        return replace(start, **{name: value for name, value in said.items() if value is not None})


@dataclass
class StudentModel:
    """A model to train: its text format, its tokenizer (saved with it), and what it started from, for the card."""

    model: PreTrainedModel
    text_format: StudentFormat
    tokenizer_folder: Path
    base: str


def create_student(
    settings: StudentModelSettings, data: str | Path, work: str | Path, seed: int, resume: bool = False
) -> StudentModel:
    """Make the model that the settings describe. work: folder for the tokenizer, which a resumed run finds there.

    InputError if the start does not fit.
    """
    set_seed(seed)  # a head from scratch is part of the seed
    init = None if settings.init is None else checkpoint_of(settings.init)
    processes, folder = launched_processes(), Path(work) / "tokenizer"
    # one process writes the tokenizer, the others read it
    if processes.is_main_process and not (resume and (folder / "tokenizer.json").is_file()):
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt with other settings; its files would go with ours
        if init is not None:
            _tokenizer_of(init).save_pretrained(folder)
        elif settings.tokenizer is not None:
            _copy_tokenizer(settings.tokenizer, folder)
        else:
            train_wordpiece(data, folder, settings.vocabulary_size)
    hand_over(folder, processes.is_main_process, processes.wait_for_everyone)
    limits, chunking = settings.limits, settings.chunking(Chunking())
    if init is None:
        text_format = StudentFormat(load_tokenizer(folder), limits, chunking)
        model: PreTrainedModel = _from_scratch(settings, text_format)
        base = f"scratch:{settings.size}"
        _warn_of_unknown_words(Path(data))
    else:
        if (Path(init) / CARD_NAME).is_file():
            card = ScoreCard.load(init).require(init, "student", "baseline")
            limits, chunking = card.limits, settings.chunking(card.chunking)
        model = _from_checkpoint(settings, init)
        kind = StudentFormat if model.config.model_type == "bert" else PairFormat
        text_format = kind(load_tokenizer(folder), limits, chunking)
        base = model_name(str(settings.init))
        base += f" layers {','.join(map(str, settings.init_layers))}" if settings.init_layers else ""
        base += f" inner {settings.init_inner}" if settings.init_inner else ""
    positions, rows = longest_input(model.config), cast(Any, model.get_input_embeddings()).weight.shape[0]
    if text_format.max_tokens() > positions:
        raise InputError(
            f"{base}: {text_format.max_tokens()} tokens a pair, {positions} positions: lower the field limits"
        )
    if text_format.tokenizer.get_vocab_size() > rows:
        raise InputError(f"{base}: a tokenizer of {text_format.tokenizer.get_vocab_size()} tokens, {rows} embeddings")
    fastest_attention(model, text_format.max_tokens())
    parameters = sum(p.numel() for p in model.parameters())
    shape = (model.config.num_hidden_layers, model.config.hidden_size)
    LOGGER.info("%s: %d layers, %d wide, %d parameters", base, *shape, parameters)
    return StudentModel(model, text_format, folder, base)


def _check_family(init: str) -> None:
    """InputError for an encoder that cannot be a student, before its tokenizer is opened."""
    try:
        family = AutoConfig.from_pretrained(init).model_type
    except (OSError, ValueError):
        return  # the tokenizer's reader says what is wrong with the folder
    if family not in ENCODER_FAMILIES:
        raise InputError(f"{init}: {refused_family(family)}")


def _tokenizer_of(init: str):
    _check_family(init)
    try:
        tokenizer = AutoTokenizer.from_pretrained(init, use_fast=True)
    except (OSError, ValueError) as problem:
        raise InputError(f"{init}: no tokenizer can be loaded: {_line(problem)}") from problem
    if not tokenizer.is_fast:
        raise InputError(f"{init}: has no fast tokenizer (tokenizer.json)")
    return tokenizer


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's files as they are: a tokenizer class might write its own idea of them."""
    load_tokenizer(source)  # says what is wrong with it
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.glob("tokenizer*.json"):
        shutil.copyfile(file, folder / file.name)


def _from_scratch(settings: StudentModelSettings, text_format: StudentFormat) -> BertForSequenceClassification:
    shape = SIZES[settings.size]
    config = BertConfig(
        vocab_size=text_format.tokenizer.get_vocab_size(),
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.inner,
        max_position_embeddings=max(64, text_format.max_tokens()),
        pad_token_id=text_format.pad_id,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
    )
    config.num_labels = 1
    model = BertForSequenceClassification(config)
    attend_to_equal_tokens(model)
    return model


@torch.no_grad()
def attend_to_equal_tokens(model: BertForSequenceClassification) -> None:
    """Start a small cross-encoder so that it learns to compare query and document words within a few hundred steps.

    BERT's own start (all weights 0.02, made for 768 dimensions and long pre-training) leaves a narrow model near a
    constant score for thousands of steps. Here every matrix starts at unit scale (std 1 / sqrt(inputs)), and in half
    of the heads query and key projections are equal, so a token attends to its like elsewhere in the pair (mimetic
    initialisation, Trockman and Kolter, arXiv 2305.09828); the other half gathers. Figures: docs/decisions.md.
    """
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    matching = width // heads * (heads // 2)
    for layer in cast(Any, model.bert.encoder.layer):
        attention = layer.attention.self
        attention.query.weight[:matching].normal_(0.0, width**-0.5)
        attention.key.weight[:matching] = attention.query.weight[:matching]
        for dense in (attention.value, layer.attention.output.dense, layer.intermediate.dense, layer.output.dense):
            dense.weight.normal_(0.0, dense.in_features**-0.5)
    cast(Any, model.bert.pooler).dense.weight.normal_(0.0, width**-0.5)
    for small in (model.bert.embeddings.position_embeddings, model.bert.embeddings.token_type_embeddings):
        small.weight.mul_(0.3)  # beside words of 0.02: equal words should be near wherever they stand


def _warn_of_unknown_words(data: Path) -> None:
    """From scratch, a model can learn the few words of the built-in world from its labels, not those of real text."""
    about = data / "dataset.json"
    if about.is_file() and not json.loads(about.read_text(encoding="utf-8"))["source"].startswith("world:"):
        LOGGER.warning(
            "a model from scratch knows none of the words of %s and will hardly beat BM25: start from a pretrained "
            "BERT, --init minilm, a folder or a hub id",
            data,
        )


# what of a checkpoint may be new: the head, and what pools before it
_NEW = {
    "bert": ("classifier.", "bert.pooler."),
    "roberta": ("classifier.",),
    "xlm-roberta": ("classifier.",),
    "modernbert": ("classifier.", "head."),
    "deberta-v2": ("classifier.", "pooler."),
}


def _from_checkpoint(settings: StudentModelSettings, init: str) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(init)
        family = config.model_type
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", *_OTHER_DROPOUTS):
            if hasattr(config, name):
                setattr(config, name, settings.dropout)
        config.num_labels = 1
        if family == "modernbert":
            config.classifier_pooling = "cls"
        opened: Any = AutoModelForSequenceClassification.from_pretrained(
            init, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as problem:
        raise InputError(f"{init}: cannot be opened as an encoder: {_line(problem)}") from problem
    model: PreTrainedModel = opened[0]
    # the head, and the pooler before it, may be new; an encoder with made-up layers would train and be worthless
    lost = sorted(key for key in opened[1]["missing_keys"] if not key.startswith(_NEW[family]))
    if lost:
        raise InputError(f"{init}: its weights lack {lost[0]} and {len(lost) - 1} more: not a whole encoder")
    if settings.init_layers:
        _keep_layers(model, settings.init_layers, init)
    if settings.init_inner:
        _keep_inner(model, settings.init_inner, init)
    if (Path(init) / CARD_NAME).is_file():
        card = ScoreCard.load(init)
        scale_head(model, 1 / card.score_spread, -card.score_mean / card.score_spread)
    return model


# ModernBERT's and DeBERTa's names
_OTHER_DROPOUTS = (
    "attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout", "pooler_dropout", "cls_dropout"
)  # fmt: skip


def _keep_layers(model: PreTrainedModel, numbers: list[int], init: str) -> None:
    """Leave only these layers of the encoder. InputError if it lacks one, or its layers differ by their number."""
    if model.config.model_type == "modernbert":
        # its layers read the whole text or a window of it by their number
        raise InputError(f"{init}: init_layers is not for ModernBERT, whose layers differ by their place")
    stack = cast(Any, model).base_model.encoder
    if max(numbers) >= len(stack.layer):
        raise InputError(f"{init}: init_layers {numbers}, but it has layers 0 to {len(stack.layer) - 1}")
    stack.layer = nn.ModuleList(stack.layer[i] for i in numbers)
    model.config.num_hidden_layers = len(numbers)


@torch.no_grad()
def _keep_inner(model: PreTrainedModel, count: int, init: str) -> None:
    """Leave so many inner neurons of each feed-forward, those whose weights in and out have the largest product of
    norms: what one adds to the layer's output is at most in proportion to it. InputError if there are fewer."""
    if model.config.model_type == "modernbert":
        raise InputError(f"{init}: init_inner is not for ModernBERT, whose inner neurons are gated in pairs")
    if count > model.config.intermediate_size:
        raise InputError(f"{init}: init_inner {count}, but its layers have {model.config.intermediate_size}")
    for layer in cast(Any, model).base_model.encoder.layer:
        before, after = layer.intermediate.dense, layer.output.dense
        norms = before.weight.norm(dim=1) * after.weight.norm(dim=0)
        kept = norms.topk(count).indices.sort().values
        before.weight, before.bias = nn.Parameter(before.weight[kept]), nn.Parameter(before.bias[kept])
        after.weight = nn.Parameter(after.weight[:, kept])
        before.out_features = after.in_features = count
    model.config.intermediate_size = count


@torch.no_grad()
def scale_head(model: PreTrainedModel, factor: float, offset: float) -> None:
    """Make every score `factor * score + offset`, exactly, by the weight and bias of the head's last layer alone."""
    head: Any = model.classifier
    last = getattr(head, "out_proj", head)  # RoBERTa's head has a layer before it
    last.weight.mul_(factor)
    last.bias.mul_(factor).add_(offset)


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300]
