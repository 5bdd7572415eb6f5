"""Writes a labels folder in one go, for teachers whose scores are all at hand; ranking/labels.py says what it holds.

clients/label_corpus.py writes the same folder shard by shard, because its scores arrive over days.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ranking.card import fingerprint
from ranking.errors import InputError
from ranking.files import replacing_folder, write_json
from ranking.labels import DISAGREEMENT, MANIFEST_NAME, MANIFEST_VERSION, REJECTS_NAME, REJECTS_SCHEMA, shard_name
from ranking.schema import TABLES

SHARD_ROWS = 1_000_000


def check_new(folder: Path) -> None:
    """InputError if the folder is there already."""
    if folder.exists():
        raise InputError(f"{folder}: is there already; give another --out, or remove it")


def write_labels(
    folder: Path,
    candidates: Path,
    rows: pa.Table,
    scores: NDArray[np.float32],
    teacher_id: str,
    teacher: dict[str, Any],
    disagreement: NDArray[np.float32] | None = None,
) -> None:
    """Write the finished folder of one score per candidate row, aside and renamed into place.

    rows: the table of the file `candidates`, in its order, query_id and doc_id at least; scores: [rows]; teacher: what
    the manifest says of the teacher beside its id; disagreement: [rows], of labels by several teachers. InputError if
    the folder is there already, or a score is not finite.
    """
    check_new(folder)
    if len(rows) != len(scores) or not np.isfinite(scores).all():
        raise InputError(
            f"{folder}: {len(rows)} candidates, {int(np.isfinite(scores).sum())} finite scores: must be equal"
        )
    shards: list[dict[str, Any]] = []
    with replacing_folder(folder) as aside:
        for first in range(0, len(rows), SHARD_ROWS):
            of_shard = scores[first : first + SHARD_ROWS]
            ids = rows.select(["query_id", "doc_id"]).slice(first, len(of_shard))
            columns = [*ids.columns, pa.array(of_shard, pa.float32()), pa.array([teacher_id] * len(ids))]
            table = pa.table(columns, schema=TABLES["labels"].schema)
            if disagreement is not None:
                of_shard = disagreement[first : first + SHARD_ROWS]
                table = table.append_column(pa.field(DISAGREEMENT, pa.float32()), pa.array(of_shard, pa.float32()))
            path = aside / shard_name(len(shards))
            pq.write_table(table, path, compression="zstd")
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            counts = {"first_row": first, "rows": len(ids), "labels": len(ids)}
            shards.append({"file": path.name, **counts, "sha256": digest})
        pq.write_table(REJECTS_SCHEMA.empty_table(), aside / REJECTS_NAME)
        manifest = {
            "version": MANIFEST_VERSION,
            "complete": True,
            "candidates": {"name": candidates.name, "rows": len(rows), "fingerprint": fingerprint(candidates)},
            "shard_rows": SHARD_ROWS,
            "teacher_id": teacher_id,
            "runs": [],
            "counts": {"rows": len(rows), "labels": len(rows), "rejects": 0, "reasons": {}},
            "scores": {"count": len(scores), "mean": float(scores.mean()), "std": float(scores.std())},
            "shards": shards,
        }
        write_json(aside / MANIFEST_NAME, manifest | teacher)
