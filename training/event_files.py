"""Find, open and check a raw click log in DuckDB: every bad row is named or rejected with a count."""

from __future__ import annotations

import glob
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from ranking.errors import DataError, InputError
from ranking.schema import MAX_FIELD_BYTES, TABLES, BadRow, Rejects, conform, reading

_TEXTS = ("request_id", "doc_id", "user_id", "query")


def event_files(events: str) -> list[Path]:
    """The Parquet files of a file, a folder (searched below) or a glob, sorted. InputError if there are none."""
    path = Path(events)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*.parquet") if p.is_file() and not p.name.startswith("."))
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(events, recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not found:
        raise InputError(f"{events}: no Parquet file there; a file, a folder or a glob in quotes is needed")
    for file in found:
        with reading(file):
            conform(TABLES["events"], pq.read_schema(file).empty_table(), file)
    return found


def _reason() -> str:
    """SQL that names what is wrong with an event, NULL if nothing is."""
    columns = TABLES["events"].schema.names
    cases = [f"WHEN {name} IS NULL THEN '{name} is null'" for name in columns]
    cases += [rf"WHEN NOT regexp_matches({name}, '\S') THEN '{name} is empty'" for name in _TEXTS]
    for name in (*_TEXTS, "title", "summary"):
        cases.append(f"WHEN strlen({name}) > {MAX_FIELD_BYTES} THEN '{name} is longer than {MAX_FIELD_BYTES} bytes'")
    cases.append("WHEN position < 1 OR position > 1073741824 THEN 'position is outside 1 to 1073741824'")
    cases.append("WHEN NOT isfinite(dwell_seconds) THEN 'dwell_seconds is NaN or infinite'")
    cases.append("WHEN dwell_seconds < 0 THEN 'dwell_seconds is negative'")
    return f"CASE {' '.join(cases)} END"


def open_events(connection: duckdb.DuckDBPyConnection, files: list[Path], rejects: Path | None) -> dict[str, int]:
    """Make the view `events` of good rows; returns how many rows there were and how many were refused.

    rejects: None stops at the first bad row with DataError; a path collects all of them as file, row, reason.
    """
    names = ", ".join("'" + str(file).replace("'", "''") + "'" for file in files)
    source = f"read_parquet([{names}], union_by_name = true, filename = true, file_row_number = true)"
    total, bad = connection.execute(f"SELECT count(*), count({_reason()}) FROM {source}").fetchone() or (0, 0)
    connection.execute(f"""
        CREATE TABLE refused AS
        SELECT filename, file_row_number, {_reason()} AS reason FROM {source} WHERE {_reason()} IS NOT NULL AND {bad} > 0
    """)
    # Sixteen bytes of key per event instead of its strings: the check must not need more memory than the work itself.
    connection.execute(f"""
        CREATE TABLE repeated AS
        SELECT hash(request_id, doc_id) AS key FROM {source} GROUP BY key HAVING count(*) > 1
    """)
    if (connection.execute("SELECT count(*) FROM repeated").fetchone() or (0,))[0]:
        connection.execute(f"""
            INSERT INTO refused
            SELECT filename, file_row_number, 'duplicate key (request_id, doc_id)' FROM (
                SELECT filename, file_row_number, row_number() OVER (
                    PARTITION BY request_id, doc_id ORDER BY filename, file_row_number) AS turn
                FROM (SELECT *, hash(request_id, doc_id) AS key FROM {source}) SEMI JOIN repeated USING (key))
            ANTI JOIN refused USING (filename, file_row_number) WHERE turn > 1
        """)
    refused = (connection.execute("SELECT count(*) FROM refused").fetchone() or (0,))[0]
    keep = ""
    if refused:
        _refuse(connection, refused, rejects)
        keep = "ANTI JOIN refused USING (filename, file_row_number)"
    columns = ", ".join(TABLES["events"].schema.names)
    connection.execute(f"CREATE VIEW events AS SELECT {columns} FROM {source} {keep}")
    return {"events_read": total, "events_rejected": refused}


def _refuse(connection: duckdb.DuckDBPyConnection, count: int, rejects: Path | None) -> None:
    result = connection.execute("SELECT * FROM refused ORDER BY filename, file_row_number")
    if rejects is None:
        file, row, reason = result.fetchone() or ("", 0, "")
        more = f" ({count - 1} more bad rows)" if count > 1 else ""
        raise DataError(file, reason + more, row + 1)
    rejects.unlink(missing_ok=True)  # of an earlier run
    sink = Rejects(rejects)
    while rows := result.fetchmany(10_000):
        for file, row, reason in rows:
            sink.add(file, [BadRow(row + 1, reason)])
