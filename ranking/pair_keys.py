"""Keys of (query, title, summary) pairs by their text: one text has one key in every file, whatever its ids are."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from ranking.text import normalise

KEY_BYTES = 16  # at 10^9 pairs the chance of any two texts sharing a key is below 10^-20
SEPARATOR = "\x1f"  # normalise() leaves no control character in a field


def pair_keys(
    queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """(high, low) halves of each pair's 128-bit key, uint64 [n] each; the three sequences have one entry per pair.

    A key is BLAKE2b of the normalised fields, so a change that the teacher cannot see (a line break, a full-width
    letter) keeps the key, and every other change of a document makes another one.
    """
    clean = [{text: normalise(text) for text in dict.fromkeys(column)} for column in (queries, titles, summaries)]
    digests = bytearray()
    for query, title, summary in zip(queries, titles, summaries):
        text = SEPARATOR.join((clean[0][query], clean[1][title], clean[2][summary]))
        digests += blake2b(text.encode("utf-8", "replace"), digest_size=KEY_BYTES).digest()
    halves = np.frombuffer(bytes(digests), ">u8").reshape(-1, 2).astype(np.uint64)
    return halves[:, 0], halves[:, 1]
