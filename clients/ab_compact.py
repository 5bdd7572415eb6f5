"""Turn the router's raw log into Parquet by day: exposures, events, shadows (docs/ab-log.md).

python clients/ab_compact.py --log runs/ab/log --out runs/ab/data

Rerun it as often as you like: each day that still has raw files is written anew, aside and renamed into place.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from tqdm import tqdm

from clients.ab.log import DAY_MICROSECONDS, ReadCounts, log_files, read_file
from ranking.errors import InputError
from ranking.files import write_json
from ranking.program import run
from ranking.schema import TABLES, write_table

log = logging.getLogger("ab_compact")

BLOCK_RECORDS = 20_000


@dataclass
class Config:
    """Compact the A/B router's log into Parquet tables by day.

    Args:
        log: folder of raw log files, as ab_router writes it
        out: folder for exposures/, events/, shadows/ and compact.json
        memory: memory that DuckDB may use; beyond it, it spills to --scratch
        scratch: folder for temporary files, default beside --out
        retain_days: remove raw files and Parquet days older than this many whole UTC days; 0 keeps everything
    """

    log: Path
    out: Path
    memory: str = "2GB"
    scratch: Path | None = None
    retain_days: int = 0

    def __post_init__(self):
        if self.retain_days < 0:
            raise ValueError("retain_days must be 0 or more")


@dataclass
class Summary:
    """compact.json. Every record read is in exactly one of the counts of its kind."""

    files: int = 0
    records: int = 0
    torn_tails: int = 0
    damaged: list[str] = field(default_factory=list)
    exposures: int = 0
    exposures_repeated: int = 0
    events: int = 0
    events_orphaned: int = 0
    dwells_without_click: int = 0
    shadows: int = 0
    rows_written: dict[str, int] = field(default_factory=dict)
    days: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


_TEXT, _TEXTS = pa.string(), pa.list_(pa.string())
_RAW = {
    "exposure": pa.schema([
        ("logged", pa.int64()), ("request_id", _TEXT), ("user_id", _TEXT), ("experiment", _TEXT), ("arm", _TEXT),
        ("served_by", _TEXT), ("fallback", _TEXT), ("model_version", _TEXT), ("latency_ms", pa.float32()), ("query", _TEXT),
        ("query_length", pa.int32()), ("platform", _TEXT), ("segments", _TEXT), ("forced", pa.bool_()), ("documents", _TEXTS),
        ("scores", pa.list_(pa.float32())), ("teams", _TEXTS), ("title", _TEXTS), ("summary", _TEXTS), ("config", _TEXT),
    ]),
    "event": pa.schema([
        ("logged", pa.int64()), ("request_id", _TEXT), ("doc_id", _TEXT), ("event", _TEXT), ("dwell_seconds", pa.float32()),
    ]),
    "shadow": pa.schema([
        ("logged", pa.int64()), ("request_id", _TEXT), ("experiment", _TEXT), ("arm", _TEXT), ("model", _TEXT),
        ("failure", _TEXT), ("latency_ms", pa.float32()), ("documents", _TEXTS), ("scores", pa.list_(pa.float32())),
    ]),
}  # fmt: skip

# the last exposure of a request_id counts: a caller that asked again used the later answer
_PREPARE = """
CREATE TABLE page AS SELECT *, logged // {day} AS day FROM exposure
    QUALIFY row_number() OVER (PARTITION BY request_id ORDER BY logged DESC, rowid DESC) = 1;
CREATE TABLE touched AS SELECT request_id, doc_id, max(dwell_seconds) AS dwell_seconds, bool_or(event = 'click') AS clicked,
    count(*) AS sent FROM event GROUP BY request_id, doc_id;
CREATE TABLE action AS SELECT p.request_id, p.day, t.doc_id, t.clicked, t.sent, t.dwell_seconds,
    list_position(p.documents, t.doc_id)::INTEGER AS position
    FROM touched t JOIN page p USING (request_id) WHERE list_contains(p.documents, t.doc_id);
"""

_EXPOSURES = """
SELECT p.request_id, user_id, logged AS timestamp, experiment, arm, served_by, fallback, model_version, latency_ms, query,
    query_length, platform, segments, forced, documents, scores, teams,
    coalesce(a.clicks, 0)::INTEGER AS clicks, coalesce(a.positions, []::INTEGER[]) AS clicked_positions,
    coalesce(a.dwell, 0)::FLOAT AS dwell_seconds, config
FROM page p LEFT JOIN (
    SELECT request_id, count(*) AS clicks, list(position ORDER BY position) AS positions, sum(dwell_seconds) AS dwell
    FROM action WHERE day = $day GROUP BY request_id
) a USING (request_id)
WHERE p.day = $day ORDER BY logged, p.request_id
"""

_EVENTS = """
WITH shown AS (
    SELECT request_id, logged, user_id, query, arm, unnest(documents) AS doc_id, unnest(title) AS title,
        unnest(summary) AS summary, generate_subscripts(documents, 1)::INTEGER AS position
    FROM page WHERE day = $day
)
SELECT s.request_id, s.doc_id, user_id, logged AS timestamp, query, coalesce(title, '') AS title,
    coalesce(summary, '') AS summary, s.position, a.doc_id IS NOT NULL AS clicked,
    coalesce(a.dwell_seconds, 0)::FLOAT AS dwell_seconds, arm
FROM shown s LEFT JOIN (SELECT * FROM action WHERE day = $day) a ON a.request_id = s.request_id AND a.doc_id = s.doc_id
ORDER BY logged, s.request_id, s.position
"""

_SHADOWS = """
SELECT request_id, logged AS timestamp, experiment, arm, model, failure, latency_ms, documents, scores
FROM shadow WHERE logged // {day} = $day
QUALIFY row_number() OVER (PARTITION BY request_id, model ORDER BY logged DESC) = 1 ORDER BY logged, request_id, model
"""


def load(database: duckdb.DuckDBPyConnection, folder: Path, summary: Summary) -> dict[str, list[dict[str, Any]]]:
    """Read every raw file into the database, block by block; returns the few records of other kinds (config, ramp)."""
    for kind, schema in _RAW.items():
        empty = schema.empty_table()
        database.register("empty", empty)
        database.execute(f"CREATE TABLE {kind} AS SELECT * FROM empty")
        database.unregister("empty")
    blocks: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _RAW}
    others: dict[str, list[dict[str, Any]]] = {"config": [], "ramp": []}
    counts = ReadCounts()
    files = log_files(folder)
    with tqdm(total=sum(f.stat().st_size for f in files), unit="B", unit_scale=True, desc="reading") as bar:
        for path in files:
            for record in read_file(path, counts):
                kind = str(record.get("type"))
                if kind in blocks:
                    blocks[kind].append(record)
                    if len(blocks[kind]) >= BLOCK_RECORDS:
                        _insert(database, kind, blocks[kind])
                elif kind in others:
                    others[kind].append(record)
                else:
                    raise InputError(f"{path}: a record of type {kind!r}; it was written by a newer release")
            bar.update(path.stat().st_size)
    for kind, block in blocks.items():
        _insert(database, kind, block)
    summary.files, summary.records, summary.torn_tails = counts.files, counts.records, counts.torn
    summary.damaged = counts.damaged
    return others


def _insert(database: duckdb.DuckDBPyConnection, kind: str, block: list[dict[str, Any]]) -> None:
    if block:
        rows = pa.Table.from_pylist(block, schema=_RAW[kind])
        database.register("block", rows)
        database.execute(f"INSERT INTO {kind} SELECT * FROM block")
        database.unregister("block")
        block.clear()


def compact(config: Config) -> Summary:
    """Read --log, write the days it holds into --out; returns the counts that compact.json holds."""
    summary = Summary()
    config.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".compact-", dir=config.scratch or config.out))
    try:
        with duckdb.connect(str(scratch / "compact.duckdb")) as database:
            database.execute("SET memory_limit = $1", [config.memory])
            database.execute("SET temp_directory = $1", [str(scratch)])
            database.execute("SET enable_progress_bar = false")
            others = load(database, config.log, summary)
            database.execute(_PREPARE.format(day=DAY_MICROSECONDS))
            _count(database, summary)
            _write_days(database, config.out, summary)
    except duckdb.Error as problem:
        raise InputError(f"{config.log}: cannot be compacted: {' '.join(str(problem).split())[:300]}") from problem
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    definitions: dict[str, Any] = {}
    for record in others["config"]:
        definitions.setdefault(
            record["fingerprint"], {"first_used": _iso(record["logged"]), "definition": record["definition"]}
        )
    _merge_json(config.out / "experiments.json", definitions)
    ramps = {_iso(r["logged"]): {k: v for k, v in r.items() if k not in ("type", "logged")} for r in others["ramp"]}
    _merge_json(config.out / "ramps.json", ramps)
    if config.retain_days:
        summary.removed = retire(config, datetime.now(UTC).date())
    write_json(config.out / "compact.json", asdict(summary))
    return summary


def _count(database: duckdb.DuckDBPyConnection, summary: Summary) -> None:
    def one(query: str) -> int:
        return int(database.execute(query).fetchall()[0][0] or 0)

    summary.exposures = one("SELECT count(*) FROM page")
    summary.exposures_repeated = one("SELECT count(*) FROM exposure") - summary.exposures
    summary.shadows = one("SELECT count(*) FROM shadow")
    read = one("SELECT count(*) FROM event")
    summary.events = one("SELECT sum(sent) FROM action")
    summary.events_orphaned = read - summary.events
    summary.dwells_without_click = one("SELECT count(*) FROM action WHERE NOT clicked")


def _write_days(database: duckdb.DuckDBPyConnection, out: Path, summary: Summary) -> None:
    days = [int(row[0]) for row in database.execute("SELECT DISTINCT day FROM page ORDER BY day").fetchall()]
    summary.days = [_date(day).isoformat() for day in days]
    for day in tqdm(days, desc="writing days"):
        for table, query in (("exposures", _EXPOSURES), ("events", _EVENTS), ("shadows", _SHADOWS)):
            reader = database.sql(query.format(day=DAY_MICROSECONDS), params={"day": day}).to_arrow_reader(65536)
            path = out / table / f"{_date(day)}.parquet"
            if table == "shadows" and not summary.shadows:
                continue
            rows = write_table(path, table, _pieces(reader, table))
            if table == "shadows" and not rows:
                path.unlink()
            summary.rows_written[table] = summary.rows_written.get(table, 0) + rows


def _pieces(reader: pa.RecordBatchReader, table: str) -> Iterator[pa.Table]:
    schema = TABLES[table].schema
    for batch in reader:
        piece = pa.Table.from_batches([batch])
        place = piece.schema.get_field_index("timestamp")
        yield piece.set_column(place, "timestamp", piece.column(place).cast(schema.field("timestamp").type))


def retire(config: Config, today: date) -> list[str]:
    """Remove raw files and Parquet days older than retain_days whole days, oldest first; returns their names."""
    first_kept = (today - timedelta(days=config.retain_days)).isoformat()
    old = [path for path in log_files(config.log) if path.name[:10] < first_kept]
    for table in ("exposures", "events", "shadows"):
        old += [path for path in sorted((config.out / table).glob("*.parquet")) if path.stem < first_kept]
    for path in sorted(old, key=lambda p: p.name):
        path.unlink()
        log.info("removed %s, older than %s", path, first_kept)
    return [str(path) for path in old]


def _date(day: int) -> date:
    return datetime.fromtimestamp(day * 86400, UTC).date()


def _iso(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat()


def _merge_json(path: Path, fresh: dict[str, Any]) -> None:
    """What stood there stays: the raw files of earlier days may be gone, and exposures still refer to it."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**fresh, **known})


def main(config: Config) -> None:
    summary = compact(config)
    print(
        f"{summary.exposures} exposures ({summary.exposures_repeated} repeated), {summary.events} events "
        f"({summary.events_orphaned} orphaned), {summary.shadows} shadows over {len(summary.days)} days -> {config.out}"
    )
    if summary.torn_tails or summary.damaged:
        log.warning("%d torn tails skipped, %d damaged lines: %s", summary.torn_tails, len(summary.damaged),
                    ", ".join(summary.damaged[:5]) or "-")  # fmt: skip


if __name__ == "__main__":
    run(main, Config, example="python clients/ab_compact.py --log runs/ab/log --out runs/ab/data")
