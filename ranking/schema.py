"""The tables that pass between stages: Arrow schemas and the checks made at every read (docs/data.md).

A read never drops a row silently: a bad row either stops the program with its file, number and reason, or, with
`on_bad_row="reject"`, goes to a rejects file beside a count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ranking.errors import DataError
from ranking.files import replacing
from ranking.limits import MAX_FIELD_BYTES
from ranking.visible import VISIBLE_RE2

MAX_GRADE = 4
DROPPED_QUERY = "(dropped)"  # stands for the query of a page where the router was told to keep none
NO_USER = "no-user-"  # begins the user id of a page that named none: in comparisons each such page is a user of its own
# SQL of whom to count where it matters how many people there are: those pages may all be one person's
KNOWN_USER = f"CASE WHEN user_id LIKE '{NO_USER}%' THEN '{NO_USER}' ELSE user_id END"

_TEXT, _F32, _TIME = pa.string(), pa.float32(), pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class Table:
    """One table: its Arrow schema, the columns that identify a row, and the columns whose text must not be blank."""

    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    not_blank: tuple[str, ...]
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)


def _table(
    name: str, key: str, columns: list[tuple[str, pa.DataType]], blank_ok: str = "title summary", **ranges
) -> Table:
    schema = pa.schema([pa.field(column, kind, nullable=False) for column, kind in columns])
    texts = [column for column, kind in columns if kind == _TEXT and column not in blank_ok.split()]
    return Table(name, schema, tuple(key.split()), tuple(texts), ranges)


_DOCUMENT = [("title", _TEXT), ("summary", _TEXT)]
_PAIR = [("query_id", _TEXT), ("doc_id", _TEXT)]
_INFINITY = float("inf")

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        _table(
            "events",
            "request_id doc_id",
            [
                ("request_id", _TEXT), ("doc_id", _TEXT), ("user_id", _TEXT), ("timestamp", _TIME),
                ("query", _TEXT), *_DOCUMENT, ("position", pa.int32()), ("clicked", pa.bool_()),
                ("dwell_seconds", _F32), ("arm", _TEXT),
            ],
            blank_ok="title summary arm",
            position=(1, 1 << 30),
            dwell_seconds=(0, _INFINITY),
        ),
        _table(
            "clicks",
            "query doc_id",
            [("query", _TEXT), ("doc_id", _TEXT), *_DOCUMENT, ("weight", _F32)],
            weight=(0, _INFINITY),
        ),
        _table(  # documents shown for a query: satisfied clicks, and expected examinations (docs/clicks.md)
            "shown_documents",
            "query doc_id",
            [("query", _TEXT), ("doc_id", _TEXT), *_DOCUMENT, ("clicks", _F32), ("examinations", _F32)],
            clicks=(0, _INFINITY),
            examinations=(0, _INFINITY),
        ),
        _table(
            "judgments",
            "query_id doc_id",
            [*_PAIR, ("query", _TEXT), *_DOCUMENT, ("grade", pa.int8())],
            grade=(0, MAX_GRADE),
        ),
        _table("candidates", "query_id doc_id", [*_PAIR, ("query", _TEXT), *_DOCUMENT]),
        # the first stage's score of judged pairs: what ranks before any model does, and a published arm's prior
        _table("priors", "query_id doc_id", [*_PAIR, ("prior", _F32)]),
        _table("labels", "query_id doc_id", [*_PAIR, ("teacher_score", _F32), ("teacher_id", _TEXT)]),
        _table(  # one row per page that the A/B router served (docs/ab-log.md)
            "exposures",
            "request_id",
            [
                ("request_id", _TEXT), ("user_id", _TEXT), ("timestamp", _TIME), ("experiment", _TEXT), ("arm", _TEXT),
                ("served_by", _TEXT), ("fallback", _TEXT), ("model_version", _TEXT), ("latency_ms", _F32),
                ("query", _TEXT), ("query_length", pa.int32()), ("platform", _TEXT), ("segments", _TEXT),
                ("forced", pa.bool_()), ("documents", pa.list_(_TEXT)), ("scores", pa.list_(_F32)),
                ("teams", pa.list_(_TEXT)), ("clicks", pa.int32()), ("clicked_positions", pa.list_(pa.int32())),
                ("dwell_seconds", _F32), ("config", _TEXT),
            ],
            blank_ok="experiment arm fallback model_version platform config",
            latency_ms=(0, _INFINITY),
            query_length=(0, 1 << 30),
            clicks=(0, 1 << 30),
            dwell_seconds=(0, _INFINITY),
        ),
        _table(  # one row per page that a second model scored in shadow mode
            "shadows",
            "request_id model",
            [
                ("request_id", _TEXT), ("timestamp", _TIME), ("experiment", _TEXT), ("arm", _TEXT), ("model", _TEXT),
                ("failure", _TEXT), ("latency_ms", _F32), ("documents", pa.list_(_TEXT)), ("scores", pa.list_(_F32)),
            ],
            blank_ok="experiment arm failure",
            latency_ms=(0, _INFINITY),
        ),
    )
}  # fmt: skip


@dataclass
class BadRow:
    """A row that its table refuses: 1-based row number in the file and the reason."""

    row: int
    reason: str


def conform(table: Table, columns: pa.Table, path: str | Path, check_text: bool = True) -> pa.Table:
    """Select and cast a file's columns to the table's schema. DataError names a missing column or a wrong type.

    Only lossless casts are made (int64 grades to int8, float64 to float32, dictionaries to strings); text is never
    parsed into numbers here.
    check_text=False leaves text that is no UTF-8 to the caller, who names or rejects it row by row.
    """
    missing = [name for name in table.schema.names if name not in columns.column_names]
    if missing:
        raise DataError(path, f"no column {', '.join(missing)}; {table.name} has {', '.join(table.schema.names)}")
    check_once(columns.schema, table.schema.names, path)
    arrays = []
    for wanted in table.schema:
        column = columns.column(wanted.name)
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if check_text and _is_text(kind) and (row := _first_failing(column, lambda part: part.validate(full=True))):
            raise DataError(path, f"column {wanted.name} is not valid UTF-8", row)
        if _is_text(kind) != _is_text(wanted.type) or pa.types.is_boolean(kind) != pa.types.is_boolean(wanted.type):
            raise DataError(path, f"column {wanted.name} is {column.type}, {wanted.type} is needed")
        try:
            # float64 to float32 rounds, which is meant; every other cast must keep the value
            arrays.append(column.cast(wanted.type, safe=not pa.types.is_floating(wanted.type)))
        except pa.ArrowInvalid as problem:
            row = _first_failing(column, partial(pc.cast, target_type=wanted.type))
            raise DataError(path, f"column {wanted.name}: {problem}", row) from problem
        except pa.ArrowNotImplementedError as problem:
            raise DataError(path, f"column {wanted.name} is {column.type}, {wanted.type} is needed") from problem
    # nullability is checked row by row in bad_rows, so that a null can be named and rejected
    return pa.table(arrays, names=table.schema.names)


def check_once(schema: pa.Schema, names: Iterable[str], path: str | Path) -> None:
    """DataError if a column of one of these names stands in a file twice: nobody knows which one is meant."""
    for name in names:
        if len(schema.get_all_field_indices(name)) > 1:
            raise DataError(path, f"column {name} occurs twice")


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _first_failing(column: pa.ChunkedArray, check: Callable[[pa.ChunkedArray], object]) -> int | None:
    """1-based row of the first value that check refuses by ArrowInvalid, found by halving; None if it takes all."""

    def fails(low: int, high: int) -> bool:
        try:
            check(column.slice(low, high - low))
        except pa.ArrowInvalid:
            return True
        return False

    low, high = 0, len(column)
    if not fails(low, high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(low, middle) else (middle, high)
    return low + 1


def bad_rows(table: Table, rows: pa.Table, first_row: int = 1) -> list[BadRow]:
    """Every row that breaks the table's promises on its own (nulls, blanks, NaN, ranges, huge fields), in row order.

    rows: already conformed; first_row: the 1-based number of its first row. Duplicate keys: see duplicate_keys.
    """
    found: dict[int, str] = {}

    def mark(mask: pa.ChunkedArray, reason: str) -> None:
        if pc.any(mask).as_py():
            for index in pc.indices_nonzero(mask).to_pylist():
                found.setdefault(index, reason)

    for name in table.schema.names:
        column = rows.column(name)
        if column.null_count:
            mark(pc.is_null(column), f"{name} is null")
            column = pc.fill_null(column, pa.scalar(_neutral(column.type), column.type))
        if _is_text(column.type):
            mark(
                pc.greater(pc.binary_length(column), MAX_FIELD_BYTES), f"{name} is longer than {MAX_FIELD_BYTES} bytes"
            )
            if name in table.not_blank:
                mark(pc.invert(pc.match_substring_regex(column, VISIBLE_RE2)), f"{name} is blank")
        elif pa.types.is_floating(column.type):
            mark(pc.invert(pc.is_finite(column)), f"{name} is NaN or infinite")
        if name in table.ranges:
            low, high = table.ranges[name]
            outside = pc.or_(pc.less(column, low), pc.greater(column, high))
            mark(pc.fill_null(outside, False), f"{name} is outside {low:g} to {high:g}")
    return [BadRow(first_row + index, reason) for index, reason in sorted(found.items())]


def _neutral(kind: pa.DataType):
    return "-" if _is_text(kind) else [] if pa.types.is_list(kind) else 0


def duplicate_keys(table: Table, rows: pa.Table, first_row: int = 1) -> list[BadRow]:
    """Rows whose key stood in an earlier row of `rows`. Memory grows with rows; long streams check query by query."""
    numbered = rows.select(table.key).append_column("_row", pa.array(range(len(rows)), pa.int64()))
    firsts = numbered.group_by(list(table.key)).aggregate([("_row", "min")])
    if len(firsts) == len(rows):
        return []
    keep = set(firsts.column("_row_min").to_pylist())
    names = ", ".join(table.key)
    return [BadRow(first_row + i, f"duplicate key ({names})") for i in range(len(rows)) if i not in keep]


@dataclass
class Rejects:
    """Where refused rows go with on_bad_row="reject": a count, and a TSV of row number and reason beside the output."""

    path: Path
    count: int = 0

    def add(self, source: str | Path, rows: list[BadRow]) -> None:
        """Append the refused rows of the file `source`, and count them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists()
        with self.path.open("a", encoding="utf-8") as stream:
            if fresh:
                stream.write("file\trow\treason\n")
            stream.writelines(f"{source}\t{bad.row}\t{bad.reason}\n" for bad in rows)
        self.count += len(rows)


OnBadRow = Literal["stop", "reject"]


def checked(
    table: Table,
    rows: pa.Table,
    path: str | Path,
    first_row: int = 1,
    rejects: Rejects | None = None,
    keys: bool = True,
) -> pa.Table:
    """rows with every promise of the table checked. Without rejects the first bad row raises DataError."""
    rows = conform(table, rows, path)
    bad = bad_rows(table, rows, first_row)
    if keys:
        known = {b.row for b in bad}
        bad += [b for b in duplicate_keys(table, rows, first_row) if b.row not in known]
        bad.sort(key=lambda b: b.row)
    if bad and rejects is None:
        more = f" ({len(bad) - 1} more bad rows)" if len(bad) > 1 else ""
        raise DataError(path, bad[0].reason + more, bad[0].row)
    if bad and rejects is not None:
        rejects.add(path, bad)
        refused = {b.row - first_row for b in bad}
        rows = rows.take(pa.array([i for i in range(len(rows)) if i not in refused], pa.int64()))
    return rows.cast(table.schema)


def read_table(path: str | Path, name: str, rejects: Rejects | None = None) -> pa.Table:
    """Read and check a whole Parquet table. DataError: unreadable file, wrong column, bad row, duplicate key."""
    table = TABLES[name]
    with reading(path):
        rows = pq.read_table(path)
    return checked(table, rows, path, rejects=rejects)


def read_judgments(path: str | Path) -> pa.Table:
    """Read and check a table of judgments. DataError, too, if it is empty: a collection need not have every split."""
    rows = read_table(path, "judgments")
    if not len(rows):
        raise DataError(
            path,
            f"the dataset has no {Path(path).stem} judgments; prepare_data --resplit draws train, dev and test anew "
            "from those that there are",
        )
    return rows


def iter_table(
    path: str | Path, name: str, batch_rows: int = 65536, rejects: Rejects | None = None
) -> Iterator[pa.Table]:
    """Stream a Parquet table in checked pieces of at most batch_rows, memory bounded by one piece.

    Keys are checked within each piece only; whoever streams a table whose keys must be unique overall checks by query.
    """
    table = TABLES[name]
    with reading(path):
        file = pq.ParquetFile(path)
        conform(table, file.schema_arrow.empty_table(), path)
        row = 1
        batches = file.iter_batches(batch_rows, columns=table.schema.names)
    while True:
        with reading(path):
            batch = next(batches, None)
        if batch is None:
            return
        yield checked(table, pa.Table.from_batches([batch]), path, first_row=row, rejects=rejects)
        row += len(batch)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Around whatever reads Parquet: DataError for an absent or unreadable file."""
    if not Path(path).exists():
        raise DataError(path, "no such file")
    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, OSError) as problem:
        raise DataError(path, f"cannot be read as Parquet: {' '.join(str(problem).split())}") from problem


def write_table(path: str | Path, name: str, pieces: pa.Table | Iterable[pa.Table]) -> int:
    """Check and write a Parquet table, aside and renamed into place; a generator streams. Returns the row count."""
    table = TABLES[name]
    count = 0
    with replacing(path) as aside, pq.ParquetWriter(aside, table.schema, compression="zstd") as writer:
        for piece in [pieces] if isinstance(pieces, pa.Table) else pieces:
            writer.write_table(checked(table, piece, path, first_row=count + 1))
            count += len(piece)
    return count
