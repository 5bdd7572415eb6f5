"""Shards on disk: the labels of one row range, then its record.

The record's presence says that the shard is finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clients.labelling.candidate_file import CandidateFile, Refusal, RowRange
from ranking.files import replacing, write_json
from ranking.labels import shard_name
from ranking.schema import TABLES

RECORD_VERSION = 1
BIN_WIDTH = 0.25  # of the score histogram


@dataclass(frozen=True)
class Origin:
    """What a shard was made from and by: shards of another origin are never mixed in."""

    candidates: str  # CandidateFile.fingerprint
    shard_rows: int
    teacher_id: str

    @classmethod
    def of(cls, candidates: CandidateFile, shard_rows: int, teacher_id: str) -> Origin:
        """The origin of shards that are made from this file by this teacher."""
        return cls(candidates.fingerprint, shard_rows, teacher_id)


def record_path(folder: Path, index: int) -> Path:
    """Where the record of shard `index` lies."""
    return (folder / shard_name(index)).with_suffix(".json")


def write_shard(
    folder: Path, origin: Origin, covered: RowRange, rows: pa.Table, scores: np.ndarray, refusals: Sequence[Refusal]
) -> dict[str, Any]:
    """Write a finished range: labels-N.parquet, then labels-N.json. Returns the record.

    rows: the range's candidates in file order; scores: float32 [rows], NaN exactly where a refusal stands.
    ValueError if that does not hold: a NaN never becomes a label. OSError when the disk is full.
    """
    refused = np.zeros(len(rows), bool)
    refused[[refusal.position for refusal in refusals]] = True
    if len(rows) != covered.rows or not np.array_equal(np.isfinite(scores), ~refused):
        raise ValueError(f"shard {covered.index}: scores and refusals do not cover its {covered.rows} rows")
    kept = pa.array(~refused)
    ids = rows.select(["query_id", "doc_id"]).filter(kept)
    columns = [*ids.columns, pa.array(scores[~refused], pa.float32()), pa.array([origin.teacher_id] * len(ids))]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=TABLES["labels"].schema), sink, compression="zstd")
    content = sink.getvalue()
    record = {
        "version": RECORD_VERSION,
        "origin": asdict(origin),
        "file": shard_name(covered.index),
        "first_row": covered.first_row,
        "rows": covered.rows,
        "labels": len(ids),
        "sha256": hashlib.sha256(content).hexdigest(),
        "scores": score_summary(scores[~refused]),
        "rejects": _reject_rows(covered, rows, refusals),
    }
    with replacing(folder / shard_name(covered.index)) as aside:
        aside.write_bytes(content)
    write_json(record_path(folder, covered.index), record, indent=None)
    return record


def _reject_rows(covered: RowRange, rows: pa.Table, refusals: Sequence[Refusal]) -> list[list[Any]]:
    """[row (1-based in the file), query_id, doc_id, cause, reason] of each refusal, in file order."""
    ordered = sorted(refusals, key=lambda refusal: refusal.position)
    positions = pa.array([refusal.position for refusal in ordered], pa.int64())
    ids = rows.select(["query_id", "doc_id"]).take(positions).to_pylist()
    return [
        [covered.first_row + refusal.position + 1, pair["query_id"], pair["doc_id"], refusal.cause, refusal.reason]
        for refusal, pair in zip(ordered, ids)
    ]


def finished_record(folder: Path, origin: Origin, covered: RowRange) -> tuple[dict[str, Any] | None, str]:
    """The record of a shard that is finished and sound, else None and what is wrong ("" if it was never begun)."""
    path = record_path(folder, covered.index)
    if not path.exists():
        return None, ""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        expected = (RECORD_VERSION, asdict(origin), covered.first_row, covered.rows)
        if (record["version"], record["origin"], record["first_row"], record["rows"]) != expected:
            return None, f"{path.name} was made from other candidates or by another teacher"
        digest = hashlib.sha256((folder / record["file"]).read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as problem:
        return None, f"{path.name}: {problem!r}"
    return (record, "") if digest == record["sha256"] else (None, f"{record['file']} differs from its checksum")


def score_summary(scores: np.ndarray) -> dict[str, Any]:
    """Mergeable summary of float32 scores [n]: count, sum, sum of squares, least, greatest, counts by bin of
    BIN_WIDTH."""
    if not len(scores):
        return {"count": 0, "sum": 0.0, "squares": 0.0, "min": None, "max": None, "bins": {}}
    values = scores.astype(np.float64)
    bins, counts = np.unique(np.floor(values / BIN_WIDTH).astype(np.int64), return_counts=True)
    return {
        "count": len(values),
        "sum": float(values.sum()),
        "squares": float((values**2).sum()),
        "min": float(values.min()),
        "max": float(values.max()),
        "bins": {str(b): int(c) for b, c in zip(bins, counts)},
    }


def merge_summaries(total: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """The summary of both parts' scores."""
    if not part["count"] or not total["count"]:
        return total if total["count"] else part
    bins = dict(total["bins"])
    for key, count in part["bins"].items():
        bins[key] = bins.get(key, 0) + count
    merged = {key: total[key] + part[key] for key in ("count", "sum", "squares")}
    return merged | {"min": min(total["min"], part["min"]), "max": max(total["max"], part["max"]), "bins": bins}


def describe_scores(summary: dict[str, Any]) -> dict[str, Any]:
    """Mean, standard deviation, range and histogram ({lower edge of the bin: count}) of a summary, for people and
    manifest."""
    count = summary["count"]
    if not count:
        return {"count": 0}
    mean = summary["sum"] / count
    histogram = {f"{int(b) * BIN_WIDTH:g}": c for b, c in sorted(summary["bins"].items(), key=lambda e: int(e[0]))}
    return {
        "count": count,
        "mean": mean,
        "std": max(0.0, summary["squares"] / count - mean**2) ** 0.5,
        "min": summary["min"],
        "max": summary["max"],
        "bin_width": BIN_WIDTH,
        "histogram": histogram,
    }
