"""The candidate file: cut into fixed row ranges, streamed, and every row checked before it is sent to the teacher."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ranking.errors import DataError
from ranking.labels import footer_fingerprint
from ranking.schema import TABLES, bad_rows, conform, duplicate_keys

TABLE = TABLES["candidates"]
BATCH_ROWS = 4096
LOOK_BACK = 1000  # a query that a shard's border cuts is checked for duplicates this many rows back


@dataclass(frozen=True)
class RowRange:
    """Rows first_row (0-based) to first_row + rows - 1 of the candidate file: what shard `index` covers."""

    index: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class Refusal:
    """A candidate row that gets no score: 0-based position in its range, cause ("input" or "teacher") and reason."""

    position: int
    cause: str
    reason: str


@dataclass(frozen=True)
class CandidateFile:
    """An opened candidates.parquet: its row count and a fingerprint of its size and footer (cheap at any size)."""

    path: Path
    rows: int
    fingerprint: str

    @classmethod
    def open(cls, path: str | Path) -> CandidateFile:
        """DataError: no such file, not Parquet, or a column missing or of a wrong type."""
        path = Path(path)
        file = _open(path)
        conform(TABLE, file.schema_arrow.empty_table(), path)
        return cls(path, file.metadata.num_rows, footer_fingerprint(path))

    def ranges(self, rows_each: int) -> list[RowRange]:
        """The file cut into ranges of rows_each rows; the last may be shorter."""
        return [
            RowRange(index, first, min(rows_each, self.rows - first))
            for index, first in enumerate(range(0, self.rows, rows_each))
        ]

    def read(self, ranges: Sequence[RowRange]) -> Iterator[tuple[RowRange, pa.Table, dict[int, str]]]:
        """Each range (in rising order) with its rows and the rows to refuse: {position in the range: reason}.

        Memory is bounded by one range and one batch: row groups before a range are skipped, not read.
        """
        file = _open(self.path)
        groups = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
        starts = [0, *accumulate(groups)]
        window = _Window(file, starts)
        for wanted in ranges:
            first = max(0, wanted.first_row - LOOK_BACK)
            try:
                rows = window.rows(first, wanted.first_row + wanted.rows)
            except (pa.ArrowException, OSError) as problem:
                reason = f"cannot be read as Parquet: {' '.join(str(problem).split())}"
                raise DataError(self.path, reason, wanted.first_row + 1) from problem
            rows, refused = _inspect(conform(TABLE, rows, self.path, check_text=False), wanted.first_row - first)
            yield wanted, rows, refused


class _Window:
    """A sliding view of a Parquet file: rows(first, end) with rising first and end."""

    def __init__(self, file: pq.ParquetFile, group_starts: list[int]):
        self._file, self._starts = file, group_starts
        self._held: list[pa.RecordBatch] = []
        self._first = self._end = 0  # rows held
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def rows(self, first: int, end: int) -> pa.Table:
        group = bisect.bisect_right(self._starts, first) - 1
        if first >= self._end and (self._end == 0 or self._starts[group] > self._end):
            self._held = []
            self._first = self._end = self._starts[group]
            left = range(group, len(self._starts) - 1)
            self._batches = self._file.iter_batches(BATCH_ROWS, row_groups=list(left), columns=TABLE.schema.names)
        while self._end < end:
            batch = next(self._batches)
            self._held.append(batch)
            self._end += len(batch)
            while self._held and self._first + len(self._held[0]) <= first:
                self._first += len(self._held.pop(0))
        while self._held and self._first + len(self._held[0]) <= first:
            self._first += len(self._held.pop(0))
        return pa.Table.from_batches(self._held).slice(first - self._first, end - first)


def _open(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise DataError(path, "no such file")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as problem:
        raise DataError(path, f"cannot be read as Parquet: {' '.join(str(problem).split())}") from problem


def _inspect(rows: pa.Table, skip: int) -> tuple[pa.Table, dict[int, str]]:
    """Drop the `skip` look-back rows; return the rest and why rows of it are refused, by position."""
    refused: dict[int, str] = {}
    for name in rows.column_names:
        rows, broken = _valid_text(rows, name)
        refused |= {index: f"{name} is not valid UTF-8" for index in broken if index not in refused}
    for bad in bad_rows(TABLE, rows, first_row=0):
        refused.setdefault(bad.row, bad.reason)
    for bad in duplicate_keys(TABLE, rows, first_row=0):
        refused.setdefault(bad.row, bad.reason)
    return rows.slice(skip), {row - skip: reason for row, reason in sorted(refused.items()) if row >= skip}


def _valid_text(rows: pa.Table, name: str) -> tuple[pa.Table, list[int]]:
    """rows with undecodable cells of a column made null, and their positions: Arrow reads text without decoding it."""
    column = rows.column(name)
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        cells = column.cast(pa.binary()).to_pylist()
        broken = [index for index, cell in enumerate(cells) if cell is not None and not _decodes(cell)]
        spoilt = set(broken)
        mended = [None if i in spoilt or cell is None else cell.decode() for i, cell in enumerate(cells)]
        return rows.set_column(rows.column_names.index(name), name, pa.array(mended, pa.string())), broken
    return rows, []


def _decodes(cell: bytes) -> bool:
    try:
        cell.decode()
    except UnicodeDecodeError:
        return False
    return True
