"""DuckDB for the programs that read the A/B log: how much memory and how many threads it may use, owned once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import duckdb


@dataclass(kw_only=True)
class DuckdbSettings:
    """Settings of a program that uses DuckDB; its Config inherits them.

    Args:
        duckdb_memory_gb: memory that DuckDB may use; beyond it, it spills to disk
        duckdb_threads: threads that DuckDB may use
    """

    duckdb_memory_gb: float = 4.0
    duckdb_threads: int = 2

    def __post_init__(self) -> None:
        for name in ("duckdb_memory_gb", "duckdb_threads"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")

    def open_database(self, scratch: Path | None = None) -> duckdb.DuckDBPyConnection:
        """A connection within these limits.

        scratch: folder of the database file and of what spills; in memory without.
        """
        options: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{int(self.duckdb_memory_gb * 1024)}MiB",
            "threads": self.duckdb_threads,
            "preserve_insertion_order": False,
        }
        if scratch is None:
            return duckdb.connect(config=options)
        return duckdb.connect(str(scratch / "scratch.duckdb"), config={**options, "temp_directory": str(scratch)})


def literal(value: str | list[str]) -> str:
    """A text, or a list of texts, as it stands in SQL where a statement takes no parameters."""
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return "'" + value.replace("'", "''") + "'"


def single_value(connection: duckdb.DuckDBPyConnection, query: str):
    """The one value that a query gives, None if it gives no row."""
    row = connection.execute(query).fetchone()
    return row[0] if row else None
