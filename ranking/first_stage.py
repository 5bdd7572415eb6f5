"""What ranks before any model does: the first stage's scores of judged pairs, BM25 or a file of the user's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ranking.bm25 import bm25_scores
from ranking.errors import DataError
from ranking.schema import read_table

BM25_NAME = "bm25"


def first_stage_scores(path: Path | None, data: Path, rows: pa.Table) -> NDArray[np.float32]:
    """Scores of the first stage, float32 [rows], NaN for a pair that the file does not have.

    path: Parquet table `priors` (query_id, doc_id, prior); None: BM25 with the word statistics of the judged documents
    of the dataset folder `data`. rows: a judgments table. DataError if the file has none of the pairs.
    """
    if path is None:
        queries, titles, summaries = (rows.column(name).to_pylist() for name in ("query", "title", "summary"))
        return bm25_scores(queries, titles, summaries, corpus=judged_documents(data))
    table = read_table(path, "priors")
    keys = zip(table.column("query_id").to_pylist(), table.column("doc_id").to_pylist())
    known = dict(zip(keys, table.column("prior").to_pylist()))
    pairs = zip(rows.column("query_id").to_pylist(), rows.column("doc_id").to_pylist())
    scores = np.array([known.get(pair, np.nan) for pair in pairs], np.float32)
    if np.isnan(scores).all():
        raise DataError(path, "has a prior of none of the judged pairs; query_id and doc_id must be the dataset's")
    return scores


def judged_documents(data: Path) -> list[tuple[str, str]]:
    """The judged documents (title, summary) of all splits: word statistics should not depend on the split measured."""
    documents: dict[tuple[str, str], None] = {}
    for path in sorted((data / "judgments").glob("*.parquet")):
        rows = read_table(path, "judgments")
        documents |= dict.fromkeys(zip(rows.column("title").to_pylist(), rows.column("summary").to_pylist()))
    return list(documents)
