"""The dev and test queries of a dataset, which no training program may see, not even reworded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ranking.errors import DataError
from ranking.schema import check_once, reading
from training.sources.query_splits import NearQueries

LOGGER = logging.getLogger(__name__)


def held_out_files(data: Path) -> list[Path]:
    """The judged dev and test tables of a dataset folder, those that are there."""
    return [path for split in ("dev", "test") if (path := data / "judgments" / f"{split}.parquet").is_file()]


def held_out_queries(files: Iterable[Path]) -> NearQueries:
    """The queries of the files and whatever is near-identical to one. DataError: see require_queries."""
    queries: set[str] = set()
    for file in files:
        require_queries(file)
        with reading(file):
            queries.update(q for q in pq.read_table(file, columns=["query"]).column(0).to_pylist() if q is not None)
    return NearQueries(queries)


def outside_held_out(pieces: Iterable[pa.Table], data: Path) -> Iterator[pa.Table]:
    """Pieces of a table with a column query, without rows of queries that are near-identical to a dataset's held out
    ones. What is left out is told at the end."""
    held_out, barred, rows = held_out_queries(held_out_files(data)), set(), 0
    for piece in pieces:
        queries = piece.column("query")
        here = [query for query in queries.unique().to_pylist() if query in held_out]
        kept = piece.filter(pc.invert(pc.is_in(queries, value_set=pa.array(here, queries.type)))) if here else piece
        barred.update(here)
        rows += len(piece) - len(kept)
        if len(kept):
            yield kept
    if barred:
        LOGGER.warning(
            "%d queries (%d rows) are near-identical to a dev or test query and left out, such as %r",
            len(barred), rows, min(barred),
        )  # fmt: skip


def require_queries(file: Path) -> None:
    """DataError unless the file is Parquet with one column query, of text."""
    with reading(file):
        schema = pq.read_schema(file)
    if "query" not in schema.names:
        raise DataError(file, f"no column query; there are {', '.join(schema.names)}")
    check_once(schema, ["query"], file)
    kind = schema.field("query").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(file, f"column query is {kind}, string is needed")
