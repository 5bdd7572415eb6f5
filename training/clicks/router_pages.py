"""The pages behind the router's own log: which were forced, fell back or were interleaved (docs/ab-log.md).

`events` says what was shown and clicked; the table `exposures` beside it says how the page came to be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

from ranking.database import literal
from ranking.errors import DataError
from ranking.schema import reading
from training.clicks.duckdb_tables import parquet_files

_NEEDED = ("request_id", "forced", "fallback", "served_by", "teams")


def exposures_beside(events: str) -> Path | None:
    """The folder `exposures` beside the folder `events` of a compacted A/B log, if this is one."""
    folder = Path(events)
    beside = folder.parent / "exposures"
    return beside if folder.name == "events" and folder.is_dir() and beside.is_dir() else None


def drop_forced_pages(connection: duckdb.DuckDBPyConnection, exposures: Path | None) -> dict[str, Any]:
    """Make the view `real_pages`: `events` without the pages whose arm somebody forced to try it; returns counts.

    Clicks on an interleaved page, on a fallback and on the caller's own order are clicks on what was shown, so they
    stay: propensities know positions and not who filled them. exposures: file or folder of the table; None: the log has
    no such pages. DataError names a file without the needed columns.
    """
    if exposures is None:
        connection.execute("CREATE VIEW real_pages AS SELECT * FROM events")
        return {}
    files = parquet_files(str(exposures))
    for file in files:
        with reading(file):
            missing = [name for name in _NEEDED if name not in pq.read_schema(file).names]
        if missing:
            raise DataError(file, f"no column {', '.join(missing)}: this is not the table `exposures` of an A/B log")
    connection.execute(f"""
        CREATE TABLE pages AS
        SELECT request_id, bool_or(forced) AS forced, any_value(fallback) AS fallback,
               any_value(served_by) AS served_by, bool_or(len(teams) > 0) AS interleaved
        FROM read_parquet({literal(files)}, union_by_name = true) GROUP BY request_id
    """)
    connection.execute("""
        CREATE VIEW real_pages AS
        SELECT * FROM events ANTI JOIN (SELECT request_id FROM pages WHERE forced) USING (request_id)
    """)
    counted = connection.execute("""
        SELECT count(*), count(*) FILTER (forced), count(*) FILTER (fallback <> ''), count(*) FILTER (interleaved),
               count(*) FILTER (served_by = 'incoming'), count(*) FILTER (forced IS NULL)
        FROM (SELECT DISTINCT request_id FROM events) LEFT JOIN pages USING (request_id)
    """).fetchone()
    kinds = ("read", "forced_left_out", "fallback", "interleaved", "incoming_order", "without_exposure")
    return {"exposures": str(exposures), "pages": dict(zip(kinds, counted or (0,) * len(kinds)))}
