"""Opens Parquet tables larger than memory; every bad row is named, or rejected with a count."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ranking.database import literal
from ranking.errors import DataError, InputError
from ranking.limits import MAX_FIELD_BYTES
from ranking.query_engine import QueryEngine, single_row, single_value
from ranking.schema import BadRow, Rejects, Table, check_once, conform, reading
from ranking.visible import VISIBLE_RE2


def parquet_files(pattern: str) -> list[Path]:
    """The Parquet files of a file, a folder (searched below) or a glob, sorted. InputError if there are none.

    In a folder, names that begin with _ or . are passed over, as Spark does it.
    """
    path = Path(pattern)
    if path.is_dir():
        # Spark's attempts that failed, Delta's checkpoints and copies of editors are no part of a table
        files = (p for p in path.rglob("*.parquet") if p.is_file())
        found = sorted(p for p in files if not any(part.startswith(("_", ".")) for part in p.relative_to(path).parts))
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not found:
        raise InputError(f"{pattern}: no Parquet file there; a file, a folder or a glob in quotes is needed")
    for file in found:
        if file.name.removesuffix(".gz").endswith((".csv", ".tsv", ".jsonl", ".ndjson", ".json")):
            raise InputError(
                f"{file}: Parquet is needed; DuckDB makes it: python -c "
                f"'import duckdb, sys; duckdb.read_csv(sys.argv[1]).write_parquet(sys.argv[2])' {file} log.parquet"
                + (" (read_json for JSON)" if "json" in file.name else "")
            )
    return found


@dataclass(frozen=True)
class FileColumns:
    """How files spell a table's columns: our name -> SQL over their columns; absent: optional ones that no file has."""

    sql: dict[str, str]
    absent: list[str]


def file_columns(
    files: list[Path],
    table: Table,
    names: Mapping[str, str] | None = None,
    defaults: Mapping[str, str] | None = None,
    hint: str = "",
) -> FileColumns:
    """Check the columns of the files. Whole numbers are taken for text (ids) and for bool (0 or 1), a null dwell of an
    event without a click for 0.

    names: our column -> theirs, where they differ; defaults: our optional columns -> the SQL of their value where no
    file has them; hint: what to do about a missing column, as "; do this". DataError names an unreadable file, a
    missing column or a wrong type.
    """
    names, defaults = names or {}, defaults or {}
    schemas = {}
    for file in files:
        with reading(file):
            schemas[file] = pq.read_schema(file)
    theirs = {ours: names.get(ours, ours) for ours in table.schema.names}
    absent = [
        ours
        for ours in defaults
        if ours in theirs and ours not in names and not any(theirs[ours] in schema.names for schema in schemas.values())
    ]
    sql = {ours: _quoted(name) if ours not in absent else defaults[ours] for ours, name in theirs.items()}
    for file, schema in schemas.items():
        missing = [
            f"{o} ({t})" if o != t else o for o, t in theirs.items() if o not in absent and t not in schema.names
        ]
        if missing:
            raise DataError(file, f"no column {', '.join(missing)}; there are {', '.join(schema.names)}{hint}")
        check_once(schema, theirs.values(), file)
        types = []
        for wanted in table.schema:
            kind = wanted.type if wanted.name in absent else schema.field(theirs[wanted.name]).type
            if conversion := _conversion(wanted.type, kind, _name(theirs[wanted.name])):
                unit = " milliseconds since 1970 (of seconds: * 1000000)" if pa.types.is_integer(kind) else ""
                command = _rewritten(file, theirs[wanted.name], conversion)
                problem = f"column {theirs[wanted.name]} is {kind}, {wanted.type} is needed"
                raise DataError(file, f"{problem}; DuckDB converts{unit or ' it'}: {command}")
            if pa.types.is_integer(kind) and (pa.types.is_string(wanted.type) or pa.types.is_boolean(wanted.type)):
                to = "VARCHAR" if pa.types.is_string(wanted.type) else "BOOLEAN"
                kind, sql[wanted.name] = wanted.type, f"CAST({_quoted(theirs[wanted.name])} AS {to})"
            elif pa.types.is_timestamp(kind) and kind != wanted.type:
                # DuckDB has no arithmetic on nanoseconds with a zone, and a time without one is UTC's
                sql[wanted.name] = f"CAST({_quoted(theirs[wanted.name])} AS TIMESTAMPTZ)"
            types.append(pa.field(wanted.name, kind))
        conform(table, pa.schema(types).empty_table(), file)
    if table.name == "events" and "dwell_seconds" not in absent:
        # most exports leave the dwell null where nobody clicked
        sql["dwell_seconds"] = f"coalesce({sql['dwell_seconds']}, CASE WHEN NOT {sql['clicked']} THEN 0 END)"
    return FileColumns(sql, absent)


def _conversion(wanted: pa.DataType, kind: pa.DataType, column: str) -> str | None:
    """DuckDB's SQL that makes a column of another type, for a user to judge: what its values mean is not guessed."""
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if pa.types.is_boolean(wanted) and text:
        return f"lower({column}) IN ('true', 'yes', '1')"
    if pa.types.is_boolean(wanted) and pa.types.is_floating(kind):
        return f"{column} > 0"
    if pa.types.is_timestamp(wanted) and text:
        return f"CAST({column} AS TIMESTAMP)"
    if pa.types.is_timestamp(wanted) and pa.types.is_integer(kind):
        return f"make_timestamptz({column} * 1000)"
    return None


def _rewritten(file: str | Path, column: str, conversion: str) -> str:
    """The command that writes a log anew with a column converted."""
    return (
        f"python -c \"import duckdb; duckdb.sql('''COPY (SELECT * REPLACE ({conversion} AS {_name(column)}) "
        f"FROM {literal(Path(file))}) TO 'converted.parquet' ''')\""
    )


def _name(column: str) -> str:
    return _quoted(column).replace('"', '\\"')  # as it stands in a shell's double quotes


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


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
        elif pa.types.is_integer(column.type):
            cases.append(f"WHEN {name} <> floor({name}) THEN '{name} is no whole number'")
        elif pa.types.is_floating(column.type):
            cases.append(f"WHEN NOT isfinite({name}) THEN '{name} is NaN or infinite'")
    for name, (low, high) in table.ranges.items():
        outside = f"'{name} is outside {low:g} to {high:g}'"
        cases.append(f"WHEN {name} < '{low}'::DOUBLE OR {name} > '{high}'::DOUBLE THEN {outside}")
    return f"CASE {' '.join(cases)} END"


def open_view(
    engine: QueryEngine,
    view: str,
    table: Table,
    files: list[Path],
    rejects: Path | None,
    columns: FileColumns | None = None,
) -> tuple[int, int]:
    """Make a view of the files' good rows; returns how many rows there were and how many were refused.

    columns: how the files spell them; None checks that they are the table's. rejects: None stops at the first bad row
    with DataError; a path collects all of them as file, row, reason.
    """
    columns = columns or file_columns(files, table)
    selected = ", ".join(f"{sql} AS {name}" for name, sql in columns.sql.items())
    engine.read_files(f"{view}_files", files, row_numbers=True)
    engine.view(f"{view}_rows", f"SELECT {selected}, filename, file_row_number FROM {view}_files")
    refused, reason = f"{view}_refused", _reason(table)
    total, bad = single_row(engine, f"SELECT count(*), count({reason}) FROM {view}_rows")
    refusals = f"""
        SELECT filename, file_row_number, {reason} AS reason FROM {view}_rows
        WHERE {bad} > 0 AND {reason} IS NOT NULL"""
    # Eight bytes of key per row instead of its strings: the check must not need more memory than the work itself.
    key = ", ".join(table.key)
    engine.table(
        "repeated",
        f"SELECT row_key FROM (SELECT hash({key}) AS row_key FROM {view}_rows) GROUP BY row_key HAVING count(*) > 1",
    )
    if single_value(engine, "SELECT count(*) FROM repeated"):
        refusals += f"""
            UNION ALL
            SELECT filename, file_row_number, 'duplicate key ({key})' AS reason FROM (
                SELECT filename, file_row_number, {reason} AS reason, row_number() OVER (
                    PARTITION BY {key} ORDER BY filename, file_row_number) AS turn
                FROM (SELECT *, hash({key}) AS row_key FROM {view}_rows) SEMI JOIN repeated USING (row_key))
            WHERE turn > 1 AND reason IS NULL"""
    engine.table(refused, refusals)
    count = single_value(engine, f"SELECT count(*) FROM {refused}")
    keep = ""
    if count:
        from_zero = "position" in columns.sql and single_value(engine, f"SELECT min(position) FROM {view}_rows") == 0
        _refuse(engine, refused, count, rejects, columns.sql["position"] if from_zero else "")
        keep = f"ANTI JOIN {refused} USING (filename, file_row_number)"
    # a position 1.0 is 1 from here on; none is lost, since what is no whole number was refused
    good = ", ".join(
        f"TRY_CAST({column.name} AS INTEGER) AS {column.name}" if pa.types.is_integer(column.type) else column.name
        for column in table.schema
    )
    engine.view(view, f"SELECT {good} FROM {view}_rows {keep}")
    return total, count


def _refuse(engine: QueryEngine, refused: str, count: int, rejects: Path | None, from_zero: str) -> None:
    """from_zero: the log's column of positions where they count from 0, else empty."""
    in_order = f"SELECT filename, file_row_number, reason FROM {refused} ORDER BY filename, file_row_number"
    if rejects is None:
        file, row, reason = engine.rows(f"{in_order} LIMIT 1")[0]
        more = f" ({count - 1} more bad rows)" if count > 1 else ""
        if from_zero and reason.startswith("position is outside"):
            theirs = from_zero.strip('"')
            command = _rewritten(file, theirs, f"{_name(theirs)} + 1")
            more += f"; the first position is 1; a log that counts from 0 is converted by: {command}"
        raise DataError(file, reason + more, row + 1)
    rejects.unlink(missing_ok=True)  # of an earlier run
    sink = Rejects(rejects)
    for batch in engine.batches(in_order):
        for row in batch.to_pylist():
            sink.add(row["filename"], [BadRow(row["file_row_number"] + 1, row["reason"])])
