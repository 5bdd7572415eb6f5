"""Which implementation of attention a model trains with, and which it scores with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

LONGEST = 256  # tokens; beyond it the matrix of plain attention, tokens x tokens a head, costs too much memory
PLAIN, FUSED = "eager", "sdpa"  # as Hugging Face names them


def fastest_attention(model: Any, longest: int) -> None:
    """On a CPU, train texts of up to LONGEST tokens with plain attention: the fused one's backward is slow there.

    model: a Hugging Face model; longest: tokens of the longest text. Scores stay the same but for rounding.
    """
    exact_attention(model)
    if not torch.accelerator.is_available() and longest <= LONGEST:
        model.set_attn_implementation(PLAIN)


def exact_attention(model: Any) -> None:
    """Plain attention, on any device, for a model that the fused one would compute otherwise."""
    if not _fused_is_exact(model):
        model.set_attn_implementation(PLAIN)


@contextmanager
def scoring_attention(model: Any) -> Iterator[None]:
    """While scoring, the fused attention in place of fastest_attention's choice: its forward is the faster one."""
    plain = model.config._attn_implementation == PLAIN and _fused_is_exact(model)
    if plain:
        model.set_attn_implementation(FUSED)
    try:
        yield
    finally:
        if plain:
            model.set_attn_implementation(PLAIN)


def _fused_is_exact(model: Any) -> bool:
    """Whether the fused attention gives the model's own scores.

    It passes over Gemma 2's soft cap on attention, which vLLM applies; some families (gpt-oss) have no fused attention.
    """
    return model._supports_sdpa and getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is None
