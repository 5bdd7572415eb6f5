"""Opens Parquet tables larger than memory in DuckDB; every bad row is named, or rejected with a count."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from ranking.errors import DataError, InputError
from ranking.limits import MAX_FIELD_BYTES
from ranking.schema import BadRow, Rejects, Table, conform, reading
from ranking.visible import VISIBLE_RE2


@dataclass(kw_only=True)
class DuckDbSettings:
    """What DuckDB may use of the machine.

    Args:
        duckdb_memory_gb: memory that DuckDB may use before it spills to disk
        threads: DuckDB's threads; 0 uses every core
        temp_folder: where to spill; by default beside the output
    """

    duckdb_memory_gb: float = 3.0
    threads: int = 0
    temp_folder: Path | None = None

    def __post_init__(self):
        if not self.duckdb_memory_gb > 0:
            raise ValueError(f"duckdb_memory_gb is {self.duckdb_memory_gb}: a positive number is needed")
        if self.threads < 0:
            raise ValueError(f"threads is {self.threads}: 0 for every core, or a number of threads")


def connect(spill: str | Path, settings: DuckDbSettings) -> duckdb.DuckDBPyConnection:
    """A DuckDB of its own that spills to a folder when the settings' memory is full."""
    connection = duckdb.connect()
    connection.execute("SET temp_directory = ?", [str(spill)])
    connection.execute("SET memory_limit = ?", [f"{int(settings.duckdb_memory_gb * 1024)}MiB"])
    connection.execute("SET preserve_insertion_order = false")
    connection.execute("SET TimeZone = 'UTC'")
    if settings.threads:
        connection.execute("SET threads = ?", [settings.threads])
    return connection


def parquet_files(pattern: str, table: Table) -> list[Path]:
    """The Parquet files of a file, a folder (searched below) or a glob, sorted, their columns checked.

    InputError if there are none; DataError names an unreadable file, a missing column or a wrong type.
    """
    path = Path(pattern)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*.parquet") if p.is_file() and not p.name.startswith("."))
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not found:
        raise InputError(f"{pattern}: no Parquet file there; a file, a folder or a glob in quotes is needed")
    for file in found:
        with reading(file):
            conform(table, pq.read_schema(file).empty_table(), file)
    return found


def _reason(table: Table) -> str:
    """SQL that names what is wrong with a row, NULL if nothing is; the same promises as ranking.schema.bad_rows."""
    cases = [f"WHEN {name} IS NULL THEN '{name} is null'" for name in table.schema.names]
    for column in table.schema:
        name = column.name
        if pa.types.is_string(column.type):
            limit = f"'{name} is longer than {MAX_FIELD_BYTES} bytes'"
            cases.append(f"WHEN strlen({name}) > {MAX_FIELD_BYTES} THEN {limit}")
            if name in table.not_blank:
                cases.append(f"WHEN NOT regexp_matches({name}, '{VISIBLE_RE2}') THEN '{name} is blank'")
        elif pa.types.is_floating(column.type):
            cases.append(f"WHEN NOT isfinite({name}) THEN '{name} is NaN or infinite'")
    for name, (low, high) in table.ranges.items():
        outside = f"'{name} is outside {low:g} to {high:g}'"
        cases.append(f"WHEN {name} < '{low}'::DOUBLE OR {name} > '{high}'::DOUBLE THEN {outside}")
    return f"CASE {' '.join(cases)} END"


def open_view(
    connection: duckdb.DuckDBPyConnection, view: str, table: Table, files: list[Path], rejects: Path | None
) -> tuple[int, int]:
    """Make a view of the files' good rows; returns how many rows there were and how many were refused.

    rejects: None stops at the first bad row with DataError; a path collects all of them as file, row, reason.
    """
    names = ", ".join("'" + str(file).replace("'", "''") + "'" for file in files)
    source = f"read_parquet([{names}], union_by_name = true, filename = true, file_row_number = true)"
    refused = f"{view}_refused"
    total, bad = connection.execute(f"SELECT count(*), count({_reason(table)}) FROM {source}").fetchone() or (0, 0)
    connection.execute(f"""
        CREATE TABLE {refused} AS
        SELECT filename, file_row_number, {_reason(table)} AS reason FROM {source}
        WHERE {bad} > 0 AND {_reason(table)} IS NOT NULL
    """)
    # Eight bytes of key per row instead of its strings: the check must not need more memory than the work itself.
    key = ", ".join(table.key)
    connection.execute(f"""
        CREATE OR REPLACE TABLE repeated AS
        SELECT hash({key}) AS row_key FROM {source} GROUP BY row_key HAVING count(*) > 1
    """)
    if (connection.execute("SELECT count(*) FROM repeated").fetchone() or (0,))[0]:
        connection.execute(f"""
            INSERT INTO {refused}
            SELECT filename, file_row_number, 'duplicate key ({key})' FROM (
                SELECT filename, file_row_number, row_number() OVER (
                    PARTITION BY {key} ORDER BY filename, file_row_number) AS turn
                FROM (SELECT *, hash({key}) AS row_key FROM {source}) SEMI JOIN repeated USING (row_key))
            ANTI JOIN {refused} USING (filename, file_row_number) WHERE turn > 1
        """)
    count = (connection.execute(f"SELECT count(*) FROM {refused}").fetchone() or (0,))[0]
    keep = ""
    if count:
        _refuse(connection, refused, count, rejects)
        keep = f"ANTI JOIN {refused} USING (filename, file_row_number)"
    connection.execute(f"CREATE VIEW {view} AS SELECT {', '.join(table.schema.names)} FROM {source} {keep}")
    return total, count


def _refuse(connection: duckdb.DuckDBPyConnection, refused: str, count: int, rejects: Path | None) -> None:
    result = connection.execute(f"SELECT * FROM {refused} ORDER BY filename, file_row_number")
    if rejects is None:
        file, row, reason = result.fetchone() or ("", 0, "")
        more = f" ({count - 1} more bad rows)" if count > 1 else ""
        raise DataError(file, reason + more, row + 1)
    rejects.unlink(missing_ok=True)  # of an earlier run
    sink = Rejects(rejects)
    while rows := result.fetchmany(10_000):
        for file, row, reason in rows:
            sink.add(file, [BadRow(row + 1, reason)])
