"""Token ids of fields that came lately: popular documents are tokenised once, not in every list that holds them."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

LONGEST_KEPT = 8192  # characters; a longer field is tokenised each time, so that the cache's size has a bound


class FieldCache:
    """The least recently used of `capacity` fields goes first; 0 keeps none. hits, misses: fields since the start.

    tokenise: (texts, token limit) -> ids of each text, cut to the limit. A text is kept for each limit it came with.
    """

    def __init__(self, tokenise: Callable[[Sequence[str], int], list[list[int]]], capacity: int):
        self._tokenise, self._capacity = tokenise, capacity
        self._ids: OrderedDict[tuple[int, str], array] = OrderedDict()
        self.hits = self.misses = 0

    def __call__(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        """Ids of each text, as `tokenise` gives them."""
        found: dict[str, list[int]] = {}
        for text in dict.fromkeys(texts):
            if (limit, text) in self._ids:
                self._ids.move_to_end((limit, text))
                found[text] = self._ids[limit, text].tolist()
        new = [text for text in dict.fromkeys(texts) if text not in found]
        self.hits += len(found)
        self.misses += len(new)
        for text, ids in zip(new, self._tokenise(new, limit) if new else ()):
            found[text] = ids
            if self._capacity and len(text) <= LONGEST_KEPT:
                self._ids[limit, text] = array("i", ids)
        while len(self._ids) > self._capacity:
            self._ids.popitem(last=False)
        return [found[text] for text in texts]
