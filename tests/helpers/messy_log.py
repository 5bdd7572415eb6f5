"""A click log as it should not be: columns that differ, bad rows, names that are patterns elsewhere; and a pool."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ranking.schema import TABLES

SPELLINGS = (
    "red tent",
    "Red  Tent",
    "ＲＥＤ tent",
    "red\u00a0tent",
    "crème brûlée",
    "CRE\u0300ME BRÛLÉE",
    "東京 ホテル",
)


def good_events() -> list[dict]:
    """Rows of the events table: several spellings of a query, a robot, empty titles."""
    rng, rows = np.random.default_rng(3), []
    for page in range(400):
        user = "robot" if page % 9 == 0 else f"u{page % 23}"
        for position, doc in enumerate(rng.permutation(8)[:5], 1):
            clicked = bool(rng.random() < (0.9 if user == "robot" else 0.5 / position))
            rows.append(
                {
                    "request_id": f"{page}", "doc_id": f"{doc}", "user_id": user,
                    "timestamp": dt.datetime(2026, 1, 1, tzinfo=dt.UTC) + dt.timedelta(hours=7 * page),
                    "query": SPELLINGS[page % 7], "title": ["", "\u3000", f"title {doc}"][min(doc, 2)],
                    "summary": "" if doc < 2 else f"of {page % 3}", "position": position, "clicked": clicked,
                    "dwell_seconds": float(rng.choice([3.0, 29.9, 30.0, 90.5])) if clicked else 0.0, "arm": "",
                }
            )  # fmt: skip
    return rows


def messy_events() -> list[dict]:
    """The same with blank and over-long text, times and dwells that are none, and keys that come twice."""
    rows = good_events()
    faults = [
        ("query", "\u200b \ufe0f"), ("query", None), ("dwell_seconds", float("nan")), ("dwell_seconds", float("inf")),
        ("dwell_seconds", -1.0), ("position", 0), ("doc_id", "\t"), ("title", "x" * ((1 << 20) + 1)), ("clicked", None),
    ]  # fmt: skip
    for place, (name, value) in zip(range(50, 1500, 150), faults):
        rows[place] |= {name: value}
    return [*rows, rows[3], rows[700], rows[3]]


def write_pool(folder: Path) -> str:
    """Candidates in two files: spellings of one query under several ids, documents that others repeat, one bad row."""
    folder.mkdir()
    rows = [
        {
            "query_id": f"q{number}", "doc_id": f"d{doc:02d}", "query": query, "title": f"{query} {doc % 20}",
            "summary": f"of {doc % 10} ways to a tent",
        }
        for number, query in enumerate([*SPELLINGS, "desk lamp", "oak table", "a kettle"]) for doc in range(number, 30)
    ]  # fmt: skip
    rows[40] |= {"title": "x" * ((1 << 20) + 1)}
    whole = pa.Table.from_pylist(rows, TABLES["candidates"].schema)
    pq.write_table(whole.slice(0, 100), folder / "pool [1].parquet")
    pq.write_table(whole.slice(100), folder / "pool [2].parquet")
    return str(folder)


def write_messy_log(folder: Path) -> str:
    """Three files that spell their columns differently, with names that are patterns or escapes elsewhere."""
    folder.mkdir()
    rows = pa.Table.from_pylist(messy_events(), pa.schema([f.with_nullable(True) for f in TABLES["events"].schema]))

    def cast(piece: pa.Table, **kinds) -> pa.Table:
        for name, kind in kinds.items():
            place = piece.schema.get_field_index(name)
            piece = piece.set_column(place, name, piece.column(name).cast(kind))
        return piece

    first, second, third = rows.slice(0, 700), rows.slice(700, 700), rows.slice(1400)
    pq.write_table(cast(first, timestamp=pa.timestamp("ns", tz="UTC")), folder / "log[1].parquet")
    pq.write_table(
        cast(second, request_id=pa.int64(), clicked=pa.int8(), dwell_seconds=pa.float64()),
        folder / "a b+c%20.parquet",
    )
    (folder / "day=2026-01-05").mkdir()
    pq.write_table(cast(third, timestamp=pa.timestamp("us")), folder / "day=2026-01-05" / "é.parquet")
    return str(folder)
