"""DuckDB for the programs that read logs, labels and pools larger than memory: what it may use of the machine."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb

from ranking.errors import DataError


@dataclass(kw_only=True)
class DuckDbSettings:
    """Settings of a program that uses DuckDB; its Config inherits them.

    Args:
        duckdb_memory_gb: memory that DuckDB may use before it spills to disk
        duckdb_threads: threads that DuckDB may use; 0 uses every core
        temp_folder: where to spill; by default beside the output
    """

    duckdb_memory_gb: float = 3.0
    duckdb_threads: int = 0
    temp_folder: Path | None = None

    def __post_init__(self) -> None:
        if not self.duckdb_memory_gb > 0:
            raise ValueError(f"duckdb_memory_gb is {self.duckdb_memory_gb}: a positive number is needed")
        if self.duckdb_threads < 0:
            raise ValueError(f"duckdb_threads is {self.duckdb_threads}: 0 for every core, or a number of threads")

    def open_database(self, spill: Path | None = None, file: Path | None = None) -> duckdb.DuckDBPyConnection:
        """A connection within these limits, in UTC.

        spill: folder for what does not fit into memory; DuckDB's own choice without. file: the database's file; in
        memory without.
        """
        options: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{int(self.duckdb_memory_gb * 1024)}MiB",
            "preserve_insertion_order": False,
        }
        if self.duckdb_threads:
            options["threads"] = self.duckdb_threads
        if spill is not None:
            options["temp_directory"] = str(spill)
        connection = duckdb.connect(str(file) if file else ":memory:", config=options)
        connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
        return connection


@contextmanager
def querying(source: str | Path) -> Iterator[None]:
    """Around queries over a source: DataError on it if one fails (a damaged file, a full disk, too little memory)."""
    try:
        yield
    except duckdb.Error as problem:
        raise DataError(source, f"DuckDB: {' '.join(str(problem).split())[:600]}") from problem


def literal(value: str | Path | Sequence[str | Path]) -> str:
    """A text or path, or a list of them, as it stands in SQL where a statement takes no parameters.

    In a path `*`, `?` and `[` mean themselves: DuckDB would take `log[1].parquet` for a pattern and read log1.parquet.
    """
    if isinstance(value, Path):
        value = glob.escape(str(value))
    if isinstance(value, str):
        return "'" + str(value).replace("'", "''") + "'"
    return "[" + ", ".join(map(literal, value)) + "]"


def single_value(connection: duckdb.DuckDBPyConnection, query: str):
    """The one value that a query gives, None if it gives no row."""
    row = connection.execute(query).fetchone()
    return row[0] if row else None
