"""The engines that aggregate logs: DuckDB on one machine, Spark on a cluster (docs/scale.md).

Every query is written once, as DuckDB's SQL. DuckDB gets it as it stands; ranking/spark_sql.py turns it into Spark's.
A program asks for an engine by `QueryEngineSettings` and speaks to it through `QueryEngine` alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import duckdb
import numpy as np
import pyarrow as pa

from ranking.database import DuckDbSettings, literal
from ranking.errors import DataError

BATCH_ROWS = 65_536


class QueryEngine(Protocol):
    """Named views and tables, and queries over them in DuckDB's SQL; `$name` in a query is a parameter.

    A query may use what ranking/spark_sql.py knows to translate, and must not depend on the order of rows, on an
    engine's own hash beyond grouping, or on how it orders NULLs. problems: what a failed query raises.
    """

    name: str
    problems: tuple[type[BaseException], ...]

    def read_files(self, view: str, files: Sequence[Path], row_numbers: bool = False) -> None:
        """Make a view of Parquet files, with every column that one of them has.

        row_numbers: with the columns filename (text) and file_row_number (from 0), too.
        """

    def view(self, name: str, query: str) -> None:
        """Make a view, computed anew whenever it is read, of what its tables hold now."""

    def table(self, name: str, query: str, **parameters: Any) -> None:
        """Compute a table once; one of the same name, which the query may read, is replaced."""

    def filling(self, name: str, schema: pa.Schema) -> AbstractContextManager[Callable[[pa.Table], None]]:
        """Yields a function that adds rows of that schema to a new table, which can be read once the block ends."""

    def drop(self, name: str) -> None:
        """Remove a table and what it takes of memory or disk."""

    def rows(self, query: str, **parameters: Any) -> list[tuple]:
        """All rows of a small result."""

    def columns(self, query: str, **parameters: Any) -> dict[str, np.ndarray]:
        """A result that fits into memory by column; a NULL is NaN."""

    def batches(self, query: str, **parameters: Any) -> Iterator[pa.RecordBatch]:
        """A result of any size in batches of at most BATCH_ROWS rows, in the order that the query asks for."""

    def close(self) -> None:
        """Give back what the engine holds."""


def single_row(engine: QueryEngine, query: str, **parameters: Any) -> tuple:
    """The row of a query that gives exactly one."""
    (row,) = engine.rows(query, **parameters)
    return row


def single_value(engine: QueryEngine, query: str, **parameters: Any) -> Any:
    """The value of a query that gives exactly one."""
    (value,) = single_row(engine, query, **parameters)
    return value


def add_table(engine: QueryEngine, name: str, rows: pa.Table) -> None:
    """Make a table of rows that are at hand."""
    with engine.filling(name, rows.schema) as write:
        write(rows)


def told(engine: QueryEngine, problem: BaseException) -> str:
    """What an engine says of a failed query, in one line."""
    return f"{engine.name}: {' '.join(without_stack(problem).split())[:600]}"


def without_stack(problem: BaseException) -> str:
    """What a problem says before Java's stack; Spark Connect has a heading for it."""
    return str(problem).partition("\n\tat ")[0].partition("\nJVM stacktrace:")[0]


class DuckDbEngine:
    """DuckDB in this process; queries go to it unchanged."""

    name = "DuckDB"
    problems: tuple[type[BaseException], ...] = (duckdb.Error,)

    def __init__(self, connection: duckdb.DuckDBPyConnection):
        self.connection = connection

    def read_files(self, view: str, files: Sequence[Path], row_numbers: bool = False) -> None:
        """Make a view of Parquet files, with every column that one of them has."""
        numbered = ", filename = true, file_row_number = true" if row_numbers else ""
        self.view(view, f"SELECT * FROM read_parquet({literal(files)}, union_by_name = true{numbered})")

    def view(self, name: str, query: str) -> None:
        """Make a view, computed anew whenever it is read."""
        self.connection.execute(f"CREATE VIEW {name} AS {query}")

    def table(self, name: str, query: str, **parameters: Any) -> None:
        """Compute a table once; one of the same name, which the query may read, is replaced."""
        self.connection.execute(f"CREATE OR REPLACE TABLE {name} AS {query}", parameters)

    @contextmanager
    def filling(self, name: str, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
        """A new table, filled piece by piece."""

        def write(piece: pa.Table, into: str = f"INSERT INTO {name}") -> None:
            self.connection.register("piece", piece)
            self.connection.execute(f"{into} SELECT * FROM piece")
            self.connection.unregister("piece")

        write(schema.empty_table(), f"CREATE TABLE {name} AS")
        yield write

    def drop(self, name: str) -> None:
        """Remove a table."""
        self.connection.execute(f"DROP TABLE {name}")

    def rows(self, query: str, **parameters: Any) -> list[tuple]:
        """All rows of a small result."""
        return self.connection.execute(query, parameters).fetchall()

    def columns(self, query: str, **parameters: Any) -> dict[str, np.ndarray]:
        """A result that fits into memory by column; a NULL is NaN."""
        fetched = self.connection.execute(query, parameters).fetchnumpy()
        return {
            name: np.ma.filled(values, np.nan) if np.ma.isMaskedArray(values) else values
            for name, values in fetched.items()
        }

    def batches(self, query: str, **parameters: Any) -> Iterator[pa.RecordBatch]:
        """A result of any size in batches, in the order that the query asks for."""
        cursor = self.connection.cursor()  # of its own: the caller may ask other queries between two batches
        cursor.execute("SET TimeZone = 'UTC'")
        yield from cursor.sql(query, params=parameters or None).to_arrow_reader(BATCH_ROWS)

    def close(self) -> None:
        """Close the database."""
        self.connection.close()


@dataclass(kw_only=True)
class QueryEngineSettings(DuckDbSettings):
    """Settings of a program whose queries may run on a cluster; its Config inherits them.

    Args:
        engine: "duckdb" on this machine, or "spark" for logs beyond it (extra `spark`; docs/scale.md)
        spark_master: where Spark runs: spark://HOST:PORT, yarn, k8s://..., local[N], or sc://HOST:PORT for Spark
            Connect; without it the session that exists, as under spark-submit, or Spark's own defaults
        spark_conf: NAME=VALUE for the session, such as spark.executor.memory=8g
    """

    engine: Literal["duckdb", "spark"] = "duckdb"
    spark_master: str = ""
    spark_conf: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine != "spark" and (self.spark_master or self.spark_conf):
            raise ValueError(f"spark_master and spark_conf are for --engine spark, engine is {self.engine}")
        for pair in self.spark_conf:
            if not pair.partition("=")[1]:
                raise ValueError(f"spark_conf: {pair!r} is not NAME=VALUE")

    def as_report(self) -> dict[str, Any]:
        """These settings as a report may hold them: without what Spark is told, passwords and tokens perhaps."""
        found = json.loads(json.dumps(asdict(self), default=str))
        return {name: value for name, value in found.items() if name not in ("spark_master", "spark_conf")}

    def open_engine(self, scratch: Path | None, tables_on_disk: bool = False) -> QueryEngine:
        """The engine that was asked for. InputError: Spark cannot be started.

        scratch: a folder for what does not fit into memory, DuckDB's choice without; under Spark all workers must see
        it at the same path. tables_on_disk: DuckDB's go to a file in it from the start.
        """
        if self.engine == "duckdb":
            file = scratch / "scratch.duckdb" if scratch and tables_on_disk else None
            return DuckDbEngine(self.open_database(scratch, file))
        from ranking.spark_engine import SparkEngine  # Spark is an extra

        return SparkEngine.start(
            self.spark_master, dict(pair.split("=", 1) for pair in self.spark_conf), scratch or Path()
        )

    @contextmanager
    def engine_for(self, out: Path, source: str) -> Iterator[tuple[QueryEngine, Path]]:
        """Makes the folder of `out`; yields the engine and a scratch folder, both gone when the block ends.

        The scratch folder lies beside `out`, or in temp_folder. DataError on `source`, what is read, if a query fails
        within the block; InputError: Spark cannot be started.
        """
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.stem}-", dir=self.temp_folder or out.parent) as scratch:
            engine = self.open_engine(Path(scratch))
            try:
                yield engine, Path(scratch)
            except engine.problems as problem:
                raise DataError(source, told(engine, problem)) from problem
            finally:
                engine.close()
