"""How long the A/B report takes over a large generated log, and its peak memory: the real program as a process."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import duckdb

from ranking.errors import InputError
from ranking.program import run

ROOT = Path(__file__).parents[2]


@dataclass
class Config:
    """Time clients/ab_report.py over generated logs.

    Args:
        rows: rows of the log, one run each
        table: "events" has a row per shown document (10 a page), "exposures" a row per page
        scratch: folder for the generated log; a temporary one when left out
        out: Markdown file for the results; printed only when left out
    """

    rows: list[int] = field(default_factory=lambda: [500_000, 5_000_000, 50_000_000])
    table: Literal["events", "exposures"] = "events"
    scratch: Path | None = None
    out: Path | None = None


# a user has 12 pages on average; click rates differ by user and the student's are 3% higher
_PAGE = """SELECT p, hash(p * 7919) % {users} AS u, epoch_ms(1793491200000 + (hash(p) % 1209600000)::BIGINT) AS t,
 (hash(hash(p * 7919) % {users} + 13) % 2) = 1 AS treated FROM range({start}, {end}) r(p)"""
_CLICK = "(hash(p * 31 + 1) % 100000) < (15000 + hash(u + 5) % 30000) * CASE WHEN treated THEN 1.03 ELSE 1 END"
_COMMON = "'u' || u AS user_id, t::TIMESTAMPTZ AS timestamp, 'query ' || (hash(p * 3) % 9973)::VARCHAR AS query"
_ARM = "CASE WHEN treated THEN 'student' ELSE 'baseline' END AS arm"
SQL = {
    "events": f"""SELECT 'r' || p AS request_id, 'd' || k AS doc_id, {_COMMON},
 'a title' AS title, 'a summary' AS summary, (k + 1)::INT AS position, (k = 0 AND {_CLICK}) AS clicked,
 (CASE WHEN k = 0 AND {_CLICK} THEN 1 + hash(p) % 90 ELSE 0 END)::FLOAT AS dwell_seconds, {_ARM}
 FROM ({_PAGE}), range(10) d(k)""",
    "exposures": f"""SELECT 'r' || p AS request_id, {_COMMON}, 'large' AS experiment, {_ARM}, '' AS fallback,
 '1' AS model_version,
 (5 + hash(p * 17) % 2000 / 100)::FLOAT AS latency_ms, 'web' AS platform, false AS forced, []::VARCHAR[] AS teams,
 []::INT[] AS clicked_positions, ({_CLICK})::INT AS clicks,
 (CASE WHEN {_CLICK} THEN 1 + hash(p) % 90 ELSE 0 END)::FLOAT AS dwell_seconds FROM ({_PAGE})""",
}


def generate(folder: Path, table: Literal["events", "exposures"], rows: int) -> Path:
    """Write the log in files of about a million rows; returns what --events takes."""
    target = folder / "exposures" if table == "exposures" else folder
    target.mkdir(parents=True)
    per_page = 10 if table == "events" else 1
    pages, step = rows // per_page, 1_000_000 // per_page
    connection = duckdb.connect(config={"threads": 2, "memory_limit": "2GB"})
    for number, start in enumerate(range(0, pages, step)):
        query = SQL[table].format(users=max(pages // 12, 100), start=start, end=min(start + step, pages))
        connection.execute(f"COPY ({query}) TO '{target / f'{number:05}.parquet'}' (COMPRESSION zstd)")
    return folder


def measure(rows: int, table: Literal["events", "exposures"], scratch_parent: Path | None) -> str:
    """A row of the results table. InputError if the report fails."""
    scratch = Path(tempfile.mkdtemp(dir=scratch_parent))
    try:
        log = generate(scratch / "log", table, rows)
        before = time.perf_counter()
        command = [sys.executable, "clients/ab_report.py", "--events", str(log), "--out", str(scratch / "report.html")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - before
        if done.returncode != 0:
            raise InputError(f"the report failed over {rows:,} rows: {done.stderr.strip()}")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        return f"| {rows:,} | {seconds:.1f} s | {rows / seconds / 1e6:.2f} M | {peak:.2f} GiB |"
    finally:
        shutil.rmtree(scratch)


def main(config: Config) -> None:
    """Measure every size, smallest first, print the table and append it to --out."""
    lines = ["| rows | report | rows a second | peak memory so far |", "|---|---|---|---|"]
    for rows in sorted(config.rows):
        lines.append(measure(rows, config.table, config.scratch))
        print(lines[-1], file=sys.stderr)
    report = f"Table `{config.table}`.\n\n" + "\n".join(lines)
    print(report)
    if config.out is not None:
        with config.out.open("a", encoding="utf-8") as stream:
            stream.write(f"\n`python -m benchmarks.ab.report --table {config.table}`\n\n{report}\n")


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.ab.report --rows 500000,5000000")
