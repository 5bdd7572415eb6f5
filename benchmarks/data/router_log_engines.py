"""The A/B router's log compacted and reported on DuckDB and on Spark: time, memory, and whether both give the same.

The raw log has days of pages of ten documents in two arms, with clicks, dwell times and repeated events, as the router
writes it. Tables must be equal row by row, and every figure of the report to 1e-9.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from benchmarks.data.log_engines import Engines, measure
from clients.ab.log.lines import DAY_MICROSECONDS, encode
from ranking.errors import InputError
from ranking.program import run

LOGGER = logging.getLogger(__name__)
DOCUMENTS = 10
FIRST_DAY = 20_000  # days since 1970
PAGES_PER_USER = 12


@dataclass(kw_only=True)
class Config(Engines):
    """Measure ab_compact and ab_report on DuckDB and on Spark and print a table of both.

    Args:
        pages: logged pages, of ten documents each
        days: over which they are spread
    """

    pages: int = 1_000_000
    days: int = 3


def write_raw_log(folder: Path, config: Config) -> int:
    """Write a raw log file for each day; returns how many clicks and dwell times it holds."""
    folder.mkdir()
    rng, events = np.random.default_rng(3), 0
    per_day = -(-config.pages // config.days)
    users = max(2, config.pages // PAGES_PER_USER)
    for day in range(config.days):
        count = min(per_day, config.pages - day * per_day)
        clicked, turn = rng.random((count, DOCUMENTS)), rng.integers(0, users, count)
        latency, dwell = rng.lognormal(2, 0.4, count), rng.exponential(30, (count, DOCUMENTS))
        step = DAY_MICROSECONDS // (count + 1)
        with (folder / f"day-{day}.ablog").open("wb") as log:
            for page in tqdm(range(count), desc=f"day {day}", leave=False):
                number, logged = day * per_day + page, (FIRST_DAY + day) * DAY_MICROSECONDS + page * step
                arm = ("baseline", "student")[int(turn[page]) % 2]
                first = number * 7 % 90_000
                exposure = {
                    "type": "exposure", "logged": logged, "request_id": f"r{number}", "user_id": f"u{turn[page]}",
                    "experiment": "exp", "arm": arm, "served_by": arm, "model_version": "1",
                    "fallback": "timeout" if number % 97 == 0 else "", "latency_ms": float(latency[page]),
                    "platform": ("web", "ios")[number % 2],
                    "query": f"query {number % 50_000}", "query_length": 11, "segments": "{}", "forced": False,
                    "documents": [f"d{first + i}" for i in range(DOCUMENTS)], "config": "f1", "teams": [],
                    "scores": [1.0 - 0.1 * i for i in range(DOCUMENTS)],
                }  # fmt: skip
                log.write(encode(exposure))
                for place in np.flatnonzero(clicked[page] < 0.25 / (1 + np.arange(DOCUMENTS))):
                    event = {"type": "event", "logged": logged + 1, "request_id": f"r{number}", "timestamp": None}
                    event |= {"doc_id": f"d{first + place}"}
                    seconds = float(dwell[page, place])
                    lines = [event | {"event": "click", "dwell_seconds": 0.0}] * (1 + (number % 5 == 0))
                    lines.append(event | {"event": "dwell", "dwell_seconds": seconds})
                    log.writelines(map(encode, lines))
                    events += len(lines)
    return events


def main(config: Config) -> None:
    """Compact the log and report on it with every engine, compare, and print the table."""
    with tempfile.TemporaryDirectory(dir=config.temp_folder) as name:
        folder = Path(name)
        events = write_raw_log(folder / "log", config)
        rows, made = [], {}
        for engine in config.engine:
            tables, page = folder / engine, folder / f"{engine}.html"
            for program, flags in (
                ("compact", ["--log", folder / "log", "--out", tables]),
                ("report", ["--events", tables, "--out", page]),
            ):
                seconds, peak = measure([f"clients/ab_{program}.py", *map(str, flags), *config.flags(engine)])
                rows.append(f"| {program} | {engine} | {seconds:.1f} | {peak:.2f} |")
                LOGGER.info("%s", rows[-1])
            figures = json.loads(page.with_suffix(".json").read_text())
            del figures["basis"]["log"]  # the folder's name
            made[engine] = tables, figures
        (tables, figures), *others = made.values()
        for other_tables, other_figures in others:
            compare_tables(tables, other_tables)
            compare_figures(figures, other_figures)
    print(
        f"{config.pages:,} pages with {config.pages * DOCUMENTS:,} shown documents and {events:,} clicks and dwell "
        f"times over {config.days} days, {config.described()} The engines gave the same tables and the same report.\n"
    )
    print("| program | engine | seconds | peak GiB |\n|---|---|---:|---:|", *rows, sep="\n")


def compare_tables(one: Path, other: Path) -> None:
    """InputError unless two folders of compacted days hold the same rows in the same order."""
    files = sorted(path.relative_to(one) for path in one.rglob("*.parquet"))
    if not files or files != sorted(path.relative_to(other) for path in other.rglob("*.parquet")):
        raise InputError(f"{one} and {other} hold different days")
    for file in files:
        if not pq.read_table(one / file).equals(pq.read_table(other / file)):
            raise InputError(f"{file} differs between the engines")


def compare_figures(one: Any, other: Any, name: str = "report") -> None:
    """InputError unless two reports have the same texts and structure, and numbers equal to 1e-9."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key, value in one.items():
            compare_figures(value, other[key], f"{name}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for place, value in enumerate(one):
            compare_figures(value, other[place], f"{name}[{place}]")
    elif isinstance(one, float) and isinstance(other, float):
        if not math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12):
            raise InputError(f"{name}: {one} and {other}")
    elif one != other:
        raise InputError(f"{name}: {one} and {other}")


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.data.router_log_engines --pages 100000")
