"""The output folder: one writer, one teacher, one candidate file; what is finished, what is left, and the manifest."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clients.labelling.candidate_file import CandidateFile, RowRange
from clients.labelling.label_shards import (
    Origin,
    describe_scores,
    finished_record,
    merge_summaries,
    record_path,
    score_summary,
)
from ranking.errors import InputError
from ranking.files import only_holder, replacing, write_json
from ranking.labels import MANIFEST_NAME, MANIFEST_VERSION, REJECTS_NAME, REJECTS_SCHEMA, load_manifest

logger = logging.getLogger("labels")


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. InputError if another process has it."""
    with only_holder(folder / ".lock", f"{folder}: process {{process}} is labelling into this folder"):
        for part in folder.glob(".*.part"):  # what a killed run was writing; it was never renamed, so it never counted
            part.unlink(missing_ok=True)
        yield


class LabelFolder:
    """An output folder held by one_writer, bound to its origin.

    InputError if it holds another teacher's or file's labels.
    """

    def __init__(self, folder: Path, candidates: CandidateFile, origin: Origin):
        self.folder, self.candidates, self.origin = folder, candidates, origin
        self.manifest = self._bind()

    def _bind(self) -> dict[str, Any]:
        path = self.folder / MANIFEST_NAME
        wanted = {
            "version": MANIFEST_VERSION,
            "complete": False,
            "candidates": {
                "name": self.candidates.path.name,
                "rows": self.candidates.rows,
                "fingerprint": self.origin.candidates,
            },
            "shard_rows": self.origin.shard_rows,
            "teacher_id": self.origin.teacher_id,
            "runs": [],
        }
        found = load_manifest(path)
        if found is None:
            if next(self.folder.glob("labels-*.json"), None) is not None:
                raise InputError(f"{self.folder}: shards without a {MANIFEST_NAME}; give another --out")
            self._save(wanted)
            return wanted
        rules = {
            "teacher_id": "labels by teacher {old}, the server has {new}; two teachers' scores do not mix: "
            "give another --out",
            "candidates": "labels of another candidate file ({old}; this one is {new}); give another --out",
            "shard_rows": "shards of {old} rows; give --shard-rows {old} to go on",
        }
        for key, rule in rules.items():
            old, new = found.get(key), wanted[key]
            if key == "candidates" and old is not None:
                old, new = old.get("fingerprint"), self.origin.candidates  # the file may have been moved
            if old != new:
                raise InputError(f"{self.folder}: holds {rule.format(old=old, new=new)}")
        return found

    def _save(self, manifest: dict[str, Any]) -> None:
        write_json(self.folder / MANIFEST_NAME, manifest, indent=1)

    def ranges(self) -> list[RowRange]:
        """The row ranges of all shards, finished or not."""
        return self.candidates.ranges(self.origin.shard_rows)

    def pending(self, retry_rejects: bool = False) -> list[RowRange]:
        """The ranges still to label: never finished, damaged, or (retry_rejects) with pairs that the teacher
        failed on."""
        left = []
        for covered in self.ranges():
            record, problem = finished_record(self.folder, self.origin, covered)
            if problem:
                logger.warning("%s: %s; the shard is labelled again", self.folder, problem)
            elif record and retry_rejects and any(cause == "teacher" for *_, cause, _ in record["rejects"]):
                record = None
            if record is None:
                left.append(covered)
        if left and self.manifest.get("complete"):  # readers must not take a folder under repair for a finished one
            self.manifest["complete"] = False
            self._save(self.manifest)
        return left

    def note_run(self, started: datetime, seconds: float, labels: int) -> None:
        """Add one run's rate to the manifest, finished or not."""
        run = {"started": started.astimezone(UTC).isoformat(timespec="seconds"), "seconds": round(seconds, 3)}
        rate = round(labels / seconds, 2) if seconds else 0.0
        self.manifest.setdefault("runs", []).append(run | {"pairs": labels, "pairs_per_second": rate})
        self._save(self.manifest)

    def finish(self) -> dict[str, Any]:
        """Assemble rejects.parquet and the complete manifest from the shards' records. Returns the manifest."""
        shards: list[dict[str, Any]] = []
        scores = score_summary(np.zeros(0, np.float32))
        reasons: Counter[str] = Counter()
        with (
            replacing(self.folder / REJECTS_NAME) as aside,
            pq.ParquetWriter(aside, REJECTS_SCHEMA, compression="zstd") as writer,
        ):
            for covered in self.ranges():
                record = json.loads(record_path(self.folder, covered.index).read_text(encoding="utf-8"))
                shards.append({key: record[key] for key in ("file", "first_row", "rows", "labels", "sha256")})
                scores = merge_summaries(scores, record["scores"])
                if record["rejects"]:
                    writer.write_table(pa.table([list(c) for c in zip(*record["rejects"])], schema=REJECTS_SCHEMA))
                    reasons.update(f"{cause}: {reason}" for *_, cause, reason in record["rejects"])
        self.manifest |= {
            "complete": True,
            "counts": {
                "rows": self.candidates.rows,
                "labels": scores["count"],
                "rejects": sum(reasons.values()),
                "reasons": dict(reasons.most_common(50)),
            },
            "scores": describe_scores(scores),
            "shards": shards,
        }
        self._save(self.manifest)
        return self.manifest
