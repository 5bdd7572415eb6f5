"""A labels folder from scores that are there already, as (row, score) batches, of the store or of a score file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from clients.labelling.candidate_file import Refusal
from clients.labelling.label_folder import LabelFolder
from clients.labelling.label_shards import write_shard


def write_scored(
    folder: LabelFolder, scores: Iterator[pa.RecordBatch], reason: str, retry_rejects: bool = False
) -> dict[str, Any]:
    """Write the shards that are not finished, and the manifest, which is returned.

    scores: (row, score) by rising 0-based row of the candidate file; reason: why a row without a score has none. Rows
    that may not be labelled at all are rejects whether they have a score or not.
    """
    reader = ScoreReader(scores)
    for covered, rows, refused in folder.candidates.read(folder.pending(retry_rejects)):
        found = reader.take(covered.first_row, covered.rows)
        found[list(refused)] = np.nan
        refusals = [Refusal(position, "input", why) for position, why in refused.items()]
        unscored = (position for position in np.flatnonzero(np.isnan(found)).tolist() if position not in refused)
        refusals += [Refusal(position, "teacher", reason) for position in unscored]
        write_shard(folder.folder, folder.origin, covered, rows, found, refusals)
    return folder.finish()


class ScoreReader:
    """(row, score) batches by rising row, read a range at a time; memory is bounded by a range and a batch."""

    def __init__(self, batches: Iterator[pa.RecordBatch]):
        self._batches = batches
        self._rows, self._scores = np.zeros(0, np.int64), np.zeros(0, np.float32)

    def take(self, first_row: int, rows: int) -> np.ndarray:
        """float32 [rows]: the scores of first_row and on, NaN where there is none. Ranges come in rising order."""
        end = first_row + rows
        while not len(self._rows) or self._rows[-1] < end:
            batch = next(self._batches, None)
            if batch is None:
                break
            held = self._rows >= first_row
            self._rows = np.concatenate([self._rows[held], batch.column(0).to_numpy()])
            self._scores = np.concatenate([self._scores[held], batch.column(1).to_numpy()])
        scores = np.full(rows, np.nan, np.float32)
        inside = (self._rows >= first_row) & (self._rows < end)
        scores[self._rows[inside] - first_row] = self._scores[inside]
        held = self._rows >= end
        self._rows, self._scores = self._rows[held], self._scores[held]
        return scores
