"""Sets aside records that break their table, with file, line and reason, so that the rest is compacted."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clients.ab.log.records import LOGGED, PAGE_TEXT, RECORDS, as_table
from ranking.files import write_text
from ranking.limits import MAX_FIELD_BYTES
from ranking.schema import TABLES, Table, bad_rows
from ranking.visible import VISIBLE_RE2

REJECTS = "rejects.jsonl"
_FIRST_MOMENT, _LAST_MOMENT = 0, 4_102_444_800_000_000  # microseconds: 1970 to 2100, outside of which no router ran
_LONGEST_DWELL = 86_400.0  # seconds; the router takes no longer one
_SMALL_FIELDS = {"config": ("fingerprint", "definition"), "ramp": ("experiment", "arm", "reason", "before", "after")}


@dataclass(frozen=True)
class Line:
    """One record and where it stands: file and 1-based line."""

    path: Path
    number: int
    record: dict[str, Any]


def _table(kind: str, name: str, not_blank: tuple[str, ...]) -> Table:
    """The promises of a table about the columns that a raw record has too."""
    ranges = TABLES[name].ranges | {LOGGED.name: (_FIRST_MOMENT, _LAST_MOMENT), "dwell_seconds": (0, _LONGEST_DWELL)}
    return replace(TABLES[name], schema=RECORDS[kind], not_blank=not_blank, ranges=ranges)


_PROMISES = {
    # user and query stand in the table `events` as well, whose texts must not be blank either
    "exposure": _table("exposure", "exposures", TABLES["exposures"].not_blank),
    "event": _table("event", "events", ("request_id", "doc_id", "event")),
    "shadow": _table("shadow", "shadows", TABLES["shadows"].not_blank),
}


@dataclass
class Quarantine:
    """Collects what is refused. rejects: one entry per record with file, line, reason and the record itself."""

    rejects: list[dict[str, Any]] = field(default_factory=list)

    def sound(self, kind: str, lines: list[Line]) -> pa.Table:
        """The records that keep their table's promises, as rows of the kind's schema; the others are set aside."""
        try:
            rows = as_table(kind, [line.record for line in lines])
        except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError) as problem:
            if len(lines) == 1:
                self._refuse(lines[0], f"a value of the wrong type: {' '.join(str(problem).split())[:200]}")
                return RECORDS[kind].empty_table()
            middle = len(lines) // 2
            return pa.concat_tables([self.sound(kind, lines[:middle]), self.sound(kind, lines[middle:])])
        reasons = _broken_promises(kind, rows)
        if kind != "event":
            reasons = _odd_documents(lines) | reasons
        for index in sorted(reasons):
            self._refuse(lines[index], reasons[index])
        if reasons:
            rows = rows.take(pa.array([i for i in range(len(rows)) if i not in reasons], pa.int64()))
        return rows

    def whole(self, kind: str, line: Line) -> list[dict[str, Any]]:
        """The record in a list if it has the fields of its kind, else none."""
        missing = [name for name in _SMALL_FIELDS[kind] if name not in line.record]
        logged = line.record.get(LOGGED.name)
        if missing:
            self._refuse(line, f"a {kind} record without {', '.join(missing)}")
        elif not isinstance(line.record.get("fingerprint", ""), str):
            self._refuse(line, "fingerprint is no text")
        elif not isinstance(logged, int) or not _FIRST_MOMENT <= logged <= _LAST_MOMENT:
            self._refuse(line, "logged is no time from 1970 to 2100")
        else:
            return [line.record]
        return []

    def write(self, out: Path) -> Path | None:
        """Write the rejects beside the tables; without any, the file of an earlier run goes.

        Returns the file, None if there is none.
        """
        path = out / REJECTS
        if not self.rejects:
            path.unlink(missing_ok=True)
            return None
        write_text(path, "".join(json.dumps(reject, ensure_ascii=True) + "\n" for reject in self.rejects))
        return path

    def _refuse(self, line: Line, reason: str) -> None:
        self.rejects.append({"file": str(line.path), "line": line.number, "reason": reason, "record": line.record})


def _broken_promises(kind: str, rows: pa.Table) -> dict[int, str]:
    """Index of each row that breaks its table -> why."""
    reasons = {bad.row: bad.reason for bad in bad_rows(_PROMISES[kind], _without_page_text(kind, rows), first_row=0)}
    if kind == "event":
        return reasons

    def mark(flagged: pa.Array, reason: str) -> None:
        for index in pc.indices_nonzero(pc.fill_null(flagged, True)).to_pylist():
            reasons.setdefault(index, reason)

    columns = {name: rows.column(name).combine_chunks() for name in rows.schema.names}
    shown = pc.list_value_length(columns["documents"])
    for name in ("scores", "teams", *PAGE_TEXT):
        if name in columns:
            lengths = pc.fill_null(pc.list_value_length(columns[name]), 0)  # text may be left out
            mark(pc.and_(pc.greater(lengths, 0), pc.not_equal(lengths, shown)), f"{name} is not one per document")
    for name in ("documents", *PAGE_TEXT):
        if name not in columns:
            continue
        values, rows_of = pc.list_flatten(columns[name]), pc.list_parent_indices(columns[name])
        refused = pc.greater(pc.binary_length(values), MAX_FIELD_BYTES)
        if name == "documents":
            refused = pc.or_(refused, pc.invert(pc.match_substring_regex(values, VISIBLE_RE2)))
        reason = f"{name} holds a blank id" if name == "documents" else f"{name} holds a null or over-long text"
        for index in pc.unique(rows_of.filter(pc.fill_null(refused, True))).to_pylist():
            reasons.setdefault(index, reason)
    return reasons


def _odd_documents(lines: list[Line]) -> dict[int, str]:
    """Index of each page that has a document twice, or a text in place of the list -> why."""
    reasons = {}
    for index, line in enumerate(lines):
        documents = line.record.get("documents") or []
        if not isinstance(documents, list):
            reasons[index] = "documents is no list"
        elif len(set(documents)) < len(documents):
            reasons[index] = "documents holds an id twice"
    return reasons


def _without_page_text(kind: str, rows: pa.Table) -> pa.Table:
    """bad_rows takes a null for a fault, and a page's text may be left out: it gets an empty list instead."""
    for name in PAGE_TEXT if kind == "exposure" else ():
        column = rows.column(name)
        if column.null_count:
            empty = pc.fill_null(column, pa.scalar([], column.type))
            rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), empty)
    return rows
