"""Writes judgments and rankings in the column forms of trec_eval, which other tools of the field read.

    qrels    query_id 0 doc_id grade
    run      query_id Q0 doc_id place score tag

Places count from 1; equal scores keep document order. trec_eval sorts by score itself and orders equal scores by
document id, so that its figures can differ from ours where a system ties.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ranking.errors import InputError
from ranking.files import replacing
from training.evaluation.comparison import Judgments

_SPACE = re.compile(r"\s")


def write_qrels(path: Path, judgments: Judgments) -> None:
    """Write the judgments in their order. InputError for an id that the form cannot hold."""
    query_ids, doc_ids = trec_ids(path, judgments)
    _write(path, (f"{q} 0 {d} {grade}" for q, d, grade in zip(query_ids, doc_ids, judgments.grades.tolist())))


def write_run(path: Path, judgments: Judgments, scores: NDArray[np.float32], tag: str) -> None:
    """Write one system's ranking of the judged documents, queries in their order, documents by falling score.

    scores: float32 [n], written so that they read back unchanged; tag: the system's name, white space in it becomes
    `_`. InputError for an id that the form cannot hold.
    """
    query_ids, doc_ids = trec_ids(path, judgments)
    tag = _SPACE.sub("_", tag)

    def lines() -> Iterator[str]:
        query, place = -1, 0
        for row in np.lexsort((-scores, judgments.groups)):
            place = place + 1 if judgments.groups[row] == query else 1
            query = judgments.groups[row]
            yield f"{query_ids[row]} Q0 {doc_ids[row]} {place} {scores[row]:.9g} {tag}"

    _write(path, lines())


def trec_ids(path: Path, judgments: Judgments) -> tuple[list[str], list[str]]:
    """Query and document ids of the rows. InputError for one that the form cannot hold; path: what is to be written."""
    columns = []
    for name in ("query_id", "doc_id"):
        values = judgments.table.column(name).to_pylist()
        odd = next((value for value in values if not value or _SPACE.search(value)), None)
        if odd is not None:
            raise InputError(
                f"{path}: {name} {odd!r} is empty or holds white space, which separates TREC's columns: give ids "
                "without it, or leave the TREC files out"
            )
        columns.append(values)
    return columns[0], columns[1]


def _write(path: Path, lines: Iterable[str]) -> None:
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)
