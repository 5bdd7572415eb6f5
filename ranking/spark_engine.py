"""Queries over logs on Spark: DuckDB's SQL translated, a session that is started or found, tables kept as Parquet."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ranking.errors import InputError
from ranking.query_engine import BATCH_ROWS, without_stack
from ranking.spark_sql import spark_sql

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.types import StructType

# what makes Spark's answers DuckDB's, set on the session whatever its defaults are
_SESSION = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "true",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    # Spark has no nanoseconds; as numbers they can be divided
    "spark.sql.legacy.parquet.nanosAsLong": "true",
}
ANSWER_SECONDS = 30  # for a Connect server that is not there, or speaks TLS where none was asked for

_LOCAL = {  # a session on this machine talks to itself alone
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
}


class SparkEngine:
    """Spark behind the interface of ranking/query_engine.py.

    A table is a Parquet folder in `scratch`, which driver and workers see at the same path: so no result has to fit
    into the driver, a lost worker costs nothing that was computed, and it works the same through Spark Connect.
    """

    name = "Spark"

    def __init__(self, session: SparkSession, scratch: Path, started: bool):
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException

        self.problems: tuple[type[BaseException], ...] = (PySparkException, Py4JError)
        self._session, self._scratch, self._started = session, scratch.absolute(), started
        self._folders: dict[str, Path] = {}  # of each table
        self._made = 0
        for name, value in _SESSION.items():
            session.conf.set(name, value)

    @classmethod
    def start(cls, master: str, conf: Mapping[str, str], scratch: Path) -> SparkEngine:
        """A session at that master, or the one that exists; InputError: what is missing, or why it does not start."""
        if find_spec("pyspark") is None or find_spec("sqlglot") is None:
            raise InputError("--engine spark needs pyspark, which is not installed: pip install 'disranker[spark]'")
        from pyspark.sql import SparkSession

        if master.startswith("sc://"):
            return cls(_connected(master, conf), scratch, started=True)
        found = SparkSession.getActiveSession()
        if found is None and not master and os.environ.get("SPARK_REMOTE"):
            return cls(_connected(os.environ["SPARK_REMOTE"], conf), scratch, started=True)
        if found is not None:
            if master and master != found.sparkContext.master:
                raise InputError(f"a Spark session at {found.sparkContext.master} exists, {master} was asked for")
            # its own views and settings, so that nothing of the caller's is replaced
            session = found.newSession()
            for name, value in conf.items():
                session.conf.set(name, value)
            return cls(session, scratch, started=False)
        java = os.environ.get("JAVA_HOME")
        if not shutil.which("java", path=str(Path(java, "bin")) if java else None):
            raise InputError(
                "--engine spark needs Java 17 or later: apt-get install openjdk-17-jre-headless, or JAVA_HOME"
            )
        builder = SparkSession.builder.appName("disranker").config("spark.ui.showConsoleProgress", "false")
        if master:
            builder = builder.master(master)
        settings = {**(_LOCAL if master.startswith("local") else {}), **conf}
        for name, value in settings.items():
            builder = builder.config(name, value)
        try:
            return cls(builder.getOrCreate(), scratch, started=True)
        except Exception as problem:  # Java's errors arrive as several classes, some of them plain
            raise InputError(f"Spark at {master or 'its default master'} does not start: {_line(problem)}") from problem

    def read_files(self, view: str, files: Sequence[Path], row_numbers: bool = False) -> None:
        """Make a view of Parquet files, with every column that one of them has."""
        groups: dict[tuple[tuple[str, pa.DataType], ...], list[Path]] = {}
        for file in files:
            schema = pq.read_schema(file)
            groups.setdefault(tuple(zip(schema.names, schema.types)), []).append(file)
        kinds: dict[str, set[str]] = {}
        for columns in groups:
            for name, kind in columns:
                kinds.setdefault(name, set()).add(_kind(kind))
        frames = [self._read(paths, dict(columns), kinds, row_numbers) for columns, paths in groups.items()]
        whole = frames[0]
        for frame in frames[1:]:
            whole = whole.unionByName(frame, allowMissingColumns=True)
        whole.createOrReplaceTempView(view)

    def _read(
        self, files: list[Path], types: dict[str, pa.DataType], kinds: dict[str, set[str]], row_numbers: bool
    ) -> DataFrame:
        """Files of one schema, their columns made to fit files of other schemas."""
        reader = self._session.read.option("recursiveFileLookup", "true")
        if hidden := [path for path in files if path.name.startswith(("_", "."))]:
            raise InputError(f"{hidden[0]}: Spark passes over files whose names begin with _ or a dot; rename it")
        frame = reader.parquet(*map(_to_read, files))
        selected = [f"{_column(name, kind, kinds[name])} AS {_quoted(name)}" for name, kind in types.items()]
        if row_numbers:
            # a URI back to the path: a plus is itself there, and url_decode would make a space of it
            path = "regexp_replace(url_decode(replace(_metadata.file_path, '+', '%2B')), '^file:/*', '/')"
            start = 1 if files[0].is_absolute() else len(f"{Path.cwd()}/") + 1  # a path is told as it was given
            selected += [f"substring({path}, {start}) AS filename", "_metadata.row_index AS file_row_number"]
        return frame.selectExpr(*selected)

    def view(self, name: str, query: str) -> None:
        """Make a view, computed anew whenever it is read."""
        self._query(query, {}).createOrReplaceTempView(name)

    def table(self, name: str, query: str, **parameters: Any) -> None:
        """Compute a table once; one of the same name, which the query may read, is replaced."""
        frame = self._query(query, parameters)
        self._keep(name, self._written(frame), frame.schema)

    @contextmanager
    def filling(self, name: str, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
        """A new table, filled piece by piece: a Parquet file that the driver writes."""
        folder = self._new_folder()
        folder.mkdir(parents=True)
        with pq.ParquetWriter(folder / "part.parquet", schema) as writer:
            yield writer.write_table
        self._keep(name, folder, None)

    def drop(self, name: str) -> None:
        """Remove a table and its files."""
        self._session.catalog.dropTempView(name)
        shutil.rmtree(self._folders.pop(name))

    def rows(self, query: str, **parameters: Any) -> list[tuple]:
        """All rows of a small result."""
        collected = self._query(query, parameters).collect()
        return [tuple(float(v) if isinstance(v, Decimal) else v for v in row) for row in collected]

    def columns(self, query: str, **parameters: Any) -> dict[str, np.ndarray]:
        """A result that fits into memory by column; a NULL is NaN."""
        folder = self._written(self._query(query, parameters))
        whole = pq.read_table(folder)
        shutil.rmtree(folder)
        return {name: _array(whole.column(name)) for name in whole.column_names}

    def batches(self, query: str, **parameters: Any) -> Iterator[pa.RecordBatch]:
        """A result of any size in batches, in the order that the query asks for."""
        folder = self._written(self._query(query, parameters))
        # Spark numbers the files of a sorted result in its order
        for file in sorted(folder.glob("part-*.parquet")):
            yield from pq.ParquetFile(file).iter_batches(BATCH_ROWS)
        shutil.rmtree(folder)

    def close(self) -> None:
        """Stop the session if it was started here, and remove the tables."""
        if self._started:
            self._session.stop()
        for folder in self._folders.values():
            shutil.rmtree(folder, ignore_errors=True)

    def _query(self, query: str, parameters: dict[str, Any]) -> DataFrame:
        return self._session.sql(spark_sql(query), args=parameters or None)

    def _new_folder(self) -> Path:
        self._made += 1
        return self._scratch / f"spark-{os.getpid()}-{self._made}"

    def _written(self, frame: DataFrame) -> Path:
        folder = self._new_folder()
        frame.write.parquet(_address(folder))
        return folder

    def _keep(self, name: str, folder: Path, schema: StructType | None) -> None:
        reader = self._session.read if schema is None else self._session.read.schema(schema)
        reader.parquet(_to_read(folder)).createOrReplaceTempView(name)
        if replaced := self._folders.get(name):
            shutil.rmtree(replaced)
        self._folders[name] = folder


def _connected(url: str, conf: Mapping[str, str]) -> SparkSession:
    """A session of its own at a Spark Connect server."""
    where, _, secrets = url.partition(";")  # such as a token
    where = where.removesuffix("/")
    try:
        from pyspark.sql import SparkSession
        from pyspark.sql.connect.client import DefaultChannelBuilder

        # the client itself asks a server that does not answer for ten minutes
        with DefaultChannelBuilder(url).toChannel() as channel:
            _wait_for(channel, where)
        builder = SparkSession.builder.remote(url)
        for name, value in conf.items():
            builder = builder.config(name, value)
        return builder.create()
    except InputError:
        raise
    except Exception as problem:  # gRPC's errors, and those of packages that Spark Connect wants
        said = _line(problem).replace(secrets, "...") if secrets else _line(problem)
        raise InputError(f"{where}: no session of Spark Connect: {said}") from None


def _wait_for(channel: Any, where: str) -> None:
    ready = threading.Event()
    channel.subscribe(lambda state: ready.set() if state.name == "READY" else None, try_to_connect=True)
    if not ready.wait(ANSWER_SECONDS):
        raise InputError(f"{where}: no Spark Connect server answers there within {ANSWER_SECONDS} seconds")


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    return "bool" if pa.types.is_boolean(kind) else "other"


def _column(name: str, kind: pa.DataType, kinds: set[str]) -> str:
    """SQL of a column as DuckDB reads it. kinds: what it is in any of the files.

    Nanoseconds, which come as a number, and times without a zone are times of UTC. Where files differ, everything is
    text beside text, and truth a number beside numbers.
    """
    quoted = _quoted(name)
    if pa.types.is_timestamp(kind):
        quoted = f"timestamp_micros({quoted} DIV 1000)" if kind.unit == "ns" else f"CAST({quoted} AS TIMESTAMP)"
    if "text" in kinds and _kind(kind) != "text":
        return f"CAST({quoted} AS STRING)"
    return f"CAST({quoted} AS INT)" if kinds == {"bool", "other"} and _kind(kind) == "bool" else quoted


def _address(path: Path) -> str:
    # not as_uri(): Spark takes the text after the scheme as it stands, "%20" for the name of a file
    return f"file:{path.absolute()}"


def _to_read(path: Path) -> str:
    """The address of what lies at the path: a reader would else take brackets and their like for a pattern."""
    return re.sub(r"([\\*?\[\]{}])", r"\\\1", _address(path))


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _array(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    return column.to_numpy()


def _line(problem: BaseException) -> str:
    return " ".join(without_stack(problem).split())[:600]
