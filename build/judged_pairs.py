"""The judged queries that a build is gated on, and the candidate pairs that INT8 is calibrated on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ranking.card import fingerprint
from ranking.errors import DataError, InputError
from ranking.schema import iter_table, read_judgments
from ranking.text import EncodedDocuments, EncodedPair, StudentFormat

LOGGER = logging.getLogger(__name__)


@dataclass
class JudgedPairs:
    """Rows of judged queries, encoded as the student reads them.

    table: these rows of the judgments table; documents: [n]; grades: int [n]; groups: int [n], index into queries;
    queries: their texts; fingerprint: of the file that they were drawn from.
    """

    table: pa.Table
    documents: EncodedDocuments
    grades: NDArray[np.int64]
    groups: NDArray[np.int64]
    queries: list[str]
    fingerprint: str


def read_judged(data: str | Path, split: str, text: StudentFormat, max_queries: int) -> JudgedPairs:
    """Up to max_queries queries with at least two documents each, drawn with a fixed seed."""
    path = Path(data) / "judgments" / f"{split}.parquet"
    table = read_judgments(path)
    ids = np.asarray(table.column("query_id").to_pylist(), dtype=object)
    distinct, codes, sizes = np.unique(ids, return_inverse=True, return_counts=True)
    eligible = np.flatnonzero(sizes >= 2)
    if not len(eligible):
        raise DataError(path, "no query has two judged documents; nothing to gate on")
    order = np.random.default_rng(0).permutation(eligible)[:max_queries]
    group_of = np.full(len(distinct), -1)  # by query number; -1: not drawn
    group_of[order] = np.arange(len(order))
    keep = np.flatnonzero(group_of[codes] >= 0)
    table = table.take(pa.array(keep))
    rows = table.to_pydict()
    groups = group_of[codes[keep]].astype(np.int64)
    names = [""] * len(order)
    for group, query in zip(groups, rows["query"]):
        names[group] = query
    documents = text.encode_documents(rows["query"], rows["title"], rows["summary"])
    return JudgedPairs(table, documents, np.asarray(rows["grade"], np.int64), groups, names, fingerprint(path))


def read_candidates(data: str | Path, text: StudentFormat, count: int) -> list[EncodedPair]:
    """Up to `count` real pairs, of which each chunk is one: candidates, else train judgments.

    InputError if the dataset has neither.
    """
    source, fields = read_candidate_fields(data, count)
    LOGGER.info("calibrating on %d pairs of %s", len(fields[0]), source)
    return text.encode_documents(*fields).pairs[:count]


def read_candidate_fields(data: str | Path, count: int) -> tuple[str, tuple[list[str], list[str], list[str]]]:
    """(file name, (queries, titles, summaries)) of up to `count` real pairs: candidates, else train judgments.

    Every k-th row is taken, because neighbouring rows belong to one query. InputError if the dataset has neither.
    """
    for table, path in (("candidates", "candidates.parquet"), ("judgments", "judgments/train.parquet")):
        if not (Path(data) / path).is_file():
            continue
        fields: tuple[list[str], list[str], list[str]] = ([], [], [])
        for piece in iter_table(Path(data) / path, table, batch_rows=16384):
            for column, name in zip(fields, ("query", "title", "summary")):
                column.extend(piece.column(name).to_pylist())
            if len(fields[0]) >= 64 * count:
                break
        if fields[0]:
            step = max(1, len(fields[0]) // count)
            queries, titles, summaries = (column[::step][:count] for column in fields)
            return path, (queries, titles, summaries)
    raise InputError(f"{data}: neither candidates nor train judgments to calibrate on")
