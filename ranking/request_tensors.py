"""The tensors of a ranking request, as every student and baseline takes and gives them; NumPy only, no network.

    query BYTES [1], title BYTES [n], summary BYTES [n], optional prior FP32 [n]
    or token_ids INT32 [tokens], token_counts INT32 [1 + 2n], vocabulary BYTES [1] in place of the text
    ->  score FP32 [n], optional probability FP32 [n]

A model that reads long documents in chunks also takes an optional max_chunks INT32 [1], and gives chunks INT32 [n].

Whoever sends a request (rerank client, A/B router, load test) makes its own protocol's objects from these arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

SCORE = "score"  # name of the output tensor
PROBABILITY = "probability"  # name of the output of a model that has a calibration
CHUNKS = "chunks"  # name of the output that tells how many chunks were read of each document
MAX_CHUNKS = "max_chunks"  # name of the input that asks for fewer
MAX_PRIOR = 1e30  # well within float32


def request_tensors(
    query: str,
    titles: Sequence[str],
    summaries: Sequence[str],
    priors: Sequence[float | None] = (),
    max_chunks: int | None = None,
) -> dict[str, NDArray[Any]]:
    """The inputs by name: query [1], title [n], summary [n] as object arrays of UTF-8 bytes, prior float32 [n].

    What is not valid Unicode (a lone surrogate) is replaced by "?". priors: the first stage's scores, None for a
    document without one; the tensor is left out where no document has one, so that models without that input go on
    answering. max_chunks: chunks of a document that are read at most, for models that read several; int32 [1].
    ValueError if titles, summaries and priors differ in number, a prior is not finite in float32, or max_chunks is
    below 1.
    """
    if len(titles) != len(summaries):
        raise ValueError(f"{len(titles)} titles and {len(summaries)} summaries: one of each per document")
    tensors: dict[str, NDArray[Any]] = {
        "query": _as_bytes([query]), "title": _as_bytes(titles), "summary": _as_bytes(summaries)
    }  # fmt: skip
    if any(prior is not None for prior in priors):
        if len(priors) != len(titles):
            raise ValueError(f"{len(titles)} titles and {len(priors)} priors: one of each per document")
        for prior in priors:
            if prior is not None and not abs(prior) <= MAX_PRIOR:
                raise ValueError(f"prior {prior}: a finite number of at most {MAX_PRIOR:g} is needed")
        tensors["prior"] = np.array([np.nan if prior is None else prior for prior in priors], np.float32)
    if max_chunks is not None:
        if not 1 <= max_chunks < 1 << 31:
            raise ValueError(f"max_chunks {max_chunks}: a number of chunks from 1 on is needed")
        tensors[MAX_CHUNKS] = np.array([max_chunks], np.int32)
    return tensors


def token_tensors(
    query: ArrayLike, titles: Sequence[ArrayLike], summaries: Sequence[ArrayLike], vocabulary: str
) -> dict[str, NDArray[Any]]:
    """The inputs of a caller who tokenises, as StudentFormat.tokenise gives the ids of one query and n documents.

    query, titles, summaries: token ids of each field, int [tokens of it]; vocabulary: ranking.card.fingerprint of the
    tokenizer.json that made them. Returns token_ids int32 [tokens], token_counts int32 [1 + 2n], vocabulary [1].
    ValueError if titles and summaries differ in number.
    """
    if len(titles) != len(summaries):
        raise ValueError(f"{len(titles)} titles and {len(summaries)} summaries: one of each per document")
    fields = [query, *(field for document in zip(titles, summaries) for field in document)]
    ids = [np.asarray(field, np.int32) for field in fields]
    counts = np.array([len(field) for field in ids], np.int32)
    return {"token_ids": np.concatenate(ids), "token_counts": counts, "vocabulary": _as_bytes([vocabulary])}


def documents_of(tensors: Mapping[str, NDArray[Any]]) -> int:
    """How many documents the inputs of a request name, sent as text or as token ids."""
    return len(tensors["title"]) if "title" in tensors else (len(tensors["token_counts"]) - 1) // 2


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


def read_probabilities(values: NDArray | None, documents: int) -> NDArray[np.float32] | None:
    """A server's `probability` tensor, checked; None if the model gives none. ValueError says what is wrong."""
    if values is None:
        return None
    if values.dtype.kind != "f" or values.shape != (documents,):
        raise ValueError(f"{values.dtype} probabilities of shape {list(values.shape)} for {documents} documents")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("a probability is NaN or outside 0 to 1")
    return values


def descending(scores: NDArray[np.float32]) -> NDArray[np.intp]:
    """Document numbers by falling score, int [n]; documents of equal score keep their order."""
    return np.argsort(-scores, kind="stable")
