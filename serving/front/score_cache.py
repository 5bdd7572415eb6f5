"""Scores that were computed lately, by query and document content: exact, so a hit is the score that a miss would give.

A version's front process keeps its own, so another version never meets it. Whether a pair's score depends on what it is
encoded together with is a matter of the engine: build_student.py publishes a version with this cache only if no bit of
any score moved over all shapes of call that the front makes (build/batch_invariance.py). Since a server may have
another processor than the build had, every AUDIT_EVERY-th lookup with a hit is computed all the same and compared.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

ENTRY_BYTES = 400  # of one entry: key, score, time, and their place in the dictionary, spare places included
AUDIT_EVERY = 200


class ScoreCache:
    """The least recently used score goes first; none is given that is older than max_age_seconds.

    size_bytes: memory at most. hits, misses: documents since the start; audits: lookups that were computed although
    they were hits; moved: audited scores that differed. Once one has, nothing is kept or found any more.
    """

    def __init__(self, size_bytes: int, max_age_seconds: float, clock: Callable[[], float] = time.monotonic):
        self._capacity, self._max_age, self._clock = size_bytes // ENTRY_BYTES, max_age_seconds, clock
        # key -> score, chunks that it was made of, when it was computed
        self._scores: OrderedDict[bytes, tuple[float, int, float]] = OrderedDict()
        self._until_audit = AUDIT_EVERY
        self.hits = self.misses = self.audits = self.moved = 0

    def __len__(self) -> int:
        return len(self._scores)

    @property
    def used_bytes(self) -> int:
        """Memory of what is kept now."""
        return len(self._scores) * ENTRY_BYTES

    def find(self, keys: Sequence[bytes]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """The score of each key, float32 [n], NaN where there is none; the chunks that it was made of, int32 [n]."""
        oldest = self._clock() - self._max_age
        found, chunks = np.full(len(keys), np.nan, np.float32), np.zeros(len(keys), np.int32)
        for row, key in enumerate(keys):
            entry = self._scores.get(key)
            if entry is None:
                continue
            if entry[2] < oldest:
                del self._scores[key]
                continue
            self._scores.move_to_end(key)
            found[row], chunks[row] = entry[:2]
        hits = int(np.count_nonzero(~np.isnan(found)))
        self.hits += hits
        self.misses += len(keys) - hits
        return found, chunks

    def keep(self, keys: Sequence[bytes], scores: NDArray[np.float32], chunks: NDArray[np.int32]) -> None:
        """Remember the scores, float32 [n], and chunks of these keys; a score that is not finite is not kept."""
        if self.moved:
            return
        now = self._clock()
        for key, score, count in zip(keys, scores.tolist(), chunks.tolist()):
            if np.isfinite(score):
                self._scores[key] = (score, count, now)
                self._scores.move_to_end(key)
        while len(self._scores) > self._capacity:
            self._scores.popitem(last=False)

    def is_audit_due(self) -> bool:
        """Whether the lookup that was just made is to be computed all the same; asked once for each with a hit."""
        self._until_audit -= 1
        if self._until_audit > 0:
            return False
        self._until_audit = AUDIT_EVERY
        self.audits += 1
        return True

    def compare(self, found: NDArray[np.float32], computed: NDArray[np.float32]) -> bool:
        """Whether every found score, float32 [n] with NaN where there was none, is the computed one to the bit."""
        moved = int(np.count_nonzero(~np.isnan(found) & (found.view(np.int32) != computed.view(np.int32))))
        if moved:
            self.moved += moved
            self._scores.clear()
        return not moved


def content_keys(query: bytes, documents: Sequence[tuple[bytes, bytes]], kind: bytes) -> list[bytes]:
    """A key of 128 bits for each (title, summary) under the query.

    kind: what the bytes are, text or token ids, and how many chunks are read of them; at most 16 bytes.
    """
    begun = hashlib.blake2b(len(query).to_bytes(8, "little") + query, digest_size=16, person=kind)
    keys = []
    for title, summary in documents:
        digest = begun.copy()
        digest.update(len(title).to_bytes(8, "little") + title + summary)
        keys.append(digest.digest())
    return keys
