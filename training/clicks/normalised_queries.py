"""Queries of a large table, normalised: every spelling of a query gets one number, so that joins carry integers."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from ranking.query_engine import QueryEngine, single_value
from ranking.text import normalise

_SPELLED = pa.schema([("raw", pa.string()), ("query", pa.string())])


def normalise_query(text: str) -> str:
    """NFKC, control characters and white space to single spaces (ranking.text.normalise), lower case."""
    # again, since lower case can put combining document_starts out of their order ("İ" becomes "i" and a dot)
    return normalise(normalise(text).lower())


def number_queries(
    engine: QueryEngine, *relations: str, rewrite: Callable[[str], str] | None = None
) -> tuple[int, int]:
    """Make `spellings` (raw -> query_no) and `queries` (query_no -> normalised text) from the relations' `query`.

    Python sees each distinct spelling once, so the cost follows the vocabulary of queries and not the number of rows.
    A spelling that is blank once normalised has no number. rewrite: makes of a normalised query
    what is kept of it. Returns how many spellings and how many queries there are.
    """
    distinct = " UNION ".join(f"SELECT query FROM {relation}" for relation in relations)
    with engine.filling("spelled", _SPELLED) as write:
        for batch in engine.batches(f"SELECT DISTINCT query FROM ({distinct})"):
            raw = batch.column(0).cast(pa.string())
            texts = [normalise_query(text) for text in raw.to_pylist()]
            clean = pa.array([rewrite(text) if rewrite and text else text for text in texts], pa.string())
            write(pa.table([raw, clean], schema=_SPELLED))
    # numbered by text: the numbers, and with them what is drawn by number, are the same in every run and engine
    engine.table(
        "queries",
        """SELECT query, CAST(row_number() OVER (ORDER BY query) AS INTEGER) AS query_no
           FROM (SELECT DISTINCT query FROM spelled WHERE query <> '')""",
    )
    engine.table("spellings", "SELECT raw, query_no FROM spelled JOIN queries USING (query)")
    counts = [single_value(engine, f"SELECT count(*) FROM {table}") for table in ("spelled", "queries")]
    engine.drop("spelled")
    return counts[0], counts[1]
