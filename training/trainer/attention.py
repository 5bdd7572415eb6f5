"""Which implementation of attention a model trains with."""

from __future__ import annotations

from typing import Any

import torch

LONGEST = 256  # tokens; beyond it the matrix of plain attention, tokens x tokens a head, costs too much memory


def fastest_attention(model: Any, longest: int) -> None:
    """On a CPU, train texts of up to LONGEST tokens with plain attention: the fused one's backward is slow there.

    model: a Hugging Face model; longest: tokens of the longest text. Scores stay the same but for rounding.
    """
    if not torch.accelerator.is_available() and longest <= LONGEST:
        model.set_attn_implementation("eager")
