"""The decoder that becomes a teacher: from a Hugging Face folder or hub id, or from scratch by size.

From scratch: a Llama of a named size and a byte-level BPE vocabulary trained on the dataset's own teacher texts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.object_store import hand_over
from ranking.pretrained import refuse_missing_folder
from ranking.text import TeacherFormat, load_tokenizer

LOGGER = logging.getLogger(__name__)

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
LONGEST_FIELD = 4096  # tokens; longer fields teach the vocabulary nothing more


@dataclass(frozen=True)
class Shape:
    """layers, width, heads, key/value heads and inner width of a Llama decoder."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int


# named after their parameters without embeddings, rounded
SIZES = {
    "100K": Shape(2, 64, 2, 1, 176),
    "1M": Shape(3, 160, 5, 5, 448),
    "3M": Shape(4, 256, 2, 2, 704),
    "10M": Shape(6, 384, 6, 6, 1024),
    "30M": Shape(8, 576, 9, 9, 1536),
    "100M": Shape(12, 832, 13, 13, 2240),
}


def build_decoder(size: str, tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> LlamaForCausalLM:
    """A Llama with random weights, embeddings tied. InputError if the size has no name here."""
    if size not in SIZES:
        raise InputError(f"size {size!r}: one of {', '.join(SIZES)} is needed")
    shape = SIZES[size]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.inner,
        max_position_embeddings=max(256, max_tokens),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train_bpe(rows: Iterable[tuple[Sequence[str], Sequence[str], Sequence[str]]], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of `vocabulary` tokens, trained on the teacher texts of (queries, titles, summaries).

    Any text can be spelled with it. Pad, begin and end are three different special tokens: a pad that is the
    end-of-sequence token moves the pooled position in other software.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, normalized=False, special=True) for token in (PAD, BOS, EOS)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # one token per byte until the merges are learned; enough to lay texts out exactly as training will
    tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=specials))
    text_format = TeacherFormat(tokenizer, EOS, FieldLimits(*[LONGEST_FIELD] * 3))

    def texts() -> Iterator[list[str]]:
        for queries, titles, summaries in rows:
            yield [text.text.removesuffix(EOS) for text in text_format.texts(queries, titles, summaries)]

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer, trained.decoder = tokenizer.pre_tokenizer, tokenizer.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    trained.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def open_tokenizer(name: str | Path) -> Any:
    """The fast tokenizer of a checkpoint, with a padding token that is not its end-of-sequence token.

    It has none where no other special token could be one: see padding_id. InputError: no tokenizer is there, or a
    training that has not finished.
    """
    refuse_missing_folder(name)
    return read_tokenizer(name)


def read_tokenizer(name: str | Path) -> Any:
    """open_tokenizer of a folder that a training may be writing, for that training itself."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as problem:
        raise InputError(f"{name}: no tokenizer: {' '.join(str(problem).split())[:300]}") from problem
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        raise InputError(f"{name}: a fast tokenizer with an end-of-sequence token is needed")
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # no new token: the embeddings keep their size. Any id but eos will do, since pads stand after eos and are
        # masked. But it must be special already: whatever opens the tokenizer later makes its padding token special,
        # and an ordinary one ("!" is the first of Qwen's) would from then on be split off in every text
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        known = [token for token in (tokenizer.unk_token, tokenizer.bos_token, *special) if token in special]
        tokenizer.pad_token = next((token for token in known if token != tokenizer.eos_token), None)
        LOGGER.info("%s: padding with %r, not with its end-of-sequence token", name, tokenizer.pad_token)
    return tokenizer


def padding_id(tokenizer: Any) -> int:
    """The token id that fills rows up: the padding token's, or, without one, any but the end-of-sequence token's."""
    return int(tokenizer.eos_token_id == 0) if tokenizer.pad_token is None else tokenizer.pad_token_id


def open_decoder(name: str | Path) -> Any:
    """The causal language model of a folder or hub id, in float32. InputError if it is none, or weights are missing."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
    except (OSError, ValueError) as problem:
        raise InputError(f"{name}: cannot be opened as a decoder: {' '.join(str(problem).split())[:300]}") from problem
    model, report = loaded
    if report["missing_keys"]:
        raise InputError(f"{name}: not a language model, its weights lack {', '.join(sorted(report['missing_keys']))}")
    return model


def save_tokenizer(tokenizer: Any, folder: Path, limits: FieldLimits, max_positions: int | None) -> TeacherFormat:
    """Write the tokenizer into a checkpoint folder and return the teacher format read back from there.

    InputError if the Hugging Face tokenizer and tokenizer.json (which ranking/text.py and serving read) disagree, or if
    a pair of full fields is longer than the model's positions.
    """
    tokenizer.save_pretrained(folder)
    text_format = TeacherFormat(load_tokenizer(folder), tokenizer.eos_token, limits)
    probe = text_format.texts(["café 北京", "</s> x"], ["A <s> title", ""], ["sum\nmary", "🙂 y"])
    for text in probe:
        ids = text_format.tokenizer.encode(text.text).ids
        if AutoTokenizer.from_pretrained(folder)(text.text)["input_ids"] != ids or ids.count(text_format.eos_id) != 1:
            raise InputError(f"{folder}: the tokenizer class and tokenizer.json tokenise {text.text!r} differently")
    if max_positions is not None and text_format.max_tokens() > max_positions:
        raise InputError(
            f"a pair can have {text_format.max_tokens()} tokens, the model has {max_positions} positions; "
            "lower the field limits"
        )
    return text_format


def share_tokenizer(
    tokenizer: Any, folder: Path, limits: FieldLimits, max_positions: int | None, processes: PartialState
) -> TeacherFormat:
    """save_tokenizer by the first of a training's processes; all of them return the format that it wrote."""
    processes.wait_for_everyone()  # one that still opens a tokenizer there must not see half of a new one
    if processes.is_main_process:
        save_tokenizer(tokenizer, folder, limits, max_positions)
    hand_over(folder, processes.is_main_process, processes.wait_for_everyone)
    return TeacherFormat(load_tokenizer(folder), tokenizer.eos_token, limits)
