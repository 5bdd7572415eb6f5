"""Queries of a large table, normalised: every spelling of a query gets one number, so that joins carry integers."""

from __future__ import annotations

from collections.abc import Callable

import duckdb
import pyarrow as pa

from ranking.text import normalise

BATCH_ROWS = 65_536


def normalise_query(text: str) -> str:
    """NFKC, control characters and white space to single spaces (ranking.text.normalise), lower case."""
    # again, since lower case can put combining document_starts out of their order ("İ" becomes "i" and a dot)
    return normalise(normalise(text).lower())


def number_queries(
    connection: duckdb.DuckDBPyConnection, *relations: str, rewrite: Callable[[str], str] | None = None
) -> tuple[int, int]:
    """Make `spellings` (raw -> query_no) and `queries` (query_no -> normalised text) from the relations' `query`.

    Python sees each distinct spelling once, so the cost follows the vocabulary of queries and not the number of rows.
    A spelling that is blank once normalised has no number. rewrite: makes of a normalised query
    what is kept of it. Returns how many spellings and how many queries there are.
    """
    connection.execute("CREATE TABLE spelled (raw VARCHAR, query VARCHAR)")
    distinct = " UNION ".join(f"SELECT query FROM {relation}" for relation in relations)
    for batch in connection.cursor().sql(f"SELECT DISTINCT query FROM ({distinct})").to_arrow_reader(BATCH_ROWS):
        raw = batch.column(0)
        texts = [normalise_query(text) for text in raw.to_pylist()]
        clean = pa.array([rewrite(text) if rewrite and text else text for text in texts], pa.string())
        found = pa.table({"raw": raw, "query": clean})  # noqa: F841 (DuckDB reads it by name)
        connection.execute("INSERT INTO spelled SELECT raw, query FROM found")
    # numbered by text: the numbers, and with them every hash of them, are the same in every run
    connection.execute("""
        CREATE TABLE queries AS SELECT query, (row_number() OVER (ORDER BY query))::INTEGER AS query_no
        FROM (SELECT DISTINCT query FROM spelled WHERE query <> '')
    """)
    connection.execute("CREATE TABLE spellings AS SELECT raw, query_no FROM spelled JOIN queries USING (query)")
    counts = connection.execute("SELECT (SELECT count(*) FROM spelled), (SELECT count(*) FROM queries)").fetchone()
    connection.execute("DROP TABLE spelled")
    return counts or (0, 0)
