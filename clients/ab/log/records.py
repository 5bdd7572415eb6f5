"""What each record of the log holds. The columns come from the tables in ranking/schema.py, so that none is named
twice.

To log another field of a page: add the column to the table `exposures` there, and its value where the router makes the
record (clients/ab/router/page_service.py). Reading, compaction and its SQL take the column from the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from ranking.schema import TABLES

LOGGED = pa.field("logged", pa.int64())  # microseconds since 1970; the tables' `timestamp`
# columns of `exposures` that are known only once a page's events have been joined to it
JOINED = ("clicks", "clicked_positions", "dwell_seconds")
# lists beside `documents`, stored only with --log-text: compaction puts them into the table `events`
PAGE_TEXT = ("title", "summary")
# in the raw record only: the caller's own clock, in seconds or null
EVENT_CLOCK = "timestamp"
# record types of which there are few; they are read whole and become JSON files
SMALL_RECORDS = ("config", "ramp")


def _record_of(table: str, leave_out: tuple[str, ...] = ()) -> pa.Schema:
    kept = [pa.field(f.name, f.type) for f in TABLES[table].schema if f.name not in ("timestamp", *leave_out)]
    return pa.schema([LOGGED, *kept])


def _exposure() -> pa.Schema:
    schema = _record_of("exposures", JOINED)
    for name in PAGE_TEXT:
        schema = schema.append(pa.field(name, pa.list_(pa.string())))
    return schema


RECORDS: dict[str, pa.Schema] = {
    "exposure": _exposure(),
    "event": pa.schema(
        [
            LOGGED,
            ("request_id", pa.string()),
            ("doc_id", pa.string()),
            ("event", pa.string()),  # click or dwell
            ("dwell_seconds", pa.float32()),
        ]
    ),
    "shadow": _record_of("shadows"),
}


def complete(kind: str, record: dict[str, Any]) -> dict[str, Any]:
    """record unchanged, once it has every column of its kind and no other. ValueError names what differs.

    Page text may be left out. Whoever writes to the log without the router can check its records with this too.
    """
    wanted = set(RECORDS[kind].names) - {LOGGED.name}
    given = record.keys() - ({EVENT_CLOCK} if kind == "event" else set())
    if missing := wanted - given - set(PAGE_TEXT):
        raise ValueError(f"{kind} record without {', '.join(sorted(missing))}")
    if unknown := given - wanted:
        raise ValueError(f"{kind} record with unknown {', '.join(sorted(unknown))}")
    return record


def _neutral(kind: pa.DataType) -> Any:
    return (
        [] if pa.types.is_list(kind) else "" if pa.types.is_string(kind) else False if pa.types.is_boolean(kind) else 0
    )


# an earlier release did not know a column that was added later: its records read as if the value were empty
_NEUTRAL: dict[str, Mapping[str, Any]] = {
    kind: {f.name: _neutral(f.type) for f in schema if f.name not in PAGE_TEXT} for kind, schema in RECORDS.items()
}


def as_table(kind: str, records: list[dict[str, Any]]) -> pa.Table:
    """Records of one kind as rows of its schema.

    A column that a record lacks is neutral, an explicit null stays null.
    """
    return pa.Table.from_pylist([{**_NEUTRAL[kind], **record} for record in records], schema=RECORDS[kind])
