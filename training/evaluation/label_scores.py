"""Scores that exist already: looked up in a labels folder or file by query and document."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ranking.errors import InputError
from ranking.labels import read_labels
from ranking.schema import read_table


def label_scores(path: Path, rows: pa.Table) -> NDArray[np.float32]:
    """Teacher scores, float32 [rows], of rows with query_id and doc_id. InputError if a pair has none.

    path: a labels folder, or one Parquet file of the `labels` table.
    """
    labels = read_labels(path) if path.is_dir() else read_table(path, "labels")
    keys = zip(labels.column("query_id").to_pylist(), labels.column("doc_id").to_pylist())
    scores = dict(zip(keys, labels.column("teacher_score").to_pylist()))
    pairs = list(zip(rows.column("query_id").to_pylist(), rows.column("doc_id").to_pylist()))
    missing = [pair for pair in pairs if pair not in scores]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(pairs)} pairs have no label, the first is query {missing[0][0]!r}, "
            f"document {missing[0][1]!r}; label these pairs too"
        )
    return np.array([scores[pair] for pair in pairs], np.float32)
