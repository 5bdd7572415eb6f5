"""The columns of a click log: which a log may lack, what stands for them, and other names for them."""

from __future__ import annotations

from collections.abc import Sequence

from ranking.schema import TABLES

# What is lost without an optional column, as the log of prepare_clicks says it.
LOST = {
    "arm": "",  # nobody has arms before the first experiment, and click pairs do not depend on them
    "summary": "documents are read without a summary",
    "user_id": "robots cannot be found",
    "timestamp": "a document's text is not its latest one",
    "dwell_seconds": "every click counts as a satisfied one",
}


def event_defaults() -> dict[str, str]:
    """Optional column of `events` -> the SQL of its value where a log has none."""
    return {
        "arm": "''",
        "summary": "''",
        "user_id": "'unknown'",
        "timestamp": "TIMESTAMPTZ '1970-01-01 00:00:00+00'",
        # longer than any threshold, so that a click is a satisfied click
        "dwell_seconds": "(CASE WHEN CAST(clicked AS BOOLEAN) THEN 1e30 ELSE 0 END)::FLOAT",
    }


def parse_event_columns(pairs: Sequence[str]) -> dict[str, str]:
    """["query=search_term", ...] -> {"query": "search_term"}. ValueError names a pair that is no such thing."""
    known = TABLES["events"].schema.names
    columns: dict[str, str] = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not equals or not theirs or ours not in known:
            raise ValueError(f"columns: {pair!r} is not OURS=THEIRS, OURS being one of {', '.join(known)}")
        columns[ours] = theirs
    return columns
