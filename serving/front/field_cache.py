"""Token ids of fields that came lately: popular documents are tokenised once, not in every list that holds them."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

LONGEST_KEPT = 8192  # characters; a longer field is tokenised each time, so that the cache's size has a bound
ENTRY_BYTES = 300  # of one entry besides its text and token ids: dictionary, key, headers of the objects


class FieldCache:
    """The least recently used of `capacity` fields goes first; 0 keeps none. hits, misses: fields since the start.

    tokenise: (texts, token limit) -> ids of each text, cut to the limit. A text is kept for each limit it came with.
    bytes: memory of what is kept now.
    """

    def __init__(self, tokenise: Callable[[Sequence[str], int], list[list[int]]], capacity: int):
        self._tokenise, self._capacity = tokenise, capacity
        self._ids: OrderedDict[tuple[int, str], NDArray[np.int32]] = OrderedDict()
        self.hits = self.misses = self.bytes = 0

    def __len__(self) -> int:
        return len(self._ids)

    def __call__(self, texts: Sequence[str], limit: int) -> list[NDArray[np.int32]]:
        """Ids of each text, as `tokenise` gives them, int32; they are the cache's own and not to be written to."""
        found: dict[str, NDArray[np.int32]] = {}
        new: list[str] = []
        for text in dict.fromkeys(texts):
            ids = self._ids.get((limit, text))
            if ids is None:
                new.append(text)
            else:
                self._ids.move_to_end((limit, text))
                found[text] = ids
        self.hits += len(found)
        self.misses += len(new)
        for text, tokens in zip(new, self._tokenise(new, limit) if new else ()):
            found[text] = np.asarray(tokens, np.int32)
            if self._capacity and len(text) <= LONGEST_KEPT:
                self._ids[limit, text] = found[text]
                self.bytes += entry_bytes(text, found[text])
        while len(self._ids) > self._capacity:
            (_, text), ids = self._ids.popitem(last=False)
            self.bytes -= entry_bytes(text, ids)
        return [found[text] for text in texts]


def entry_bytes(text: str, ids: NDArray[np.int32]) -> int:
    """Memory of one entry."""
    return sys.getsizeof(text) + ids.nbytes + ENTRY_BYTES
