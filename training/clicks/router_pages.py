"""The pages behind the router's own log: which were forced, fell back or were interleaved (docs/ab-log.md).

`events` says what was shown and clicked; the table `exposures` beside it says how the page came to be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ranking.errors import DataError
from ranking.query_engine import QueryEngine, single_row
from ranking.schema import reading
from training.clicks.log_tables import parquet_files

_NEEDED = ("request_id", "forced", "fallback", "served_by", "teams")


def exposures_beside(events: str) -> Path | None:
    """The folder `exposures` beside the folder `events` of a compacted A/B log, if this is one."""
    folder = Path(events)
    beside = folder.parent / "exposures"
    return beside if folder.name == "events" and folder.is_dir() and beside.is_dir() else None


def drop_forced_pages(engine: QueryEngine, exposures: Path | None) -> dict[str, Any]:
    """Make the view `real_pages`: `events` without the pages whose arm somebody forced to try it; returns counts.

    Clicks on an interleaved page, on a fallback and on the caller's own order are clicks on what was shown, so they
    stay: propensities know positions and not who filled them. exposures: file or folder of the table; None: the log has
    no such pages. DataError names a file without the needed columns.
    """
    if exposures is None:
        engine.view("real_pages", "SELECT * FROM events")
        return {}
    files = parquet_files(str(exposures))
    for file in files:
        with reading(file):
            missing = [name for name in _NEEDED if name not in pq.read_schema(file).names]
        if missing:
            raise DataError(file, f"no column {', '.join(missing)}: this is not the table `exposures` of an A/B log")
    engine.read_files("exposures", files)
    engine.table(
        "pages",
        """SELECT request_id, bool_or(forced) AS forced, any_value(fallback) AS fallback,
                  any_value(served_by) AS served_by, bool_or(array_length(teams) > 0) AS interleaved
           FROM exposures GROUP BY request_id""",
    )
    engine.view(
        "real_pages",
        "SELECT * FROM events ANTI JOIN (SELECT request_id FROM pages WHERE forced) AS forced_pages USING (request_id)",
    )
    counted = single_row(
        engine,
        """SELECT count(*), count(*) FILTER (forced), count(*) FILTER (fallback <> ''), count(*) FILTER (interleaved),
                  count(*) FILTER (served_by = 'incoming'), count(*) FILTER (forced IS NULL)
           FROM (SELECT DISTINCT request_id FROM events) AS shown LEFT JOIN pages USING (request_id)""",
    )
    kinds = ("read", "forced_left_out", "fallback", "interleaved", "incoming_order", "without_exposure")
    return {"exposures": str(exposures), "pages": dict(zip(kinds, counted))}
