"""The three text tensors of a ranker's request, read and checked: what is wrong is said in a line for the caller."""

from __future__ import annotations

import numpy as np
import triton_python_backend_utils as pb_utils

from ranking.limits import MAX_FIELD_BYTES
from ranking.visible import is_visible


class BadRequest(Exception):
    """What is wrong with one caller's request, in a line for that caller."""


def read_fields(request, max_documents: int) -> tuple[list[str], list[str], list[str]]:
    """Queries (one repeated), titles, summaries, an entry per document. BadRequest names the tensor and document."""
    query, title, summary = (
        pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("query", "title", "summary")
    )
    count = len(title)
    if len(summary) != count:
        raise BadRequest(f"title has {count} documents, summary has {len(summary)}: one of each per document is needed")
    check_documents(count, max_documents)
    asked = decode("query", query)[0]
    if not is_visible(asked):
        raise BadRequest("query is blank: it has no visible character")
    return [asked] * count, decode("title", title), decode("summary", summary)


def check_documents(count: int, max_documents: int) -> None:
    """BadRequest unless a request may have so many documents."""
    if not count:
        raise BadRequest("no documents: the request has a query alone")
    if count > max_documents:
        raise BadRequest(f"{count} documents in one request; at most {max_documents} are served, send several requests")


def decode(name: str, values: np.ndarray) -> list[str]:
    """BYTES elements as text. BadRequest if one is not UTF-8 or too long to be a field."""
    texts = []
    for index, value in enumerate(values):
        if len(value) > MAX_FIELD_BYTES:
            raise BadRequest(f"{name}[{index}] has {len(value)} bytes; at most {MAX_FIELD_BYTES} are read")
        try:
            texts.append(value.decode("utf-8"))
        except UnicodeDecodeError as problem:
            raise BadRequest(f"{name}[{index}] is not valid UTF-8: {problem.reason} at byte {problem.start}") from None
    return texts
