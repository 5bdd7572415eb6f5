"""prepare_clicks on DuckDB and on Spark, side by side: time, memory, and whether both write the same click pairs.

The log is that of benchmarks/data/clicklog.py. Each engine runs as a process of its own on this machine; its memory is
the largest sum over the process and its children, of which Spark's Java machine is one, looked at ten times a second.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.data.clicklog import texts, write_log
from ranking.click_models import ClickModel
from ranking.errors import InputError
from ranking.program import run
from ranking.schema import read_table

LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Engines:
    """Which engines are measured, and how they run.

    Args:
        engine: which engines
        spark_master: where Spark runs; its memory is only seen on this machine
        spark_conf: NAME=VALUE for Spark's session
        threads: DuckDB's threads, as many as Spark has cores
        temp_folder: where the generated log goes; 60 million events take about 2 GB, removed afterwards
    """

    engine: list[str] = field(default_factory=lambda: ["duckdb", "spark"])
    spark_master: str = "local[2]"
    spark_conf: list[str] = field(default_factory=lambda: ["spark.driver.memory=4g"])
    threads: int = 2
    temp_folder: Path | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.engine) - {"duckdb", "spark"}:
            raise ValueError(f"engine: {', '.join(sorted(unknown))} is not duckdb or spark")

    def flags(self, engine: str) -> list[str]:
        """Flags of a program that takes QueryEngineSettings."""
        flags = ["--engine", engine, "--duckdb-threads", str(self.threads)]
        if engine == "spark":
            flags += ["--spark-master", self.spark_master]
            flags += [part for setting in self.spark_conf for part in ("--spark-conf", setting)]
        return flags

    def described(self) -> str:
        """How they run, for the head of a page."""
        spark = f"Spark at {self.spark_master} with {', '.join(self.spark_conf) or 'its defaults'}"
        return (
            f"DuckDB with {self.threads} threads, {spark}. Seconds include the start of the process and of Java. "
            "Peak memory is the largest resident sum of processes."
        )


@dataclass(kw_only=True)
class Config(Engines):
    """Measure prepare_clicks on DuckDB and on Spark and print a table of both.

    Args:
        events: log sizes in events
    """

    events: list[int] = field(default_factory=lambda: [600_000, 6_000_000, 60_000_000])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.events or min(self.events) < 1000:
            raise ValueError(f"events is {self.events}: sizes of at least 1000 are needed")


def measure(command: list[str]) -> tuple[float, float]:
    """Run a program of ours; returns seconds and peak resident GiB of all its processes. InputError if it fails."""
    started, peak = time.perf_counter(), 0
    child = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    tree = psutil.Process(child.pid)
    while child.poll() is None:
        peak = max(peak, _resident(tree))
        time.sleep(0.1)
    if child.returncode:
        raise InputError(f"it failed: {' '.join(command)}")
    return time.perf_counter() - started, peak / (1 << 30)


def _resident(tree: psutil.Process) -> int:
    total = 0
    try:
        for process in (tree, *tree.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # it ended between two looks
    return total


def main(config: Config) -> None:
    """Measure every size with every engine and print the table."""
    model, pool, rows = ClickModel(), texts(), []
    with tempfile.TemporaryDirectory(dir=config.temp_folder) as folder:
        for events in config.events:
            log = Path(folder) / "events.parquet"
            write_log(log, events, pool, model)
            made = {engine: Path(folder) / f"{engine}.parquet" for engine in config.engine}
            for engine, out in made.items():
                command = ["-m", "training.prepare_clicks", "--events", str(log), "--out", str(out)]
                seconds, peak = measure([*command, *config.flags(engine)])
                rows.append(f"| {events:,} | {engine} | {seconds:.1f} | {events / seconds / 1e6:.2f} | {peak:.2f} |")
                LOGGER.info("%s", rows[-1])
            first, *others = made.values()
            if any(read_table(other, "clicks") != read_table(first, "clicks") for other in others):
                raise InputError(f"the engines' click pairs of {events:,} events differ")
            log.unlink()
    print(f"prepare_clicks on the same logs, {config.described()} The engines wrote the same click pairs.\n")
    print("| events | engine | seconds | million events/s | peak GiB |\n|---:|---|---:|---:|---:|", *rows, sep="\n")


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.data.log_engines --events 600000 --engine duckdb,spark")
