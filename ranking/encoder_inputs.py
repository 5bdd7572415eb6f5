"""The input tensors of a student's encoder, padded or packed: their names, and encoded pairs filled into them.

Building, gating and serving all fill an encoder through this file; a published version carries a copy of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ranking.text import EncodedPair, EncodedPairs

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # padded: each int32 [batch, length]; the last is BERT's
PACKED_INPUTS = ("input_ids", "token_type_ids", "position_ids", "lengths")  # int32 [tokens], and lengths int32 [batch]
OUTPUT = "logits"

Feed = dict[str, NDArray[np.int32]]  # the inputs of one layout by name


def inputs_of(token_types: bool) -> tuple[str, ...]:
    """The padded inputs that an encoder takes; token_types: whether it has token types."""
    return INPUTS if token_types else INPUTS[:2]


def chosen(feed: Feed, names: Iterable[str]) -> Feed:
    """The inputs of these names, of a feed that may hold more."""
    return {name: feed[name] for name in names}


def pad(pairs: EncodedPairs | Sequence[EncodedPair], length: int, pad_id: int, rows: int | None = None) -> Feed:
    """A batch of pairs as the three inputs, each int32 [rows, length]; no pair may be longer than `length`.

    rows: at least len(pairs), which is the default; the rows behind the pairs are padding alone.
    """
    if not isinstance(pairs, EncodedPairs):
        pairs = EncodedPairs.of(pairs)
    feed = {name: np.zeros((len(pairs) if rows is None else rows, length), np.int32) for name in INPUTS}
    feed["input_ids"][:] = pad_id
    places = np.arange(length)
    inside = places < pairs.lengths[:, None]
    feed["input_ids"][: len(pairs)][inside] = pairs.ids
    feed["attention_mask"][: len(pairs)] = inside
    feed["token_type_ids"][: len(pairs)] = inside & (places >= pairs.document_starts[:, None])
    return feed


def pack(pairs: EncodedPairs | Sequence[EncodedPair]) -> Feed:
    """The tokens of all pairs one after the other, without padding, and how many belong to each pair.

    input_ids, token_type_ids, position_ids: int32 [tokens], positions counting from 0 in every pair; lengths: int32
    [len(pairs)].
    """
    if not isinstance(pairs, EncodedPairs):
        pairs = EncodedPairs.of(pairs)
    begins = np.cumsum(pairs.lengths) - pairs.lengths
    positions = np.arange(len(pairs.ids)) - np.repeat(begins, pairs.lengths)
    return {
        "input_ids": pairs.ids,
        "token_type_ids": (positions >= np.repeat(pairs.document_starts, pairs.lengths)).astype(np.int32),
        "position_ids": positions.astype(np.int32),
        "lengths": pairs.lengths.astype(np.int32),
    }


def without_padding(feed: Feed) -> Feed:
    """A padded batch in the packed layout: the same tokens without what the mask leaves out."""
    inside = feed["attention_mask"] > 0
    positions = np.broadcast_to(np.arange(inside.shape[1], dtype=np.int32), inside.shape)
    return {
        "input_ids": feed["input_ids"][inside],
        "token_type_ids": feed["token_type_ids"][inside],
        "position_ids": positions[inside],
        "lengths": inside.sum(1, dtype=np.int32),
    }
