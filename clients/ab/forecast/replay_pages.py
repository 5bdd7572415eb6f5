"""Score logged pages with a model that has not served yet: a shadow test without users (docs/retraining.md).

    python -m clients.ab.forecast.replay_pages --data runs/ab/data --model student_next --url localhost:8001 \\
        --out runs/replay.parquet

The scores are what ab_forecast --scores reads. Exit code 3: too many pages failed or were slow; the line says how many.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from clients.triton.connection import TritonAccess, TritonConnection
from clients.triton.scoring import PageTensors, ScoringClient, ScoringFailure
from ranking.database import DuckDbSettings, literal, querying
from ranking.errors import InputError
from ranking.files import replacing, write_json
from ranking.program import run
from ranking.request_tensors import request_tensors
from ranking.telemetry import bars_are_read

EXIT_FAILED = 3
SCHEMA = pa.schema([("request_id", pa.string()), ("doc_id", pa.string()), ("score", pa.float32())])


@dataclass(kw_only=True)
class Config(DuckDbSettings, TritonAccess):
    """Send logged pages to a model, one after the other, and keep its scores.

    Args:
        data: folder of ab_compact
        model: the Triton model to try
        out: Parquet file of its scores; latency and failures go to a .report.json beside it
        url: Triton server, host:port or grpcs://host:port
        pages: pages to send, the latest ones of the log
        deadline_ms: time of a page; a later answer is a failure, as it would be for a user
        max_failures: share of the pages that may fail
    """

    data: Path
    model: str
    out: Path
    url: str = "localhost:8001"
    pages: int = 1000
    deadline_ms: float = 200.0
    max_failures: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pages < 1 or self.deadline_ms <= 0 or not 0 <= self.max_failures <= 1:
            raise ValueError("pages must be 1 or more, deadline_ms above 0, max_failures a share from 0 to 1")


def main(config: Config) -> int:
    """Score the pages, write scores and report, print a line; returns the exit code."""
    client = ScoringClient(TritonConnection(config.url, config.credentials()), config.deadline_ms)
    failures: Counter[str] = Counter()
    seconds: list[float] = []
    columns: dict[str, list] = {name: [] for name in SCHEMA.names}
    pages = tqdm(read_pages(config), desc="pages", leave=False, disable=not bars_are_read())
    for request_id, query, doc_ids, titles, summaries in pages:
        page = PageTensors(request_tensors(query, titles, summaries))
        started = time.perf_counter()
        try:
            # the first page pays for the connection, which users' pages do not
            scored = client.score(config.model, page, config.deadline_ms if seconds else 10_000.0)
        except ScoringFailure as problem:
            failures[problem.reason] += 1
            seconds.append(time.perf_counter() - started)
            continue
        seconds.append(time.perf_counter() - started)
        columns["request_id"] += [request_id] * len(doc_ids)
        columns["doc_id"] += doc_ids
        columns["score"] += scored.values.tolist()
    client.close()
    if not seconds:
        raise InputError(f"{config.data}: no page with titles or summaries to replay: was the log kept without text?")
    with replacing(config.out) as aside:
        pq.write_table(pa.table(columns, schema=SCHEMA), aside, compression="zstd")
    p50, p99 = (float(value) for value in np.quantile(seconds, [0.5, 0.99]) * 1000)
    failed = sum(failures.values()) / len(seconds)
    report = {"pages": len(seconds), "failures": dict(failures), "failed": failed, "p50_ms": p50, "p99_ms": p99}
    write_json(config.out.with_suffix(".report.json"), report)
    print(f"{config.model}: {len(seconds)} pages, {failed:.1%} failed, p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    if failed > config.max_failures:
        told = ", ".join(f"{count} {reason}" for reason, count in failures.most_common())
        print(f"not fit to serve: {failed:.1%} of the pages failed ({told}), {config.max_failures:.1%} may")
        return EXIT_FAILED
    return 0


def read_pages(config: Config) -> Iterator[tuple[str, str, list[str], list[str], list[str]]]:
    """(request id, query, doc ids, titles, summaries) of the latest pages that have text. InputError without a log."""
    files = sorted((config.data / "events").glob("*.parquet"))
    if not files:
        raise InputError(f"{config.data / 'events'}: no day there; run ab_compact.py first")
    left = config.pages
    with config.open_database() as database, querying(config.data):
        for file in reversed(files):  # the last day first; a log's text may be many times the memory
            rows = database.execute(f"""
                WITH latest AS (
                    SELECT request_id FROM read_parquet({literal(file)}) GROUP BY request_id
                    HAVING bool_or(title <> '' OR summary <> '') ORDER BY any_value(timestamp) DESC, request_id
                    LIMIT {int(left)})
                SELECT request_id, any_value(query), list(doc_id ORDER BY position), list(title ORDER BY position),
                       list(summary ORDER BY position)
                FROM read_parquet({literal(file)}) SEMI JOIN latest USING (request_id) GROUP BY request_id
                ORDER BY any_value(timestamp) DESC, request_id
            """)
            while batch := rows.fetchmany(256):
                left -= len(batch)
                yield from batch
            if left <= 0:
                return


if __name__ == "__main__":
    options = "--data runs/ab/data --model student_next --out runs/replay.parquet"
    run(main, Config, example=f"python -m clients.ab.forecast.replay_pages {options}")
