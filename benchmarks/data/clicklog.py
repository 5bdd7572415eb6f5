"""How long prepare_clicks takes, and how much memory, for 0.6, 6 and 60 million events.

The log is generated, shaped like a real one: ten results a page, a long
tail of queries and documents that grows with the log, clicks by the world's PBM. prepare_clicks then runs as its own
process, so that its time and peak memory are its own; its propensities are compared with the true ones.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from ranking.click_models import ClickModel
from ranking.database import DuckDbSettings
from ranking.errors import InputError
from ranking.program import run
from ranking.schema import TABLES
from training.world.dataset import WorldConfig, make_world

LOGGER = logging.getLogger(__name__)
SHOWN, CANDIDATES = 10, 20
PAGES_PER_QUERY, PAGES_PER_DOCUMENT, PAGES_PER_USER = 4, 3, 6
GRADES = np.array([4, 4, 3, 2, 2, 2, 1, 1, 1, *[0] * 11])
CHUNK_PAGES = 50_000
DICTIONARY = pa.dictionary(pa.int32(), pa.string())


@dataclass(kw_only=True)
class Config(DuckDbSettings):
    """Measure prepare_clicks on generated logs and write docs/results/clicklog.md.

    Args:
        events: log sizes in events
        out: the results page
        duckdb_threads: DuckDB's threads, of which the published figures have two
        temp_folder: where the generated log goes too; 60 million events take about 2 GB, removed afterwards
        note: a line on the machine for the results page
    """

    events: list[int] = field(default_factory=lambda: [600_000, 6_000_000, 60_000_000])
    out: Path = Path("docs/results/clicklog.md")
    duckdb_threads: int = 2
    note: str = ""

    def __post_init__(self):
        super().__post_init__()
        if not self.events or min(self.events) < 1000:
            raise ValueError(f"events is {self.events}: sizes of at least 1000 are needed")


@dataclass
class Texts:
    """Pools that pages draw from: the distinct texts are few, the ids many."""

    queries: pa.Array
    titles: pa.Array
    summaries: pa.Array


def texts() -> Texts:
    """The texts of a world, from which the log's pages draw."""
    world = make_world(WorldConfig(documents=20_000, log_queries=20_000, unlabelled_queries=1))
    documents = world.documents
    return Texts(pa.array([query.text for query in world.logged]), documents.titles, documents.summaries)


def numbered(prefix: str, numbers: np.ndarray) -> pa.Array:
    """The prefix followed by each number, as text [n]."""
    return pc.binary_join_element_wise(prefix, pc.cast(pa.array(numbers), pa.string()), "")


def chunks(events: int, pool: Texts, model: ClickModel) -> Iterator[pa.Table]:
    """The log in pieces of CHUNK_PAGES pages."""
    pages = events // SHOWN
    queries, documents = max(1, pages // PAGES_PER_QUERY), max(100, pages // PAGES_PER_DOCUMENT)
    users = max(100, pages // PAGES_PER_USER)
    rng = np.random.default_rng(7)
    start = np.datetime64("2026-01-05T00:00:00", "us").astype(np.int64)
    for first in range(0, pages, CHUNK_PAGES):
        n = min(CHUNK_PAGES, pages - first)
        # a uniform number raised to a power: few queries get many pages, most get one or two
        query = (queries * rng.random(n) ** 3).astype(np.int64)
        grades = np.broadcast_to(GRADES, (n, CANDIDATES))
        noise = rng.standard_normal((n, CANDIDATES), dtype=np.float32)
        order = np.argsort(-(0.5 * grades + noise), axis=1)[:, :SHOWN]
        visits = model.simulate(np.take_along_axis(grades, order, 1), rng)
        doc = ((query[:, None] * CANDIDATES + order) * 2_654_435_761 % documents).ravel()
        # a hash can give a page the same document twice: the second one becomes another document of its own
        doc = _distinct_on_page(doc.reshape(n, SHOWN), documents).ravel()
        page = np.repeat(np.arange(n), SHOWN)
        base, turn = query % len(pool.queries), query // len(pool.queries)
        typed = pc.binary_join_element_wise(pool.queries.take(base), pc.cast(pa.array(turn), pa.string()), " ")
        spread = np.sort(rng.integers(0, 86_400_000_000, n)) + start + first * 100_000
        text = pa.array(doc % len(pool.titles), pa.int32())
        yield pa.table(
            {
                "request_id": numbered("r", first + np.arange(n)).take(page),
                "doc_id": numbered("d", doc),
                "user_id": numbered("u", rng.integers(0, users, n)).take(page),
                "timestamp": pa.array(spread, pa.timestamp("us", tz="UTC")).take(page),
                "query": pa.DictionaryArray.from_arrays(pa.array(page, pa.int32()), typed),
                "title": pa.DictionaryArray.from_arrays(text, pool.titles),
                "summary": pa.DictionaryArray.from_arrays(text, pool.summaries),
                "position": pa.array(np.tile(np.arange(1, SHOWN + 1, dtype=np.int32), n)),
                "clicked": visits.clicked.ravel(),
                "dwell_seconds": visits.dwell_seconds.ravel(),
                "arm": pa.DictionaryArray.from_arrays(pa.array(np.zeros(n * SHOWN, np.int32)), pa.array(["logged"])),
            }
        )


def _distinct_on_page(doc: np.ndarray, documents: int) -> np.ndarray:
    for position in range(1, doc.shape[1]):
        while (same := (doc[:, :position] == doc[:, position, None]).any(1)).any():
            doc[same, position] = (doc[same, position] + 1) % documents
    return doc


def write_log(path: Path, events: int, pool: Texts, model: ClickModel) -> None:
    """Write a generated log of about that many events, piece by piece."""
    names = ("query", "title", "summary", "arm")
    schema = pa.schema([f.with_type(DICTIONARY) if f.name in names else f for f in TABLES["events"].schema])
    total = -(-events // SHOWN // CHUNK_PAGES)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for chunk in tqdm(chunks(events, pool, model), total=total, desc=f"log of {events:,}", leave=False):
            writer.write_table(chunk.cast(schema))


def measure(log: Path, config: Config, out: Path) -> tuple[float, float]:
    """Run prepare_clicks on a log in a process of its own; returns seconds and peak resident GiB."""
    command = [sys.executable, "-m", "training.prepare_clicks", "--events", str(log), "--out", str(out)]
    command += ["--duckdb-memory-gb", str(config.duckdb_memory_gb), "--duckdb-threads", str(config.duckdb_threads)]
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)  # this child's own peak, not the largest of all children
    seconds = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status):
        raise InputError(f"prepare_clicks failed on {log}")
    return seconds, usage.ru_maxrss / (1 << 20)


def main(config: Config) -> None:
    """Measure every log size and write the results page."""
    model = ClickModel()
    pool = texts()
    rows = []
    with tempfile.TemporaryDirectory(dir=config.temp_folder) as folder:
        for events in config.events:
            log, clicks = Path(folder) / "events.parquet", Path(folder) / "clicks.parquet"
            write_log(log, events, pool, model)
            seconds, peak = measure(log, config, clicks)
            report = json.loads(clicks.with_suffix(".report.json").read_text())
            found = np.array(list(report["position_bias"]["propensities"].values()))
            error = np.abs(found / model.propensities(SHOWN) - 1).max()
            size = log.stat().st_size / (1 << 30)
            rows.append(
                f"| {report['events_read']:,} | {size:.2f} | {report['normalised_queries']:,} | {report['clicks']:,} | "
                f"{seconds:.1f} | {events / seconds / 1e6:.2f} | {peak:.2f} | {100 * error:.1f}% |"
            )
            LOGGER.info("%s", rows[-1])
            log.unlink()
    page = _page(config, rows)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(page, encoding="utf-8")
    print(page)


def _page(config: Config, rows: list[str]) -> str:
    settings = f"--duckdb-memory-gb {config.duckdb_memory_gb:g}, {config.duckdb_threads} threads"
    lines = [
        "# Click log to click pairs",
        "",
        f"`python -m benchmarks.data.clicklog`, {time.strftime('%Y-%m-%d')}. prepare_clicks with {settings};",
        "every check, the bot filter and the estimation of position bias included.",
        "Peak memory is the process's own maximum resident set.",
        *([config.note] if config.note else []),
        "",
        "| events | log GiB | queries | click pairs | seconds | million events/s | peak GiB | worst propensity error |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
        *rows,
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.data.clicklog --events 600000,6000000")
