"""Long summaries: which chunks of one are read, and the one score that is made of the chunks' scores.

A summary beyond the model's limit is read as overlapping chunks, each with the query and the title before it, and the
document's score is the highest or the mean of theirs (MaxP and its like: Dai and Callan, SIGIR 2019, arXiv 1905.09217).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Pooling = Literal["max", "mean"]
MAX_CHUNKS = 256  # of one document: beyond that a number is a slip of the hand


@dataclass(frozen=True)
class Chunking:
    """How a summary longer than a pair's limit (max_summary_tokens) is read. ValueError for values that mean nothing.

    Args:
        most: so many chunks of a document are read, from its beginning on; 1 reads the first max_summary_tokens alone
        overlap: tokens of a chunk that the next one begins with again, so that no sentence is cut in both
        pooling: the document's score: its best chunk's, or the mean of all chunks'
    """

    most: int = 1
    overlap: int = 0
    pooling: Pooling = "max"

    def __post_init__(self):
        for name, least, highest in (("most", 1, MAX_CHUNKS), ("overlap", 0, 1 << 20)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= highest:
                raise ValueError(f"chunking: {name} is {value!r}: a whole number from {least} to {highest} is needed")
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"chunking: pooling is {self.pooling!r}: one of {', '.join(get_args(Pooling))} is needed")

    def stride(self, chunk_tokens: int) -> int:
        """Tokens from the start of a chunk to the start of the next. ValueError if chunks would not advance."""
        if self.overlap >= chunk_tokens:
            raise ValueError(
                f"chunking: overlap is {self.overlap}, a chunk (max_summary_tokens) has {chunk_tokens} tokens: the "
                "overlap must be smaller"
            )
        return chunk_tokens - self.overlap

    def summary_tokens(self, chunk_tokens: int) -> int:
        """Tokens of a summary that are read at all, over all its chunks."""
        return chunk_tokens + (self.most - 1) * self.stride(chunk_tokens)

    def spans(self, tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
        """(start, end) of each chunk of a summary of so many tokens, at least one; the last one ends where it does.

        >>> Chunking(most=3, overlap=2).spans(tokens=11, chunk_tokens=6)
        [(0, 6), (4, 10), (8, 11)]
        """
        stride, spans = self.stride(chunk_tokens), [(0, min(chunk_tokens, tokens))]
        while spans[-1][1] < tokens and len(spans) < self.most:
            start = spans[-1][0] + stride
            spans.append((start, min(start + chunk_tokens, tokens)))
        return spans


def pool(scores: NDArray[np.float32], starts: NDArray[np.int64], pooling: Pooling) -> NDArray[np.float32]:
    """The documents' scores, float32 [n], of their chunks' scores, float32 [m].

    starts: int64 [n + 1]; document d has the chunks starts[d]..starts[d + 1], at least one.
    """
    if len(starts) - 1 == len(scores):
        return scores  # a chunk each
    if pooling == "max":
        return np.maximum.reduceat(scores, starts[:-1])
    return (np.add.reduceat(scores, starts[:-1], dtype=np.float64) / np.diff(starts)).astype(np.float32)
