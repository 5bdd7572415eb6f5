"""Click pairs from a log larger than memory: satisfied clicks per normalised query and document, position-debiased.

DuckDB reads the Parquet log out of core. What leaves is one row per (query, document) with at least one satisfied
click: the sum of its satisfied clicks, each weighted by the inverse of its position's examination propensity
(Joachims, Swaminathan and Schnabel, WSDM 2017). The propensities come from the log itself
(training/clicks/propensities.py) unless they are given. See docs/clicks.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from ranking.click_models import SATISFIED_SECONDS
from ranking.errors import DataError, InputError
from ranking.files import check_not_read, write_json
from ranking.object_store import address
from ranking.query_engine import QueryEngine, QueryEngineSettings, add_table, single_row, single_value
from ranking.schema import TABLES, write_table
from ranking.visible import VISIBLE_RE2
from training.clicks.event_columns import LOST, event_defaults, parse_event_columns
from training.clicks.log_tables import file_columns, open_view, parquet_files
from training.clicks.normalised_queries import number_queries
from training.clicks.privacy_gate import (
    PrivacySettings,
    ReadableQueries,
    cap_clicks,
    drop_rare_queries,
    require_users,
)
from training.clicks.propensities import Propensities, Unlinked, estimate_propensities
from training.clicks.router_pages import drop_forced_pages, exposures_beside
from training.clicks.shown_documents import shown_documents
from training.sources.held_out import held_out_files, held_out_queries

LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ClickPairSettings(QueryEngineSettings):
    """Turn a click log into weighted click pairs.

    Args:
        events: the raw log: a Parquet file, a folder of them, or a glob in quotes
        out: the clicks file to write; counts and propensities go to a .report.json beside it
        shown_documents: also write every shown document of the queries with a satisfied click to this file, with its
            clicks and expected examinations: what train_baseline --learn-from clicks reads
        exposures: the pages of an A/B log, so that forced ones are left out and others counted; by default the folder
            `exposures` beside a folder `events`
        privacy: what of people may reach training (docs/privacy.md)
        columns: OURS=THEIRS for columns that the log names otherwise, such as query=search_term
        exclude: Parquet files with a query column whose queries, and near-identical ones, are left out of the log
        exclude_held_out: leave out the dev and test queries of the judgments folder beside the output, too
        dwell_seconds: a click counts as satisfied from this dwell on; lower it for snippets that are read quickly
        min_impressions: drop pairs shown fewer times than this; raise it for large logs
        debias: weight clicks by inverse propensity; --no-debias counts every satisfied click as one
        propensities: known examination probabilities of positions 1, 2, ... (the last holds for all later ones), as
            from a randomisation experiment; none estimates them from the log
        unlinked: positions that were clicked, but that no document shares with those above: "extrapolate" their
            propensity, or "cut" them with their clicks
        max_weight: cap of one click's weight; lower it if few clicks at deep positions dominate
        estimation_events: estimate propensities on a sample of pairs with about this many events
        bot_rate_quantile: drop users whose click rate is above this quantile of all users'; 1 keeps all
        bot_volume_quantile: drop users with more impressions than this quantile of all users'; 1 keeps all
        bot_min_impressions: users with fewer impressions are too small to have a click rate
        on_bad_row: "stop" at the first bad row, or "reject" them to a .rejects.tsv beside the output
    """

    events: str
    out: Path
    shown_documents: Path | None = None
    exposures: Path | None = None
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    columns: list[str] = field(default_factory=list)
    exclude: list[Path] = field(default_factory=list)
    exclude_held_out: bool = True
    dwell_seconds: float = SATISFIED_SECONDS
    min_impressions: int = 1
    debias: bool = True
    propensities: list[float] = field(default_factory=list)
    unlinked: Unlinked = "extrapolate"
    max_weight: float = 20.0
    estimation_events: int = 5_000_000
    bot_rate_quantile: float = 0.999
    bot_volume_quantile: float = 0.999
    bot_min_impressions: int = 100
    on_bad_row: Literal["stop", "reject"] = "stop"

    def __post_init__(self):
        super().__post_init__()
        for name in ("bot_rate_quantile", "bot_volume_quantile"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a quantile above 0 and up to 1 is needed")
        if not all(0 < p <= 1 for p in self.propensities):
            raise ValueError(f"propensities are {self.propensities}: probabilities above 0 and up to 1 are needed")
        if self.max_weight < 1 or self.dwell_seconds < 0:
            raise ValueError("max_weight must be at least 1, dwell_seconds 0 or more")
        if self.exclude_held_out and (url := address(self.out)):
            raise ValueError(
                f"out is {url}: the judgments beside it are not looked for in a store; give "
                "--no-exclude-held-out, and the dev and test files as --exclude"
            )
        if self.exposures is None and (url := address(self.events)) and url.endswith("/events"):
            raise ValueError(
                f"events is {url}: the exposures of a compacted A/B log beside it are not looked for in a store; give "
                "--exposures, or another name to a folder that is no such log"
            )
        parse_event_columns(self.columns)

    def satisfied(self) -> str:
        """The SQL condition of a satisfied click."""
        return f"clicked AND dwell_seconds >= CAST({float(self.dwell_seconds)!r} AS FLOAT)"


def write_clicks(settings: ClickPairSettings) -> dict[str, Any]:
    """Write the clicks table and its report; returns the report. DataError or InputError on bad input."""
    files = parquet_files(settings.events)
    names, hint = parse_event_columns(settings.columns), "; map them with --columns"
    columns = file_columns(files, TABLES["events"], names, event_defaults(), hint)
    for name in columns.absent:
        if LOST[name]:
            LOGGER.warning("the log has no %s: %s", name, LOST[name])
    require_users(settings.privacy, columns.absent)
    readable = ReadableQueries(settings.privacy)
    out = Path(settings.out)
    for written in (out, settings.shown_documents):
        if written is not None:
            check_not_read(written, files)
    with settings.engine_for(out, settings.events) as (engine, _):
        rejects = out.with_suffix(".rejects.tsv") if settings.on_bad_row == "reject" else None
        read, refused = open_view(engine, "events", TABLES["events"], files, rejects, columns)
        report: dict[str, Any] = {"events_read": read, "events_rejected": refused, "absent": columns.absent}
        _require_unclicked(engine, settings, refused)
        report |= drop_forced_pages(engine, settings.exposures or exposures_beside(settings.events))
        report |= _drop_bots(engine, settings)
        report["distinct_queries"], report["normalised_queries"] = number_queries(engine, "people", rewrite=readable)
        report |= _exclude_queries(engine, settings)
        report["privacy"] = drop_rare_queries(engine, settings.privacy)
        report["privacy"]["clicks_over_cap"] = cap_clicks(
            engine, settings.satisfied(), settings.privacy, "user_id" not in columns.absent
        )
        report["privacy"] |= {f"queries_{reason}": count for reason, count in sorted(readable.counts.items())}
        report["privacy"]["personal_by_kind"] = dict(sorted(readable.by_kind.items()))
        engine.view(
            "kept",
            """SELECT people.*, query_no FROM people JOIN spellings ON people.query = raw
               ANTI JOIN over_cap USING (request_id, doc_id)""",
        )
        report["events_kept"] = single_value(engine, "SELECT count(*) FROM kept")
        if not report["events_kept"]:
            raise DataError(settings.events, _nothing_left(report))
        propensities = _propensities(engine, settings, report["events_kept"])
        report["position_bias"] = propensities.report() if propensities else None
        _sum_clicks(engine, settings, propensities)
        report["pairs_without_text"] = _count_pairs_without_text(engine)
        report["clicks"] = write_table(out, "clicks", _clicks(engine, settings, report["pairs_without_text"]))
        if settings.shown_documents is not None:
            shown = shown_documents(engine, settings.satisfied(), propensities)
            report["shown_documents"] = write_table(settings.shown_documents, "shown_documents", shown)
    report["settings"] = settings.as_report()
    write_json(out.with_suffix(".report.json"), report)
    return report


def _require_unclicked(engine: QueryEngine, settings: ClickPairSettings, refused: int) -> None:
    """DataError if every row of the log is a click, where what was shown and not clicked is needed, too.

    Such a log would say that every position is looked at alike, and that nobody ever passed a document over.
    """
    estimated = settings.debias and not settings.propensities
    if not (estimated or settings.shown_documents) or single_value(
        engine, "SELECT count(*) = 0 OR count(*) FILTER (NOT clicked) > 0 FROM events"
    ):
        return
    rejected = f" ({refused} rows were rejected)" if refused else ""
    use = "position bias cannot be estimated" if estimated else "--shown-documents has nothing to say"
    way_out = "; or count clicks as they are, with --no-debias" if not settings.shown_documents else ""
    raise DataError(
        settings.events,
        f"every row is a click{rejected}: without the documents that were shown and not clicked, {use}; log each "
        f"page's other documents with clicked false{way_out}",
    )


def _nothing_left(report: dict[str, Any]) -> str:
    """Why no event of the log may be learnt from, by the report's counts."""
    gate = report["privacy"]
    if gate.get("queries_not_stored"):
        return "its queries were dropped or hashed where it was written, so there is no text to learn from"
    reasons = {
        "are near-identical to held-out queries": report["excluded_queries"],
        "have too few users (--privacy.min-users)": gate["rare_queries"],
        "hold personal data (--privacy.personal-data)": gate.get("queries_personal", 0),
    }
    told = ", ".join(f"{count} {what}" for what, count in reasons.items() if count)
    return f"no event is left to learn from: of {report['distinct_queries']} queries {told or 'none is readable'}"


def _drop_bots(engine: QueryEngine, settings: ClickPairSettings) -> dict[str, int]:
    """Make `bots` (users above either quantile) and the view `people` without them; returns counts."""
    engine.table(
        "users",
        """SELECT user_id, count(*) AS impressions, count(*) FILTER (clicked) / count(*) AS rate
           FROM real_pages GROUP BY user_id""",
    )
    engine.table(
        "bots",
        """
        WITH limits AS (
            SELECT quantile_cont(impressions, $volume) AS most,
                   quantile_cont(rate, $rate) FILTER (impressions >= $enough) AS highest FROM users)
        SELECT user_id, impressions FROM users, limits
        WHERE impressions > most OR (impressions >= $enough AND rate > highest)
        """,
        volume=settings.bot_volume_quantile,
        rate=settings.bot_rate_quantile,
        enough=settings.bot_min_impressions,
    )
    engine.view("people", "SELECT * FROM real_pages ANTI JOIN bots USING (user_id)")
    counted = "SELECT count(*), CAST(coalesce(sum(impressions), 0) AS BIGINT) FROM"
    users, events = single_row(engine, f"{counted} users")
    bots, dropped = single_row(engine, f"{counted} bots")
    if not events:
        raise InputError("the log has no events")
    pages = single_value(engine, "SELECT count(DISTINCT request_id) FROM real_pages SEMI JOIN bots USING (user_id)")
    LOGGER.info("bot filter: dropped %d of %d users with %d of %d events", bots, users, dropped, events)
    return {"users": users, "bot_users": bots, "bot_events": dropped, "bot_pages": pages}


def _exclude_queries(engine: QueryEngine, settings: ClickPairSettings) -> dict[str, Any]:
    """Take the number from every query that is near-identical to an excluded one; returns counts.

    Nothing made from `spellings` sees them from then on.
    """
    files = [Path(path) for path in settings.exclude]
    if settings.exclude_held_out:
        files += held_out_files(settings.out.parent)
    if not files:
        return {"excluded_by": [], "excluded_queries": 0, "excluded_events": 0}
    near = held_out_queries(files)
    found = [
        number
        for batch in engine.batches("SELECT query_no, query FROM queries")
        for number, query in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist())
        if query in near
    ]
    schema = pa.schema([("query_no", pa.int32())])
    add_table(engine, "excluded_queries", pa.table([found], schema=schema))
    events = single_value(
        engine,
        "SELECT count(*) FROM people JOIN spellings ON people.query = raw SEMI JOIN excluded_queries USING (query_no)",
    )
    engine.table("spellings", "SELECT * FROM spellings ANTI JOIN excluded_queries USING (query_no)")
    LOGGER.info(
        "%d queries of the log with %d events are near-identical to one of %s and left out",
        len(found), events, ", ".join(map(str, files)),
    )  # fmt: skip
    return {"excluded_by": [str(file) for file in files], "excluded_queries": len(found), "excluded_events": events}


def _propensities(engine: QueryEngine, settings: ClickPairSettings, events: int) -> Propensities | None:
    if not settings.debias:
        return None
    if settings.propensities:
        return Propensities.given(settings.propensities)
    return estimate_propensities(engine, "kept", events, settings.estimation_events, settings.unlinked)


def _sum_clicks(engine: QueryEngine, settings: ClickPairSettings, propensities: Propensities | None) -> None:
    """Make `weights` (query_no, doc_id, weight) from satisfied clicks, after the impression limit."""
    satisfied = settings.satisfied()
    positions = [p for (p,) in engine.rows(f"SELECT DISTINCT position FROM kept WHERE {satisfied} ORDER BY 1")]
    if propensities is None:
        found = dict.fromkeys(positions, 1.0)
    else:  # a position that was cut has propensity 0, and its clicks do not count
        seen = {position: propensities.at(position) for position in positions if propensities.at(position) > 0}
        found = {position: min(settings.max_weight, 1 / propensity) for position, propensity in seen.items()}
    schema = pa.schema([("position", pa.int32()), ("weight", pa.float64())])
    add_table(engine, "position_weights", pa.table([list(found), list(found.values())], schema=schema))
    # rounded: the order in which threads add floats must not change the file
    engine.table(
        "weights",
        f"""SELECT query_no, doc_id, round(sum(weight), 4) AS weight
            FROM kept JOIN position_weights USING (position) WHERE {satisfied} GROUP BY query_no, doc_id""",
    )
    if settings.min_impressions > 1:
        engine.table(
            "weights",
            """
            WITH shown AS (SELECT query_no, doc_id, count(*) AS times
                           FROM kept SEMI JOIN weights USING (query_no, doc_id) GROUP BY query_no, doc_id)
            SELECT weights.* FROM weights JOIN shown USING (query_no, doc_id) WHERE times >= $least
            """,
            least=settings.min_impressions,
        )
    # the text of the page: a snippet made for one query must not be learnt with another
    engine.table(
        "texts",
        f"""
        SELECT query_no, doc_id, arg_max({{'title': title, 'summary': summary}}, (timestamp, title, summary)) AS text
        FROM kept WHERE {satisfied} GROUP BY query_no, doc_id
        """,
    )


# what a pair without it says of a query is nothing: there is no text to predict
_HAS_TEXT = f"(regexp_matches(text.title, '{VISIBLE_RE2}') OR regexp_matches(text.summary, '{VISIBLE_RE2}'))"


def _count_pairs_without_text(engine: QueryEngine) -> int:
    return single_value(
        engine, f"SELECT count(*) FROM texts JOIN weights USING (query_no, doc_id) WHERE NOT {_HAS_TEXT}"
    )


def _clicks(engine: QueryEngine, settings: ClickPairSettings, without_text: int) -> Iterator[pa.Table]:
    """The clicks table in pieces, by query and document, without pairs that have neither title nor summary.

    DataError if there is no pair: what an earlier run wrote stays then, its report too.
    """
    pairs = 0
    for batch in engine.batches(f"""
        SELECT query, doc_id, text.title AS title, text.summary AS summary, CAST(weight AS FLOAT) AS weight
        FROM weights JOIN queries USING (query_no) JOIN texts USING (query_no, doc_id)
        WHERE {_HAS_TEXT} ORDER BY query, doc_id
    """):
        pairs += len(batch)
        yield pa.Table.from_batches([batch])
    if not pairs and without_text:
        raise DataError(settings.events, "no clicked document has a title or summary: the log was kept without text")
    if not pairs:
        raise DataError(settings.events, f"no satisfied click: no click stayed {settings.dwell_seconds:g} s or more")
