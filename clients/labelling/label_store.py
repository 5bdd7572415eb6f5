"""Every label ever paid for, by the pair's text and its teacher: what two corpora share is asked once.

    STORE/<teacher_id>/run-00000.parquet     key_high, key_low (uint64: the pair's key, ranking/pair_keys.py) and
                                             teacher_score; sorted by key, never written again
    STORE/<teacher_id>/run-00000.json        the run's record: rows, checksum, where it came from; it is there once the
                                             run is finished

A corpus is labelled in three steps: its keys that the store lacks are found, they alone are labelled, and the labels
folder of the corpus is read out of the store. The joins run in DuckDB, which spills to disk: no table of keys stands in
memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clients.labelling.candidate_file import CandidateFile, RowRange
from clients.labelling.label_folder import one_writer
from ranking.database import DuckDbSettings, literal, querying, single_value
from ranking.errors import InputError
from ranking.files import replacing
from ranking.pair_keys import pair_keys

logger = logging.getLogger("labels")

RECORD_VERSION = 1
RUN_NUMBER = re.compile(r"run-(\d+)\.")
BATCH_ROWS = 65_536
# of the joins and sorts: what does not fit goes to disk; each thread holds buffers
DUCKDB = DuckDbSettings(duckdb_memory_gb=1.0, duckdb_threads=2)
RUN_SCHEMA = pa.schema(
    [
        pa.field("key_high", pa.uint64(), nullable=False),
        pa.field("key_low", pa.uint64(), nullable=False),
        pa.field("teacher_score", pa.float32(), nullable=False),
    ]
)
KEYS_SCHEMA = pa.schema(
    [pa.field("row", pa.int64()), pa.field("key_high", pa.uint64()), pa.field("key_low", pa.uint64())]
)


@dataclass(frozen=True)
class Run:
    """One finished run: its file, rows, SHA-256, and the source it was made from, so that none is added twice."""

    file: str
    rows: int
    sha256: str
    source: str


class LabelStore:
    """The labels of one teacher in a store folder, made if absent."""

    def __init__(self, store: Path, teacher_id: str):
        self.folder, self.teacher_id = store / teacher_id, teacher_id

    def runs(self) -> list[Run]:
        """The finished runs in order. InputError: a record is unreadable, or its file is missing or of another size."""
        found = []
        for path in sorted(self.folder.glob("run-*.json")):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                if record.pop("version") != RECORD_VERSION:
                    raise InputError(f"{path}: not a run's record of version {RECORD_VERSION}")
                run = Run(**record)
                rows = pq.read_metadata(self.folder / run.file).num_rows
            except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as problem:
                raise InputError(f"{path}: the run cannot be read: {problem}; restore it from a copy") from problem
            if rows != run.rows:
                raise InputError(f"{self.folder / run.file}: {rows} rows, its record says {run.rows}; restore it")
            found.append(run)
        return found

    def check(self) -> int:
        """Read every run against its checksum. Returns the labels. InputError names a run that was damaged."""
        for run in self.runs():
            if file_sha256(self.folder / run.file) != run.sha256:
                raise InputError(f"{self.folder / run.file}: differs from its checksum; restore it from a copy")
        return sum(run.rows for run in self.runs())

    def add(self, labels: Path, source: str) -> int:
        """Add labels as one run, sorted by key, without those whose key the store has. Returns the rows added.

        labels: Parquet file with RUN_SCHEMA's columns in any order of rows; source: what they come from. A source that
        was added before adds nothing. Of labels with the same key the one with the lowest score counts, so that the run
        does not depend on their order. InputError if another process is writing this teacher's labels.
        """
        with one_writer(self.folder):
            runs = self.runs()
            if any(run.source == source for run in runs):
                return 0
            name = f"run-{self._next_number():05d}.parquet"
            with database(self.folder) as connection:
                self._register(connection)
                # in steps, since a join, a grouping and a sort under way together do not share the memory
                connection.execute(
                    "CREATE TEMP TABLE distinct_labels AS "
                    "SELECT key_high, key_low, min(teacher_score) AS teacher_score "
                    f"FROM {parquet([labels])} GROUP BY key_high, key_low"
                )
                connection.execute(
                    "CREATE TEMP TABLE fresh AS FROM distinct_labels ANTI JOIN stored USING (key_high, key_low)"
                )
                connection.execute("DROP TABLE distinct_labels")
                with replacing(self.folder / name) as aside:
                    rows = write_batches(aside, RUN_SCHEMA, stream(connection, "FROM fresh ORDER BY key_high, key_low"))
            run = Run(name, rows, file_sha256(self.folder / name), source)
            with replacing((self.folder / name).with_suffix(".json")) as aside:
                aside.write_text(json.dumps({"version": RECORD_VERSION} | asdict(run)) + "\n", encoding="utf-8")
        logger.info("%s: %d labels added to %s", self.folder, rows, name)
        return rows

    def missing(self, keys: Path, candidates: CandidateFile, out: Path) -> int:
        """Write the candidates whose key the store lacks, each text once, in the file's order. Returns their number.

        keys: Parquet file of write_keys; out: Parquet file of the candidates table.
        """
        with database(out.parent) as connection:
            self._find_lacking(connection, keys)
            found = connection.execute(f"SELECT DISTINCT row // {BATCH_ROWS} AS number FROM lacking ORDER BY number")
            ranges = candidates.ranges(BATCH_ROWS)
            touched = [ranges[number] for (number,) in found.fetchall()]
            numbers = stream(connection, "SELECT row FROM lacking ORDER BY row")
            with replacing(out) as aside:
                return write_batches(aside, candidate_schema(), rows_at(candidates, touched, numbers))

    def lacks(self, keys: Path, asked: pa.RecordBatchReader) -> int:
        """How many of the keys the store lacks that are not in `asked` either.

        keys: Parquet file of write_keys; asked: key_high and key_low.
        """
        with database(keys.parent) as connection:
            self._find_lacking(connection, keys)
            connection.register("asked", asked)
            return single_value(connection, "SELECT count(*) FROM lacking ANTI JOIN asked USING (key_high, key_low)")

    def scores(self, keys: Path, scratch: Path) -> Iterator[pa.RecordBatch]:
        """(row, teacher_score) of every keyed row that the store has a label for, by rising row.

        keys: Parquet file of write_keys; scratch: folder for what does not fit into memory.
        """
        with database(scratch) as connection:
            self._register(connection)
            connection.execute(
                "CREATE TEMP TABLE found AS SELECT row, teacher_score "
                f"FROM {parquet([keys])} AS asked JOIN stored USING (key_high, key_low)"
            )
            yield from stream(connection, "FROM found ORDER BY row")

    def _next_number(self) -> int:
        """One above every run there is: a run without its record is not written over, nor one behind a gap."""
        numbers = [int(found[1]) for path in self.folder.iterdir() if (found := RUN_NUMBER.match(path.name))]
        return max(numbers, default=-1) + 1

    def _find_lacking(self, connection: duckdb.DuckDBPyConnection, keys: Path) -> None:
        """The table `lacking`: each key that the store lacks, once, with the first row that has it."""
        self._register(connection)
        connection.execute(
            "CREATE TEMP TABLE firsts AS SELECT key_high, key_low, min(row) AS row "
            f"FROM {parquet([keys])} GROUP BY key_high, key_low"
        )
        connection.execute("CREATE TEMP TABLE lacking AS FROM firsts ANTI JOIN stored USING (key_high, key_low)")
        connection.execute("DROP TABLE firsts")

    def _register(self, connection: duckdb.DuckDBPyConnection) -> None:
        files = [self.folder / run.file for run in self.runs()]
        connection.execute("CREATE TEMP TABLE empty (key_high UBIGINT, key_low UBIGINT, teacher_score FLOAT)")
        connection.execute(f"CREATE TEMP VIEW stored AS FROM {parquet(files) if files else 'empty'}")


CANDIDATE_COLUMNS = ("query_id", "doc_id", "query", "title", "summary")


def candidate_schema() -> pa.Schema:
    """The candidates table, as the rows to label are written."""
    return pa.schema([pa.field(name, pa.string(), nullable=False) for name in CANDIDATE_COLUMNS])


def write_keys(candidates: CandidateFile, out: Path) -> int:
    """Write (row, key_high, key_low) of every candidate that may be labelled. row: 0-based. Returns those refused."""
    refused_rows = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal refused_rows
        for covered, rows, refused in candidates.read(candidates.ranges(BATCH_ROWS)):
            sound = [index for index in range(len(rows)) if index not in refused]
            refused_rows += len(refused)
            kept = rows.take(pa.array(sound, pa.int64()))
            high, low = pair_keys(*(kept.column(name).to_pylist() for name in ("query", "title", "summary")))
            numbers = pa.array([covered.first_row + index for index in sound], pa.int64())
            yield pa.record_batch([numbers, pa.array(high), pa.array(low)], schema=KEYS_SCHEMA)

    with replacing(out) as aside:
        write_batches(aside, KEYS_SCHEMA, batches())
    return refused_rows


def rows_at(
    candidates: CandidateFile, ranges: Sequence[RowRange], numbers: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """The candidates at rising 0-based row numbers (int64, one column), read from the ranges that have any.

    DuckDB would read them too, but refuses a whole file for one cell that is not UTF-8, which is one reject here.
    """
    held = np.zeros(0, np.int64)
    for covered, rows, _ in candidates.read(ranges):
        end = covered.first_row + covered.rows
        while (not len(held) or held[-1] < end) and (batch := next(numbers, None)) is not None:
            held = np.concatenate([held, batch.column(0).to_numpy()])
        inside = int(np.searchsorted(held, end))
        yield from rows.take(pa.array(held[:inside] - covered.first_row)).to_batches()
        held = held[inside:]


@contextmanager
def database(scratch: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB of its own that keeps to DUCKDB and spills into `scratch`. DataError, as of `querying`, on `scratch`."""
    with querying(scratch), DUCKDB.open_database(scratch / ".spill") as connection:
        yield connection


def stream(connection: duckdb.DuckDBPyConnection, query: str) -> Iterator[pa.RecordBatch]:
    """A query's rows in batches, memory bounded by one."""
    yield from connection.sql(query).to_arrow_reader(BATCH_ROWS)


def write_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Write a Parquet file in row groups of BATCH_ROWS whatever the batches' sizes: equal rows give equal bytes."""
    count = 0
    held: list[pa.Table] = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            held.append(pa.Table.from_batches([batch]).cast(schema))
            count += len(batch)
            while sum(map(len, held)) >= BATCH_ROWS:
                rows = pa.concat_tables(held)
                writer.write_table(rows.slice(0, BATCH_ROWS).combine_chunks())
                held = [rows.slice(BATCH_ROWS)]
        if held and sum(map(len, held)):
            writer.write_table(pa.concat_tables(held).combine_chunks())
    return count


def parquet(files: Sequence[Path]) -> str:
    """DuckDB's table function over Parquet files."""
    return f"read_parquet({literal(files)})"


def file_sha256(path: Path) -> str:
    """The file's SHA-256 in hex, read a piece at a time."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
