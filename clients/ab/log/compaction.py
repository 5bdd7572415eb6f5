"""From the raw log to Parquet by day: pages with their clicks joined, one row per document, shadow scores
(docs/ab-log.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from clients.ab.log.days_lock import days_lock
from clients.ab.log.lines import DAY_MICROSECONDS
from clients.ab.log.quarantine import Line, Quarantine
from clients.ab.log.reader import ReadCounts, log_files, read_lines, still_there
from clients.ab.log.records import RECORDS, SMALL_RECORDS
from ranking.errors import InputError
from ranking.files import write_json
from ranking.query_engine import QueryEngine, QueryEngineSettings, single_value, told
from ranking.schema import TABLES, write_table
from ranking.telemetry import bars_are_read

# what is held in memory at a time, whichever is reached first: pages may be a hundred bytes or some megabytes long
BLOCK_RECORDS, BLOCK_BYTES = 20_000, 64 << 20
_ENTRY = pa.field("entry", pa.int64())
FILE_MODE, FOLDER_MODE = 0o640, 0o750  # what users searched for and clicked is not for every account of the machine


@dataclass
class Summary:
    """compact.json. Every record read is in exactly one of the counts of its kind."""

    files: int = 0
    records: int = 0
    torn_tails: int = 0
    damaged: list[str] = field(default_factory=list)
    rejected: int = 0
    exposures: int = 0
    exposures_repeated: int = 0
    events: int = 0
    events_orphaned: int = 0
    dwells_without_click: int = 0
    shadows: int = 0
    rows_written: dict[str, int] = field(default_factory=dict)
    days: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


# the last exposure of a request_id counts: a caller that asked again used the later answer
_PREPARE = {
    # the window holds narrow rows alone: with the pages' text in it, some hundred pages of megabytes fill the memory
    "page": f"""
        SELECT *, logged // {DAY_MICROSECONDS} AS day FROM exposure WHERE entry IN (
            SELECT entry FROM (
                SELECT entry, row_number() OVER (PARTITION BY request_id ORDER BY logged DESC, entry DESC) AS turn
                FROM exposure
            ) AS asked WHERE turn = 1)""",
    "touched": """
        SELECT request_id, doc_id, max(dwell_seconds) AS dwell_seconds, bool_or(event = 'click') AS clicked,
            count(*) AS sent FROM event GROUP BY request_id, doc_id""",
    "action": """
        SELECT p.request_id, p.day, t.doc_id, t.clicked, t.sent, t.dwell_seconds,
            list_position(p.documents, t.doc_id)::INTEGER AS position
        FROM touched t JOIN page p USING (request_id) WHERE list_contains(p.documents, t.doc_id)""",
}


def _select(table: str, computed: dict[str, str]) -> str:
    """A SELECT list with every column of a table: computed where named, else taken from the record of that name."""
    return ", ".join(f"{computed[name]} AS {name}" if name in computed else name for name in TABLES[table].schema.names)


_EXPOSURE_COLUMNS = _select(
    "exposures",
    {
        "request_id": "p.request_id",
        "timestamp": "logged",
        "clicks": "coalesce(a.clicks, 0)::INTEGER",
        "clicked_positions": "coalesce(a.positions, []::INTEGER[])",
        "dwell_seconds": "coalesce(a.dwell, 0)::FLOAT",
    },
)
_EVENT_COLUMNS = _select(
    "events",
    {
        "request_id": "s.request_id",
        "doc_id": "s.doc_id",
        "timestamp": "logged",
        "title": "coalesce(title, '')",
        "summary": "coalesce(summary, '')",
        "position": "s.position",
        "clicked": "a.doc_id IS NOT NULL",
        "dwell_seconds": "coalesce(a.dwell_seconds, 0)::FLOAT",
    },
)
_TABLE_QUERIES = {
    "exposures": f"""
        SELECT {_EXPOSURE_COLUMNS}
        FROM page p LEFT JOIN (
            SELECT request_id, count(*) AS clicks, list_sort(list(position)) AS positions,
                sum(dwell_seconds) AS dwell
            FROM action WHERE day = $day GROUP BY request_id
        ) a USING (request_id)
        WHERE p.day = $day ORDER BY logged, p.request_id""",
    "events": f"""
        WITH shown AS (
            SELECT * EXCLUDE (documents, title, summary, scores, teams, place), place::INTEGER AS position,
                list_extract(documents, place::INTEGER) AS doc_id, list_extract(title, place::INTEGER) AS title,
                list_extract(summary, place::INTEGER) AS summary
            FROM (SELECT *, unnest(generate_series(1, array_length(documents))) AS place
                  FROM page WHERE day = $day AND array_length(documents) > 0) AS placed
        )
        SELECT {_EVENT_COLUMNS}
        FROM shown s LEFT JOIN (SELECT * FROM action WHERE day = $day) a
            ON a.request_id = s.request_id AND a.doc_id = s.doc_id
        ORDER BY logged, s.request_id, s.position""",
    "shadows": f"""
        SELECT {_select("shadows", {"timestamp": "logged"})} FROM (
            SELECT *, row_number() OVER (PARTITION BY request_id, model ORDER BY logged DESC, entry DESC) AS turn
            FROM shadow WHERE logged // {DAY_MICROSECONDS} = $day
        ) AS asked WHERE turn = 1
        ORDER BY logged, request_id, model""",
}


def compact(raw: Path, out: Path, settings: QueryEngineSettings) -> Summary:
    """Read the raw log folder, write the days that it holds into `out`, and count what was met on the way.

    A record that breaks its table goes to rejects.jsonl with file, line and reason, and is counted: one caller's page
    must not end compaction, and with it retention, for everybody. Waits for another program at work on `out`.
    InputError: no such folder, or a record of a kind that this release does not know.
    """
    out.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    with days_lock(out) as lock, lock.scratch(settings.temp_folder or out) as scratch:
        return _compact(raw, out, settings, scratch)


def _compact(raw: Path, out: Path, settings: QueryEngineSettings, scratch: Path) -> Summary:
    summary = Summary()
    quarantine = Quarantine()
    engine = settings.open_engine(scratch, tables_on_disk=True)
    try:
        small = _load(engine, raw, summary, quarantine)
        for name, query in _PREPARE.items():
            engine.table(name, query)
        _count(engine, summary)
        _write_days(engine, out, summary)
    except engine.problems as problem:
        raise InputError(f"{raw}: cannot be compacted: {told(engine, problem)}") from problem
    finally:
        engine.close()
    if path := quarantine.write(out):
        path.chmod(FILE_MODE)
    summary.rejected = len(quarantine.rejects)
    definitions: dict[str, Any] = {}
    for record in small["config"]:
        first_used = {"first_used": _iso(record["logged"]), "definition": record["definition"]}
        definitions.setdefault(record["fingerprint"], first_used)
    _merge_json(out / "experiments.json", definitions)
    ramps = {_iso(r["logged"]): {k: v for k, v in r.items() if k not in ("type", "logged")} for r in small["ramp"]}
    _merge_json(out / "ramps.json", ramps)
    return summary


def write_summary(out: Path, summary: Summary) -> None:
    """Write compact.json."""
    write_json(out / "compact.json", asdict(summary))


def _load(engine: QueryEngine, raw: Path, summary: Summary, quarantine: Quarantine) -> dict[str, list[dict[str, Any]]]:
    """Read every raw file into tables, block by block; returns the few records that become JSON files.

    The column `entry` numbers the records: of two that were logged in one microsecond, the higher was written later.
    """
    blocks: dict[str, list[Line]] = {kind: [] for kind in RECORDS}
    small: dict[str, list[dict[str, Any]]] = {kind: [] for kind in SMALL_RECORDS}
    counts = ReadCounts()
    sizes: dict[Path, int] = {}
    for path in log_files(raw):
        with still_there(path):
            sizes[path] = path.stat().st_size
    entries = dict.fromkeys(RECORDS, 0)
    with ExitStack() as stack:
        hidden = not bars_are_read()
        bar = stack.enter_context(
            tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="reading", disable=hidden)
        )
        writes = {
            kind: stack.enter_context(engine.filling(kind, schema.append(_ENTRY))) for kind, schema in RECORDS.items()
        }

        def insert() -> None:
            for kind, block in blocks.items():
                if block:
                    rows = quarantine.sound(kind, block)
                    writes[kind](rows.append_column(_ENTRY, pa.array(np.arange(len(rows)) + entries[kind])))
                    entries[kind] += len(rows)
                    block.clear()

        held_records = held_bytes = 0

        for path, size in sizes.items():
            for number, length, record in read_lines(path, counts):
                kind, line = str(record.get("type")), Line(path, number, record)
                if kind in blocks:
                    blocks[kind].append(line)
                    held_records, held_bytes = held_records + 1, held_bytes + length
                    if held_records >= BLOCK_RECORDS or held_bytes >= BLOCK_BYTES:
                        insert()
                        held_records = held_bytes = 0
                elif kind in small:
                    small[kind] += quarantine.whole(kind, line)
                else:
                    raise InputError(f"{path}: a record of type {kind!r}; it was written by a newer release")
            bar.update(size)
        insert()
    summary.files, summary.records, summary.torn_tails = counts.files, counts.records, counts.torn
    summary.damaged = counts.damaged
    return small


def _count(engine: QueryEngine, summary: Summary) -> None:
    def count(query: str) -> int:
        return int(single_value(engine, query) or 0)

    summary.exposures = count("SELECT count(*) FROM page")
    summary.exposures_repeated = count("SELECT count(*) FROM exposure") - summary.exposures
    summary.shadows = count("SELECT count(*) FROM shadow")
    read = count("SELECT count(*) FROM event")
    summary.events = count("SELECT sum(sent) FROM action")
    summary.events_orphaned = read - summary.events
    summary.dwells_without_click = count("SELECT count(*) FROM action WHERE NOT clicked")


def _write_days(engine: QueryEngine, out: Path, summary: Summary) -> None:
    days = [int(day) for (day,) in engine.rows("SELECT DISTINCT day FROM page ORDER BY day")]
    summary.days = [_date(day).isoformat() for day in days]
    for day in tqdm(days, desc="writing days", disable=not bars_are_read()):
        for table, query in _TABLE_QUERIES.items():
            if table == "shadows" and not summary.shadows:
                continue
            path = out / table / f"{_date(day)}.parquet"
            path.parent.mkdir(mode=FOLDER_MODE, exist_ok=True)
            rows = write_table(path, table, _pieces(engine.batches(query, day=day), table))
            path.chmod(FILE_MODE)
            if table == "shadows" and not rows:
                path.unlink()
            summary.rows_written[table] = summary.rows_written.get(table, 0) + rows


def _pieces(batches: Iterator[pa.RecordBatch], table: str) -> Iterator[pa.Table]:
    schema = TABLES[table].schema
    for batch in batches:
        piece = pa.Table.from_batches([batch])
        place = piece.schema.get_field_index("timestamp")
        yield piece.set_column(place, "timestamp", piece.column(place).cast(schema.field("timestamp").type))


def _date(day: int) -> date:
    return datetime.fromtimestamp(day * 86400, UTC).date()


def _iso(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat()


def _merge_json(path: Path, fresh: dict[str, Any]) -> None:
    """Add to a JSON object.

    What stood there stays: the raw files of earlier days may be gone, and exposures refer to it.
    """
    write_json(path, {**fresh, **read_small_file(path)})
    path.chmod(FILE_MODE)


def read_small_file(path: Path) -> dict[str, Any]:
    """experiments.json or ramps.json of a folder of days; empty if it is not there. InputError if it is no object."""
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(known, dict):
            raise ValueError("no object")
    except ValueError as problem:
        raise InputError(
            f"{path}: cannot be read ({problem}); put a copy back, or remove it: what the raw files say is written anew"
        ) from problem
    return known
