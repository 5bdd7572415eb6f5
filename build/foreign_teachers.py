"""Turn a reranker that others trained into a teacher: its score becomes the one-row head that is served.

A reranker that answers "yes" or "no" (ranking/reranker_prompts.py) scores by logit(yes) - logit(no), two dot products
with one hidden state; their difference is one dot product with the difference of two rows of the language-model head.
So the row head[yes] - head[no] is all that the score needs, and the stock vLLM backend serves it like any teacher of
ours. A reranker published as a sequence classifier on the same prompt brings that row as its head.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from build.fold_teacher import (
    LOGIT_CHANGES,
    TOKENIZER_FILES,
    Dtype,
    FoldedTeacher,
    load_classifier,
    score_row_of,
    write_folded,
)
from ranking.card import ScoreCard, fingerprint
from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.reranker_prompts import PROMPTS, PromptFormat, split_at_borders
from ranking.text import FORMAT_VERSION, load_tokenizer


def fold_reranker(
    folder: Path, out: Path, prompt: str, limits: FieldLimits, instruction: str = "", dtype: Dtype = "auto"
) -> FoldedTeacher:
    """Write a foreign reranker's folded model, tokenizer and card to `out`.

    folder: its Hugging Face folder, a causal language model or a sequence classifier; prompt: a name in PROMPTS.
    InputError if the folder is neither, or if its score is no single linear read-out of the last hidden state.
    """
    if prompt not in PROMPTS:
        raise InputError(f"prompt {prompt!r}: known are {', '.join(sorted(PROMPTS))}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(f"{folder}: no readable config.json; a downloaded model's folder is needed") from problem
    text_format = PromptFormat(split_at_borders(load_tokenizer(folder)), PROMPTS[prompt], limits, instruction)
    kind = (config.get("architectures") or ["nothing"])[0]
    if kind.endswith("ForSequenceClassification"):
        model = load_classifier(folder, dtype)
        row = score_row_of(model, folder)
    elif kind.endswith("ForCausalLM"):
        model = load_causal(folder, dtype)
        row = answer_row(model, *text_format.answer_ids())
    else:
        raise InputError(f"{folder}: architecture {kind}; a ...ForCausalLM or ...ForSequenceClassification is needed")
    out.mkdir(parents=True, exist_ok=True)
    for pattern in TOKENIZER_FILES:
        for file in folder.glob(pattern):
            shutil.copy2(file, out / file.name)
    text_format.tokenizer.save(str(out / "tokenizer.json"))  # the one that splits at the borders of the prompt's pieces
    card = ScoreCard(
        role="teacher",
        text_format=prompt,
        format_version=FORMAT_VERSION,
        limits=limits,
        head="linear",
        pooling="last_token",
        instruction=instruction,
        vocabulary=fingerprint(out / "tokenizer.json"),
        base_model=folder.name,
    )
    return write_folded(model, row, text_format, card, out)


def load_causal(folder: Path, dtype: Dtype) -> Any:
    """The causal language model of a folder, on the CPU. InputError if a weight is missing or a logit is bent.

    A logit that is scaled or capped (Gemma 2's soft cap) is no linear read-out; the difference of two would be another
    score.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto" if dtype == "auto" else getattr(torch, dtype), output_loading_info=True
        )
        model, report = loaded
    except (OSError, ValueError) as problem:
        raise InputError(f"{folder}: cannot be opened as a language model: {problem}") from problem
    if report["missing_keys"]:
        raise InputError(f"{folder}: weights without a value: {', '.join(sorted(report['missing_keys'])[:3])}")
    for name, neutral in LOGIT_CHANGES.items():
        if getattr(model.config, name, neutral) != neutral:
            raise InputError(f"{folder}: {name} is {getattr(model.config, name)}: its score is no linear read-out")
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise InputError(f"{folder}: no language-model head without bias; its score cannot be folded")
    return model


def answer_row(model: Any, yes: int, no: int | None) -> torch.Tensor:
    """head[yes] - head[no], or head[yes] alone: [hidden], subtracted in float32 and rounded once."""
    head = model.get_output_embeddings().weight.detach()
    row = head[yes].float() if no is None else head[yes].float() - head[no].float()
    return row.to(head.dtype)
