"""Make an events table of search logs that others wrote: User Behavior Insights (UBI), or Google Analytics 4's export.

    python -m training.clicks.import_events --ubi-queries ubi_queries.ndjson --ubi-events ubi_events.ndjson \\
        --documents products.jsonl --out data/shop/events.parquet
    python -m training.clicks.import_events --ga4 'ga4/*.ndjson' --documents products.jsonl \\
        --out data/shop/events.parquet

The table is what `training.prepare_clicks` reads (docs/integrations.md says how the fields are read). Counts go to a
.report.json beside it.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import pyarrow as pa

from ranking.database import DuckDbSettings, literal, single_value
from ranking.errors import InputError
from ranking.files import check_not_read, write_json
from ranking.program import run
from ranking.schema import NO_USER, TABLES, write_table
from ranking.visible import VISIBLE_RE2

logger = logging.getLogger("import_events")

BLOCK_ROWS = 50_000
# DuckDB's types of a Parquet column whose values have one way to be written
_PLAIN = re.compile(r"VARCHAR|ENUM\(.*\)|UUID|U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|FLOAT|DOUBLE|DECIMAL\(.*\)")
LISTS = ("view_item_list", "view_search_results")  # GA4's events that show a list of documents


@dataclass
class Config(DuckDbSettings):
    """Make an events table of a UBI or GA4 log.

    Args:
        documents: texts of the documents: .jsonl or .parquet with doc_id, title and summary
        out: the events table to write
        ubi_queries: JSON lines of the index ubi_queries; a glob in quotes
        ubi_events: JSON lines of the index ubi_events; a glob in quotes
        ga4: JSON lines of the table events_* of GA4's BigQuery export; a glob in quotes
        clicks: names of the events that count as clicks
        session_minutes: a click without a query's id belongs to the user's last page of so many minutes before; and a
            user who does nothing for so long has left
        last_dwell_seconds: least dwell of a click after which the user neither searched nor clicked on anything else
    """

    documents: Path
    out: Path
    ubi_queries: str | None = None
    ubi_events: str | None = None
    ga4: str | None = None
    clicks: list[str] = field(default_factory=lambda: ["click", "item_click", "product_click", "select_item"])
    session_minutes: float = 30.0
    last_dwell_seconds: float = 60.0

    def __post_init__(self) -> None:
        super().__post_init__()
        ubi = (self.ubi_queries is not None, self.ubi_events is not None)
        if any(ubi) != all(ubi) or all(ubi) == (self.ga4 is not None):
            raise ValueError("give --ubi-queries with --ubi-events, or --ga4")
        for name in ("session_minutes", "last_dwell_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: a positive number is needed")


# Both readers make three views: page (request_id, user_id, moment, query or null), shown (request_id, doc_id, position)
# and act (user_id, moment, doc_id, request_id or null, click, search). Times are microseconds since 1970; a number is
# taken for nanoseconds, microseconds, milliseconds or seconds, by its size.
_AT = """CASE WHEN try_cast({0} AS DOUBLE) IS NULL THEN epoch_us(try_cast({0} AS TIMESTAMPTZ))
    WHEN try_cast({0} AS DOUBLE) > 1e17 THEN (try_cast({0} AS DOUBLE) / 1000)::BIGINT
    WHEN try_cast({0} AS DOUBLE) > 1e14 THEN try_cast({0} AS DOUBLE)::BIGINT
    WHEN try_cast({0} AS DOUBLE) > 1e11 THEN (try_cast({0} AS DOUBLE) * 1000)::BIGINT
    ELSE (try_cast({0} AS DOUBLE) * 1000000)::BIGINT END"""

_UBI = f"""
CREATE VIEW page AS SELECT line->>'$.query_id' AS request_id, line->>'$.client_id' AS user_id,
    {_AT.format("line->>'$.timestamp'")} AS moment, line->>'$.user_query' AS query FROM ubi_queries;
CREATE VIEW shown AS SELECT request_id, hits[number] AS doc_id, number AS position FROM (
    SELECT request_id, hits, unnest(range(1, len(hits) + 1))::INTEGER AS number FROM (
        SELECT line->>'$.query_id' AS request_id, (line->>'$.query_response_hit_ids[*]')::VARCHAR[] AS hits
        FROM ubi_queries));
CREATE VIEW act AS SELECT line->>'$.client_id' AS user_id, {_AT.format("line->>'$.timestamp'")} AS moment,
    line->>'$.event_attributes.object.object_id' AS doc_id, line->>'$.query_id' AS request_id,
    list_contains(getvariable('clicks'), line->>'$.action_name') AS click, FALSE AS search FROM ubi_events;
"""

# A parameter of GA4 is {"key": ..., "value": {"string_value": ...}}; GA4 stores a term such as 501 as a number. A list
# without items that repeats the term before it is that page's second event: GA4 sends view_search_results by itself.
# A long list comes in several events, as one scrolls: item_list_index numbers its items through, from 0 or from 1.
_VALUE = """list_filter((line->'$.event_params')::JSON[], lambda p: (p->>'$.key') = '{0}')[1]->'$.value'"""
_GA4 = f"""
CREATE TABLE hit AS SELECT (line->>'$.user_pseudo_id') || ':' || (line->>'$.event_timestamp') AS request_id,
    line->>'$.user_pseudo_id' AS user_id, {_AT.format("line->>'$.event_timestamp'")} AS moment,
    line->>'$.event_name' AS name, coalesce((line->'$.items')::JSON[], []) AS items, name IN {LISTS} AS is_list,
    {_VALUE.format("search_term")} AS term,
    coalesce(nullif(term->>'$.string_value', ''), term->>'$.int_value', term->>'$.float_value',
        term->>'$.double_value') AS query,
    list_transform(items, lambda item: try_cast(item->>'$.item_list_index' AS INTEGER)) AS given,
    CASE WHEN len(list_distinct(given)) = len(items) AND list_min(given) >= 0 AND list_max(given) < {1 << 30}
        THEN given END AS numbers FROM ga4;
CREATE VIEW page AS SELECT request_id, user_id, moment, query FROM (
        SELECT *, lower(trim(query)) AS folded,
            lag(folded IGNORE NULLS) OVER (PARTITION BY user_id ORDER BY moment) AS folded_before
        FROM hit WHERE is_list)
    WHERE len(items) > 0 OR folded IS DISTINCT FROM folded_before
    QUALIFY row_number() OVER (PARTITION BY request_id ORDER BY query IS NULL, len(items) = 0, query) = 1
        OR request_id IS NULL;
CREATE TABLE numbered_from AS
    SELECT least(min(list_min(numbers)), 1) AS base FROM hit WHERE is_list AND query IS NOT NULL;
CREATE VIEW shown AS SELECT request_id, items[number]->>'$.item_id' AS doc_id,
    coalesce(numbers[number] - base + 1, number) AS position
    FROM numbered_from, (SELECT request_id, items, numbers, unnest(range(1, len(items) + 1))::INTEGER AS number
    FROM hit SEMI JOIN page ON hit.request_id = page.request_id AND hit.query IS NOT DISTINCT FROM page.query
    WHERE is_list);
CREATE VIEW act AS SELECT user_id, moment, items[1]->>'$.item_id' AS doc_id, NULL::VARCHAR AS request_id,
    list_contains(getvariable('clicks'), name) AS click, is_list AND query IS NOT NULL AS search FROM hit;
"""

# A click's dwell lasts until the user searches again or clicks on another document, or else until the visit's last
# event. Other events end nothing: GA4 itself sends page_view a second after a click, a cart is no way back to the list,
# and a list without a search term may be the similar products on the page of what was clicked. A page's documents are
# those whose text is known.
# A click that names no page is of the user's last list that showed the document: a carousel beside the results, or a
# list on another page, takes no click from the search that one goes back to. A list without a query is one of them, so
# that what was found in a category is of no search. Nobody knows which pages a visitor without an id shares with
# others, so each page counts as one visitor.
_WHO = f"coalesce(nullif(user_id, ''), '{NO_USER}' || request_id)"
_IN_ORDER = "(PARTITION BY user_id, visit ORDER BY moment, search DESC, clicked_id)"
_JOIN = f"""
CREATE TABLE pages AS SELECT request_id, {_WHO} AS user_id, moment,
    CASE WHEN regexp_matches(query, '{VISIBLE_RE2}') THEN query END AS query FROM page
    WHERE request_id IS NOT NULL AND moment IS NOT NULL
    QUALIFY row_number() OVER (PARTITION BY request_id ORDER BY moment) = 1;
CREATE VIEW unsearched AS SELECT request_id FROM pages WHERE query IS NULL;
CREATE TABLE listed AS SELECT request_id, doc_id, min(position)::INTEGER AS position FROM shown
    ANTI JOIN unsearched USING (request_id) SEMI JOIN pages USING (request_id)
    WHERE doc_id IS NOT NULL GROUP BY ALL;
CREATE TABLE seen AS SELECT DISTINCT p.user_id, p.moment, s.doc_id, request_id
    FROM shown s JOIN pages p USING (request_id);
CREATE VIEW timed AS SELECT *, moment - lag(moment) OVER (PARTITION BY user_id ORDER BY moment) AS pause FROM (
    SELECT {_WHO} AS user_id, moment, CASE WHEN click THEN doc_id END AS clicked_id, request_id, search FROM act
    WHERE moment IS NOT NULL UNION ALL SELECT user_id, moment, NULL, NULL, query IS NOT NULL FROM pages);
CREATE VIEW visited AS SELECT *, max(moment) OVER (PARTITION BY user_id, visit) AS left_at FROM (
    SELECT *, count(*) FILTER (pause > getvariable('session')) OVER (PARTITION BY user_id ORDER BY moment) AS visit
    FROM timed);
CREATE VIEW turns AS SELECT *, search OR clicked_id IS DISTINCT FROM lag(clicked_id) OVER {_IN_ORDER} AS elsewhere
    FROM visited WHERE search OR clicked_id IS NOT NULL;
CREATE TABLE clicked AS SELECT user_id, moment, clicked_id AS doc_id, request_id, CASE WHEN ended IS NOT NULL
    THEN (ended - moment) / 1e6 ELSE greatest((left_at - moment) / 1e6, getvariable('last_dwell')) END AS dwell FROM (
        SELECT *, lead(CASE WHEN elsewhere THEN moment END IGNORE NULLS) OVER {_IN_ORDER} AS ended FROM turns)
    WHERE clicked_id IS NOT NULL;
CREATE TABLE placed AS
    SELECT request_id, user_id, moment, doc_id, dwell FROM clicked WHERE request_id IS NOT NULL
    UNION ALL SELECT CASE WHEN c.moment - s.moment <= getvariable('session') THEN s.request_id END, c.user_id, c.moment,
    c.doc_id, c.dwell FROM (FROM clicked WHERE request_id IS NULL) c ASOF LEFT JOIN seen s
    ON c.user_id = s.user_id AND c.doc_id = s.doc_id AND c.moment >= s.moment;
CREATE TABLE linked AS
    SELECT request_id, doc_id, dwell FROM placed WHERE request_id IS NOT NULL
    UNION ALL SELECT p.request_id, c.doc_id, c.dwell FROM placed c ASOF JOIN pages p
    ON c.user_id = p.user_id AND c.moment >= p.moment
    WHERE c.request_id IS NULL AND c.moment - p.moment <= getvariable('session');
CREATE TABLE touched AS SELECT request_id, doc_id, max(dwell) AS dwell FROM linked
    SEMI JOIN listed USING (request_id, doc_id) GROUP BY ALL;
CREATE TABLE event AS SELECT p.request_id, l.doc_id, p.user_id, make_timestamptz(p.moment) AS timestamp, p.query,
    coalesce(d.title, '') AS title, coalesce(d.summary, '') AS summary, l.position,
    t.request_id IS NOT NULL AS clicked, coalesce(t.dwell, 0)::FLOAT AS dwell_seconds, '' AS arm
    FROM pages p JOIN listed l USING (request_id) JOIN document d USING (doc_id)
    LEFT JOIN touched t USING (request_id, doc_id);
"""


def main(config: Config) -> None:
    """Read, join, write. InputError if the log has no page whose documents are known."""
    check_not_read(config.out, [config.documents])
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".events-", dir=config.temp_folder or config.out.parent) as spill:
        database = config.open_database(Path(spill))
        try:
            report = _import(database, config)
        except duckdb.Error as problem:
            raise InputError(f"the log cannot be read: {' '.join(str(problem).split())[:300]}") from problem
        finally:
            database.close()
    write_json(config.out.with_suffix(".report.json"), report)
    print(json.dumps(report, indent=2))


def _import(database: duckdb.DuckDBPyConnection, config: Config) -> dict[str, int]:
    database.execute("SET VARIABLE clicks = ?", [config.clicks])
    database.execute("SET VARIABLE session = ?", [int(config.session_minutes * 60e6)])
    database.execute("SET VARIABLE last_dwell = ?", [config.last_dwell_seconds])
    _read_documents(database, config.documents)
    given = {"ubi_queries": config.ubi_queries, "ubi_events": config.ubi_events, "ga4": config.ga4}
    for name, pattern in given.items():
        if pattern is not None:
            _read_lines(database, name, pattern, config.out)
    database.execute(_GA4 if config.ga4 is not None else _UBI)
    database.execute(_JOIN)

    def count(query: str) -> int:
        return int(single_value(database, f"SELECT count(*) FROM {query}"))

    on_shown = count("linked SEMI JOIN listed USING (request_id, doc_id)")
    no_search = count("linked SEMI JOIN unsearched USING (request_id)")
    report = {
        "pages": count("pages WHERE query IS NOT NULL"),
        "pages_without_query": count("unsearched"),
        "pages_without_id_or_time": count("page WHERE request_id IS NULL OR moment IS NULL"),
        "pages_written": count("(SELECT DISTINCT request_id FROM event)"),
        "documents_shown": count("listed"),
        "documents_without_text": count("listed ANTI JOIN document USING (doc_id)"),
        "documents_of_several_texts": count("document WHERE texts > 1"),
        "clicks": count("clicked"),
        "clicks_without_document_or_time": count("act WHERE click AND (doc_id IS NULL OR moment IS NULL)"),
        "clicks_of_no_search": no_search,
        "clicks_on_no_shown_document": count("clicked") - no_search - on_shown,
    }
    if not count("event"):
        raise InputError(f"no page with documents of {config.documents}: {json.dumps(report)}")
    report["events_written"] = write_table(config.out, "events", _blocks(database))
    return report


def _read_documents(database: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Make the table document (doc_id, title, summary, texts), one row a document; texts: how many different it has.

    Of several the last in order of the alphabet is taken, title and summary of one row, whatever order DuckDB reads in.

    Texts of JSON are taken as they stand: DuckDB's guess of a column's type would write a UUID of capitals in lower
    case, a text among numbers in quotes, and a date in its own way.
    """
    if not path.is_file():
        raise InputError(f"--documents {path}: no such file")
    describe = _parquet_documents if path.suffix == ".parquet" else _json_documents
    describe(database, path)
    database.execute(
        """CREATE TABLE document AS SELECT doc_id, text.title AS title, text.summary AS summary, texts FROM (
            SELECT doc_id, max({'title': coalesce(title, ''), 'summary': coalesce(summary, '')}) AS text,
                count(DISTINCT (coalesce(title, ''), coalesce(summary, ''))) AS texts FROM described GROUP BY doc_id)"""
    )


def _parquet_documents(database: duckdb.DuckDBPyConnection, path: Path) -> None:
    source = f"read_parquet({literal(path)})"
    types = {row[0]: row[1] for row in database.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()}
    _require_columns(path, "doc_id" in types and "title" in types)
    for name in ("doc_id", "title", "summary"):
        if name in types and not _PLAIN.fullmatch(types[name]):
            raise InputError(f"--documents {path}: the column {name} is {types[name]}: text or numbers are needed")
    if nameless := single_value(database, f"SELECT count(*) FILTER (doc_id IS NULL) FROM {source}"):
        raise InputError(f"--documents {path}: doc_id is null in {nameless} rows: every document needs one")
    summary = "summary" if "summary" in types else "''"
    database.execute(
        f"CREATE VIEW described AS SELECT doc_id::VARCHAR AS doc_id, title::VARCHAR AS title, "
        f"{summary}::VARCHAR AS summary FROM {source}"
    )


def _json_documents(database: duckdb.DuckDBPyConnection, path: Path) -> None:
    lines = f"read_json_objects({literal(path)}, format = 'auto')"
    plain = "('VARCHAR', 'UBIGINT', 'BIGINT', 'HUGEINT', 'UHUGEINT', 'DOUBLE')"
    problems = " ".join(
        f"""WHEN coalesce(json_type(json, '$.{name}'), 'absent') NOT IN {plain} {allowed}
            THEN '{name} is ' || left(coalesce(json->>'$.{name}', json_type(json, '$.{name}'), 'absent'), 60)"""
        for name, allowed in (
            ("doc_id", ""),
            ("title", "AND json_type(json, '$.title') <> 'NULL'"),
            ("summary", "AND json_type(json, '$.summary') <> 'NULL'"),
        )
    )
    ids, titles, problem = database.execute(
        f"""SELECT count(*) FILTER (json_exists(json, '$.doc_id')), count(*) FILTER (json_exists(json, '$.title')),
            min('the document ' || left(coalesce(json->>'$.doc_id', json::VARCHAR), 80) || ': ' || CASE {problems} END)
            FROM {lines}"""
    ).fetchall()[0]
    _require_columns(path, ids and titles)
    if problem is not None:
        raise InputError(f"--documents {path}: {problem}: text or a number is needed")
    database.execute(
        f"CREATE VIEW described AS SELECT json->>'$.doc_id' AS doc_id, json->>'$.title' AS title, "
        f"json->>'$.summary' AS summary FROM {lines}"
    )


def _require_columns(path: Path, there: bool) -> None:
    if not there:
        raise InputError(f"--documents {path}: the columns doc_id and title are needed, summary may be there")


def _read_lines(database: duckdb.DuckDBPyConnection, name: str, pattern: str, out: Path) -> None:
    """A table of JSON objects, one a line; what a search engine exports lies under `_source` there.

    InputError: no file is there, or one of them is `out`.
    """
    text = pattern.replace("'", "''")
    files = [Path(file) for (file,) in database.execute(f"SELECT file FROM glob('{text}')").fetchall()]
    if not files:
        raise InputError(f"--{name.replace('_', '-')} {pattern}: no such file")
    check_not_read(out, files)
    database.execute(
        f"CREATE TABLE {name} AS SELECT coalesce(json->'$._source', json) AS line "
        f"FROM read_json_objects('{text}', format = 'newline_delimited')"
    )


def _blocks(database: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
    found = database.cursor().sql("SELECT * FROM event ORDER BY timestamp, request_id, position")
    for batch in found.to_arrow_reader(BLOCK_ROWS):
        yield pa.Table.from_batches([batch]).cast(TABLES["events"].schema)


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m training.clicks.import_events --ga4 'ga4/*.ndjson' --documents docs.jsonl --out e.parquet",
    )
