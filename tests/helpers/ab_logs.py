"""Compacted A/B logs of made-up users, for the report, the judging page and their screens."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ranking.schema import TABLES, write_table

START = np.datetime64("2026-11-01T00:00:00", "us")


def exposures(
    users: int = 6000, lift: float = 0.15, seed: int = 0, days: float = 10, treatment_share: float = 0.5
) -> pa.Table:
    """A log of one experiment: pages of users with their own click rate, the student's raised by `lift`."""
    rng = np.random.default_rng(seed)
    pages = rng.geometric(0.25, users)
    user = np.repeat(np.arange(users), pages)
    n = len(user)
    student = (rng.random(users) < treatment_share)[user]
    rate = rng.beta(1.2, 2.8, users)[user] * (1 + lift * student)
    clicked = rng.random(n) < np.minimum(rate, 1)
    moments = START + (rng.random(n) * days * 86_400e6).astype("timedelta64[us]")
    queries = np.array([f"{'very ' * (i % 5)}good thing {i}" for i in range(200)])
    columns = {
        "request_id": [f"r{i}" for i in range(n)],
        "user_id": [f"u{i}" for i in user],
        "timestamp": pa.array(moments).cast(pa.timestamp("us", tz="UTC")),
        "experiment": ["shoes"] * n,
        "arm": np.where(student, "student", "baseline"),
        "served_by": np.where(student, "student", "baseline"),
        "fallback": np.where(rng.random(n) < 0.02, "timeout", ""),
        "model_version": np.where(student, "2", "1"),
        "latency_ms": rng.lognormal(2.3, 0.4, n),
        "query": queries[np.minimum(rng.zipf(1.5, n), 200) - 1],
        "query_length": [9] * n,
        "platform": np.where(rng.random(n) < 0.6, "mobile", "desktop"),
        "segments": ["{}"] * n,
        "forced": np.zeros(n, bool),
        "documents": [["a", "b"]] * n,
        "scores": [[1.0, 0.5]] * n,
        "teams": pa.array([[]] * n, pa.list_(pa.string())),
        "clicks": clicked.astype(np.int32),
        "clicked_positions": pa.array([[1] if c else [] for c in clicked], pa.list_(pa.int32())),
        "dwell_seconds": clicked * rng.lognormal(3.5, 0.8, n),
        "config": ["c"] * n,
    }
    schema = TABLES["exposures"].schema
    return pa.table(
        {name: pa.array(columns[name]).cast(schema.field(name).type) for name in schema.names}, schema=schema
    )


def save(folder: Path, log: pa.Table) -> Path:
    write_table(folder / "exposures" / "2026-11-01.parquet", "exposures", log)
    return folder


def started(log: pa.Table, start: str) -> pa.Table:
    """The log with the pages before `start`, an ISO day, outside every experiment, as the router logs them then."""
    early = pc.less(log.column("timestamp"), pa.scalar(dt.datetime.fromisoformat(f"{start}T00:00:00+00:00")))
    for name in ("experiment", "arm"):
        place = log.column_names.index(name)
        log = log.set_column(place, log.schema.field(name), pc.if_else(early, "", log.column(name)))
    return log


def log_of(folder, pages: dict[str, int], users: int = 10, named: str = "u"):
    """A compacted log in which each query has so many pages, by up to so many users, whose ids begin with `named`."""
    rows = []
    for query, count in pages.items():
        for number in range(count):
            rows.append(
                {
                    "request_id": f"{query}-{number}", "user_id": f"{named}{number % users}",
                    "experiment": "", "arm": "",
                    "timestamp": dt.datetime(2026, 1, 5, tzinfo=dt.UTC), "served_by": "student", "fallback": "",
                    "model_version": "1", "latency_ms": 1.0, "query": query, "query_length": 1, "platform": "",
                    "segments": "{}", "forced": False, "documents": ["a"], "scores": [1.0], "teams": [], "clicks": 0,
                    "clicked_positions": [], "dwell_seconds": 0.0, "config": "",
                }
            )  # fmt: skip
    (folder / "exposures").mkdir(parents=True)
    table = pa.Table.from_pylist(rows, TABLES["exposures"].schema)
    write_table(folder / "exposures" / "2026-01-05.parquet", "exposures", table)
    return folder
