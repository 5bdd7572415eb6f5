"""The tensors of a ranking request, as every student and baseline takes and gives them; NumPy only, no network.

    query BYTES [1], title BYTES [n], summary BYTES [n]  ->  score FP32 [n]

Whoever sends a request (rerank client, A/B router, load test) makes its own protocol's objects from these arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SCORE = "score"  # name of the output tensor


def request_tensors(query: str, titles: Sequence[str], summaries: Sequence[str]) -> dict[str, NDArray[np.object_]]:
    """The inputs by name, UTF-8 bytes as object arrays: query [1], title [n], summary [n].

    What is not valid Unicode (a lone surrogate) is replaced by "?". ValueError if titles and summaries differ in
    number.
    """
    if len(titles) != len(summaries):
        raise ValueError(f"{len(titles)} titles and {len(summaries)} summaries: one of each per document")
    return {"query": _as_bytes([query]), "title": _as_bytes(titles), "summary": _as_bytes(summaries)}


def _as_bytes(texts: Sequence[str]) -> NDArray[np.object_]:
    values = np.empty(len(texts), dtype=np.object_)
    values[:] = [text.encode("utf-8", "replace") for text in texts]
    return values


def read_scores(values: NDArray | None, documents: int) -> NDArray[np.float32]:
    """A server's `score` tensor (None if the answer has none), checked: floating point, one per document, all finite.

    values: as the server gave them; documents: how many were sent. ValueError says what is wrong.
    """
    if values is None:
        raise ValueError(f"the answer has no tensor `{SCORE}`")
    if values.dtype.kind != "f" or values.shape != (documents,):
        raise ValueError(f"{values.dtype} scores of shape {list(values.shape)} for {documents} documents")
    if not np.isfinite(values).all():
        raise ValueError("a score is NaN or infinite")
    return values


def descending(scores: NDArray[np.float32]) -> NDArray[np.intp]:
    """Document numbers by falling score, int [n]; documents of equal score keep their order."""
    return np.argsort(-scores, kind="stable")
