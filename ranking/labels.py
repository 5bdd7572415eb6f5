"""The labels folder that clients/label_corpus.py writes: its layout, and checked reading for whoever trains on it.

    manifest.json         what was labelled, by which teacher, counts, score histogram, the list of shards
    labels-00000.parquet  the `labels` table of rows 1 .. shard_rows of the candidate file, less the rejects
    labels-00000.json     the shard's record, checksum and rejects; it is there once the shard is finished
    rejects.parquet       every row that got no score: row (1-based), query_id, doc_id, cause, reason

Readers take finished folders only, and check every shard against the manifest's checksum as they read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ranking.card import fingerprint
from ranking.errors import DataError, InputError
from ranking.schema import TABLES, conform

MANIFEST_NAME = "manifest.json"
REJECTS_NAME = "rejects.parquet"
MANIFEST_VERSION = 1
DISAGREEMENT = "disagreement"  # optional column of a shard: how far the teachers behind a blended score lie apart
REJECTS_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # 1-based row of the candidate file
        pa.field("query_id", pa.string()),
        pa.field("doc_id", pa.string()),
        pa.field("cause", pa.string(), nullable=False),  # "input": the row itself; "teacher": the server's answers
        pa.field("reason", pa.string(), nullable=False),
    ]
)


def shard_name(index: int) -> str:
    """File name of the shard with this 0-based index."""
    return f"labels-{index:05d}.parquet"


@dataclass(frozen=True)
class Shard:
    """One finished shard: `rows` candidate rows from 0-based first_row on, `labels` of them scored, and its SHA-256."""

    file: str
    first_row: int
    rows: int
    labels: int
    sha256: str


@dataclass(frozen=True)
class LabelSet:
    """A finished labels folder. candidate_rows = labels + rejects; teacher_id is the one teacher behind every score."""

    folder: Path
    teacher_id: str
    candidate_rows: int
    labels: int
    rejects: int
    shards: tuple[Shard, ...]
    manifest: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> LabelSet:
        """Read manifest.json. InputError if absent, unreadable, of another version, or labelling has not finished."""
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        manifest = load_manifest(path)
        if manifest is None:
            raise InputError(f"{folder}: no {MANIFEST_NAME}; training.blend_labels or clients.label_corpus writes it")
        if not manifest.get("complete"):
            raise InputError(
                f"{folder}: labelling has not finished; run clients/label_corpus.py again with the same --out"
            )
        try:
            shards = tuple(Shard(**{f.name: entry[f.name] for f in fields(Shard)}) for entry in manifest["shards"])
            counts = manifest["counts"]
            found = cls(
                folder, manifest["teacher_id"], counts["rows"], counts["labels"], counts["rejects"], shards, manifest
            )
        except (KeyError, TypeError) as problem:
            raise InputError(f"{path}: not a labels manifest: {problem!r}") from problem
        if sum(s.labels for s in shards) != found.labels or sum(s.rows for s in shards) != found.candidate_rows:
            raise InputError(f"{path}: its counts and its list of shards disagree; label again")
        return found

    def check_candidates(self, candidates: str | Path) -> None:
        """DataError if this is not the file that was labelled, as far as the manifest says which one that was.

        Ids alone do not tell: a text may have been changed under them since it was scored.
        """
        with _parquet(candidates) as file:
            rows = file.metadata.num_rows
        if rows != self.candidate_rows:
            raise DataError(candidates, f"{rows} rows; {self.folder} labelled {self.candidate_rows}")
        about = self.manifest.get("candidates")
        known = about.get("fingerprint") if isinstance(about, dict) else None
        if known is None or known == footer_fingerprint(candidates):
            return
        if known != fingerprint(candidates):  # of all bytes, as labels have it that were written in one go
            raise DataError(candidates, f"not the file that {self.folder} labelled, or changed since: label it again")

    def mark(self) -> str:
        """16 hex digits that tell these labels from any others, whatever the manifest says of dates and rates."""
        known = "\n".join((self.teacher_id, *(shard.sha256 for shard in self.shards)))
        return hashlib.sha256(known.encode()).hexdigest()[:16]


def load_manifest(path: Path) -> dict[str, Any] | None:
    """manifest.json as a dict, None where there is no such file. InputError if unreadable or of another version."""
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(f"{path}: cannot be read as JSON: {problem}") from problem
    if not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION:
        raise InputError(f"{path}: not a labels manifest of version {MANIFEST_VERSION}")
    return manifest


def iter_labels(folder: str | Path) -> Iterator[pa.Table]:
    """The `labels` table shard by shard, in the candidate file's order; memory is bounded by one shard.

    DataError: a shard is missing, differs from its checksum or its row count, or holds another teacher's scores.
    """
    found = LabelSet.load(folder)
    for shard in found.shards:
        yield _read_shard(found, shard).select(TABLES["labels"].schema.names)


def read_labels(folder: str | Path) -> pa.Table:
    """The whole `labels` table of a finished folder, checked as in iter_labels."""
    tables = list(iter_labels(folder))
    return pa.concat_tables(tables) if tables else TABLES["labels"].schema.empty_table()


def iter_labelled(candidates: str | Path, folder: str | Path) -> Iterator[pa.Table]:
    """The scored candidates with their text: the candidates' columns plus teacher_score, shard by shard, in file order.

    Labels of several teachers together have the column disagreement too, float32, 0 where all agree. candidates: the
    very file that was labelled. DataError if it is not, or its rows and the labels' keys do not agree.
    """
    found = LabelSet.load(folder)
    found.check_candidates(candidates)
    rejected = pq.read_table(found.folder / REJECTS_NAME, schema=REJECTS_SCHEMA).column("row")
    for shard, rows in _rows_by_shard(candidates, found):
        labels = _read_shard(found, shard)
        numbers = pa.array(range(shard.first_row + 1, shard.first_row + shard.rows + 1), pa.int64())
        kept = rows.filter(pc.invert(pc.is_in(numbers, value_set=rejected)))
        if not all(kept.column(key).equals(labels.column(key)) for key in TABLES["labels"].key):
            raise DataError(candidates, f"its keys are not those of {found.folder / shard.file}; label this file again")
        kept = kept.cast(TABLES["candidates"].schema)  # what was scored has no nulls
        for name in ("teacher_score", DISAGREEMENT):
            if name in labels.column_names:
                kept = kept.append_column(labels.schema.field(name), labels.column(name))
        yield kept


def footer_fingerprint(path: str | Path) -> str:
    """First 16 hex digits of the SHA-256 of a Parquet file's size and footer: cheap at any size."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as stream:
        stream.seek(size - 8)
        footer = int.from_bytes(stream.read(4), "little") + 8
        stream.seek(size - footer)
        return hashlib.sha256(f"{size}:".encode() + stream.read()).hexdigest()[:16]


def _parquet(path: str | Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as problem:
        raise DataError(path, f"cannot be read as Parquet: {problem}") from problem


def _rows_by_shard(candidates: str | Path, found: LabelSet) -> Iterator[tuple[Shard, pa.Table]]:
    file = _parquet(candidates)
    table = TABLES["candidates"]
    batches = file.iter_batches(8192, columns=table.schema.names)
    held: list[pa.RecordBatch] = []
    for shard in found.shards:
        while sum(map(len, held)) < shard.rows:
            held.append(next(batches))
        rows = pa.Table.from_batches(held)
        yield shard, conform(table, rows.slice(0, shard.rows), candidates)
        held = rows.slice(shard.rows).to_batches()


def _read_shard(found: LabelSet, shard: Shard) -> pa.Table:
    path = found.folder / shard.file
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise DataError(path, f"cannot be read: {problem.strerror}; label again, finished shards are kept") from problem
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise DataError(
            path, "differs from the manifest's checksum; run clients/label_corpus.py again, it mends the shard"
        )
    stored = pq.read_table(pa.BufferReader(content))
    rows = conform(TABLES["labels"], stored, path)
    teachers = pc.unique(rows.column("teacher_id")).to_pylist()
    if len(rows) != shard.labels or teachers not in ([], [found.teacher_id]):
        raise DataError(
            path, f"{len(rows)} labels by {teachers}; the manifest says {shard.labels} by {found.teacher_id}"
        )
    if DISAGREEMENT in stored.column_names:
        rows = rows.append_column(pa.field(DISAGREEMENT, pa.float32()), stored.column(DISAGREEMENT).cast(pa.float32()))
    return rows
