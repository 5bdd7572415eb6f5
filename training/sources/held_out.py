"""The dev and test queries of a dataset, which no training program may see, not even reworded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq

from ranking.errors import DataError
from ranking.schema import reading
from training.sources.query_splits import NearQueries


def held_out_files(data: Path) -> list[Path]:
    """The judged dev and test tables of a dataset folder, those that are there."""
    return [path for split in ("dev", "test") if (path := data / "judgments" / f"{split}.parquet").is_file()]


def held_out_queries(files: Iterable[Path]) -> NearQueries:
    """The queries of the files and whatever is near-identical to one. DataError: no Parquet, or no column query."""
    queries: set[str] = set()
    for file in files:
        with reading(file):
            if "query" not in pq.read_schema(file).names:
                raise DataError(file, "no column query")
            queries.update(q for q in pq.read_table(file, columns=["query"]).column(0).to_pylist() if q is not None)
    return NearQueries(queries)
