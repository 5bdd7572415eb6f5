"""The three input tensors of a student's encoder: their names, and encoded pairs padded into them.

Building, gating and serving all fill an encoder through this file; a published version carries a copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ranking.text import EncodedPair

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "logits"

Feed = dict[str, NDArray[np.int32]]  # the three inputs, int32 [batch, length]


def pad(pairs: Sequence[EncodedPair], length: int, pad_id: int) -> Feed:
    """A batch of pairs as the three inputs, each int32 [len(pairs), length]; no pair may be longer than `length`."""
    feed = {name: np.zeros((len(pairs), length), np.int32) for name in INPUTS}
    feed["input_ids"][:] = pad_id
    for row, pair in enumerate(pairs):
        end = len(pair.ids)
        feed["input_ids"][row, :end] = pair.ids
        feed["attention_mask"][row, :end] = 1
        feed["token_type_ids"][row, pair.document_start : end] = 1
    return feed
