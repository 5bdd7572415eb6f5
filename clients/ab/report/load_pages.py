"""Read an A/B log into the table `pages` of one experiment (clients/ab/report/experiment_pages.py says what it holds).

Two kinds of log are read: what `clients/ab_compact.py` writes (exposures: one row per page), and a plain `events` table
(one row per shown document: your own serving log).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from clients.ab.report.experiment_pages import ExperimentPages, LeftOut
from clients.ab.report.metrics import PAGE_COLUMNS
from ranking.database import literal
from ranking.errors import DataError, InputError
from ranking.query_engine import QueryEngine, QueryEngineSettings, single_row, single_value, told
from ranking.schema import reading

_DAY = 86_400_000_000  # microseconds
_TIME_SLICES = 30  # at most this many points of the cumulative lift
_FEWEST_DAYS = 7  # from as many days on it has a point a day
_STRAY_SHARE = 0.001  # of pages at either end of the time: a wrong clock's must not stretch it to years
_SPAN_BINS = 1_000_000
_DWELL_QUANTILE = 0.99  # of a click's dwell over both arms, at which dwell is capped (winsorised)

# what identifies a page and its segments: SQL over an exposure, and an aggregate over a page's events
_IDENTITY = {
    "user_id": ("user_id", "any_value(user_id)"),
    "moment": ("epoch_us(timestamp::TIMESTAMPTZ)", "min(epoch_us(timestamp::TIMESTAMPTZ))"),
    "arm": ("arm", "coalesce(any_value(arm), '')"),
    "query": ("query", "any_value(query)"),
    "platform": ("platform", "''"),
    "experiment": ("experiment", "''"),
    "forced": ("forced", "false"),
    "model_version": ("model_version", "''"),
}
# without these nothing can be compared; a table of one's own may lack what the report does not read (titles, positions)
_EVENT_COLUMNS = {"request_id", "user_id", "timestamp", "arm", "query", "clicked", "dwell_seconds"}
_EXPOSURE_COLUMNS = {"user_id", "timestamp", "experiment", "arm", "query", "clicks", "dwell_seconds", "forced"}


_INTERLEAVED = "array_length(teams) > 0 AND NOT forced"


@dataclass(frozen=True)
class LogSelection:
    """Which pages of which log are compared.

    path: a compacted log's folder, or a Parquet file, folder or glob of `events`; experiment: needed where the log
    holds several; start: ISO time, pages before it are no part of the result but the pre-period (for CUPED), except
    those of the arms if the treatment had begun; max_pages_per_user: users with more pages are left out; control_alone:
    the treatment may lack, as before an experiment, and a log that knows no arm yet is all the control's.
    """

    path: Path
    control: str
    treatment: str
    experiment: str = ""
    start: str | None = None
    max_pages_per_user: int | None = None
    control_alone: bool = False


def load_pages(chosen: LogSelection, settings: QueryEngineSettings) -> ExperimentPages:
    """The pages of the chosen experiment; whoever asked closes their engine.

    DataError on unreadable files or missing columns, InputError if an arm has none.
    """
    log = _LogFiles.find(chosen.path)
    columns = log.check_columns()
    engine = settings.open_engine(settings.temp_folder)
    try:
        engine.read_files("log", log.files)
        if not log.has_exposures:
            _check_events(engine, chosen.path, columns)
        return _load(engine, log, chosen)
    except engine.problems as problem:
        engine.close()
        raise DataError(chosen.path, told(engine, problem)) from problem
    except BaseException:  # interrupted as well: Spark's tables of pages would stay on the disk
        engine.close()
        raise


def load_interleaved(chosen: LogSelection, settings: QueryEngineSettings) -> tuple[np.ndarray, np.ndarray]:
    """Pages won per user by (treatment's, control's) team in an experiment's interleaved pages, float [users] each.

    The experiment may be left out where only one has such pages. DataError if the log is unreadable or holds no row per
    page, InputError if no page of it is interleaved, or by other models than the two.
    """
    log = _LogFiles.find(chosen.path)
    if not log.has_exposures:
        raise DataError(
            chosen.path, "interleaved pages are in the exposures of a compacted log, this is an events table"
        )
    engine = settings.open_engine(settings.temp_folder)
    try:
        engine.read_files("log", log.files)
        experiment = chosen.experiment or _experiment(engine, chosen, f"log WHERE {_INTERLEAVED}")
        _leave_out_heavy_users(engine, chosen.max_pages_per_user, "log")
        wins = _interleaved_wins(engine, chosen, experiment)
        teams = engine.rows(
            f"SELECT DISTINCT team FROM (SELECT unnest(teams) AS team FROM log WHERE {_INTERLEAVED} "
            f"AND experiment = {literal(experiment)}) WHERE team != '' ORDER BY 1"
        )
    except engine.problems as problem:
        raise DataError(chosen.path, told(engine, problem)) from problem
    finally:
        engine.close()
    if wins is None:
        since = f" since {chosen.start}" if chosen.start else ""
        where = f"experiment {experiment!r}" if experiment else "the log"
        raise InputError(f"{chosen.path}: {where} has no interleaved page{since}")
    for model in (chosen.control, chosen.treatment):
        if teams and (model,) not in teams:
            named = ", ".join(name for (name,) in teams)
            raise InputError(
                f"{chosen.path}: {model!r} is no team of {experiment!r}; --control and --treatment name two of {named}"
            )
    return wins


@dataclass(frozen=True)
class _LogFiles:
    """The Parquet files of a log. has_exposures: one row per page, else one per shown document."""

    path: Path
    files: list[Path]
    has_exposures: bool

    @classmethod
    def find(cls, path: Path) -> _LogFiles:
        if (path / "exposures").is_dir():
            files, has_exposures = sorted((path / "exposures").glob("*.parquet")), True
        elif path.is_dir():
            files, has_exposures = sorted(path.glob("*.parquet")), False
        else:
            files, has_exposures = sorted(path.parent.glob(path.name)), False
        if not files:
            raise DataError(path, "no Parquet file there; run clients/ab_compact.py on the router's log first")
        return cls(path, files, has_exposures)

    def check_columns(self) -> set[str]:
        """The columns of all files. DataError: an unreadable file, or a needed column that no file has."""
        found: set[str] = set()  # days that were compacted before a column existed read as NULL there
        for file in self.files:
            with reading(file):
                found.update(pq.read_schema(file).names)
        needed = _EXPOSURE_COLUMNS if self.has_exposures else _EVENT_COLUMNS
        if missing := sorted(needed - found):
            raise DataError(self.path, f"no column {', '.join(missing)}")
        return found

    def page_rows(self) -> str:
        """SQL that gives one row per page: identity, then the report's page columns."""
        if self.has_exposures:
            columns = {name: of_exposure for name, (of_exposure, _) in _IDENTITY.items()}
            columns |= {name: column.of_exposure for name, column in PAGE_COLUMNS.items()}
        else:
            columns = {name: of_events for name, (_, of_events) in _IDENTITY.items()}
            columns |= {name: column.of_events or "CAST(NULL AS DOUBLE)" for name, column in PAGE_COLUMNS.items()}
        grouping = "" if self.has_exposures else " GROUP BY request_id"
        return f"SELECT {', '.join(f'{sql} AS {name}' for name, sql in columns.items())} FROM log{grouping}"


# what would be counted wrongly without a word: what is said of the page -> SQL over the `events` rows of a page
_EVENT_FAULTS = {
    **{
        f"has a row without {name}": f"count({name}) < count(*)"
        for name in ("request_id", "user_id", "timestamp", "query", "clicked")
    },
    # a page without any is of no arm: of before the experiment, or of somebody outside it
    "has an arm in some of its rows only": "count(arm) BETWEEN 1 AND count(*) - 1",
    **{f"has more than one {name}": f"min({name}) != max({name})" for name in ("user_id", "arm", "query")},
    # as text: DuckDB 2.0 takes a file's own statistics, which leave NaN out, for a proof that there is none
    "has a click whose dwell_seconds is missing (write 0 where none is known), negative or no finite number": (
        "max(CASE WHEN clicked::INT > 0 AND (dwell_seconds IS NULL OR dwell_seconds < 0 "
        "OR lower(dwell_seconds::VARCHAR) IN ('nan', '-nan', 'inf', 'infinity')) THEN 1 ELSE 0 END) > 0"
    ),
    "shows a document in several rows": "count(DISTINCT doc_id) < count(*)",
}


def _check_events(engine: QueryEngine, path: Path, columns: set[str]) -> None:
    """DataError that names a page and what is wrong with it: nobody checked a table of one's own before."""
    faults = {said: sql for said, sql in _EVENT_FAULTS.items() if "doc_id" in columns or "doc_id" not in sql}
    flags = [f"({sql}) AS fault_{number}" for number, sql in enumerate(faults.values())]
    counts = [
        f"sum(fault_{number}::INT), min(CASE WHEN fault_{number} THEN request_id END)" for number in range(len(faults))
    ]
    found = single_row(
        engine,
        f"SELECT {', '.join(counts)} FROM (SELECT request_id, {', '.join(flags)} FROM log GROUP BY request_id)",
    )
    for said, pages, page in zip(faults, found[::2], found[1::2]):
        if pages:
            raise DataError(path, f"page {page!r} {said}" + (f" ({pages:,} such pages)" if pages > 1 else ""))


def _load(engine: QueryEngine, log: _LogFiles, chosen: LogSelection) -> ExperimentPages:
    engine.table("raw", log.page_rows())
    experiment = _experiment(engine, chosen) if log.has_exposures else chosen.experiment
    arms = f"arm IN ({literal(chosen.control)}, {literal(chosen.treatment)})"
    if chosen.control_alone and not single_value(engine, "SELECT count(*) FROM raw WHERE arm != ''"):
        arms = "arm = ''"
    in_experiment = f"experiment = {literal(experiment)} AND {arms}" if log.has_exposures else arms
    before = f"moment < {_microseconds(chosen.start)}" if chosen.start else "false"
    window = f"{in_experiment} AND NOT forced AND NOT ({before})"
    outside = f"NOT ({in_experiment}) AND NOT forced AND NOT ({before})"
    left_out = _leave_out_heavy_users(engine, chosen.max_pages_per_user)
    left_out.forced_pages = single_value(engine, "SELECT count(*) FROM raw WHERE forced")
    left_out.outside_pages = single_value(engine, f"SELECT count(*) FROM raw WHERE {outside}")
    treatment = f"arm = {literal(chosen.treatment)}"
    early, treated = single_row(
        engine,
        f"SELECT count(*), count(*) FILTER ({treatment}) FROM raw WHERE {in_experiment} AND NOT forced AND {before}",
    )
    # what a treatment showed before the start would take a part of its own effect out of the comparison, as covariate
    pre = f"{before} AND NOT ({in_experiment})" if treated else before
    left_out.early_pages = early if treated else 0
    users = _number_users(engine, chosen, window)
    first, last = (single_value(engine, f"SELECT {end}(moment) FROM raw WHERE {window}") for end in ("min", "max"))
    _mark_head_queries(engine)
    begin, end = _main_span(engine, window, first, last)
    span = max(end - begin, 1)  # microseconds
    whole_days = span / (1 - 2 * _STRAY_SHARE) // _DAY
    slices = int(whole_days) if _FEWEST_DAYS <= whole_days <= _TIME_SLICES else _TIME_SLICES
    engine.table(
        "pages",
        f"""SELECT arm_users.user_no, arm_users.treatment, ({before}) AS pre,
            least(greatest(floor((moment - {begin}) / {span} * {slices}), 0), {slices - 1})::INT AS slice,
            {", ".join(PAGE_COLUMNS)}, array_length(string_split(trim(raw.query, ' '), ' '))::INT AS query_words,
            platform, head.query IS NOT NULL AS head
            FROM raw JOIN arm_users USING (user_id) LEFT JOIN head ON raw.query = head.query
            WHERE (({pre}) OR ({window} AND ({treatment}) = arm_users.treatment)) AND NOT forced""",
    )
    versions = engine.rows(
        f"SELECT model_version, count(*) FROM raw WHERE {window} AND model_version != '' GROUP BY 1 ORDER BY 2 DESC, 1"
    )
    engine.drop("raw")
    pages = single_value(engine, "SELECT count(*) FROM pages WHERE NOT pre")
    heaviest = single_value(
        engine, "SELECT max(n) FROM (SELECT count(*) AS n FROM pages WHERE NOT pre GROUP BY user_no)"
    )
    cap = single_value(
        engine,
        f"SELECT quantile_cont(dwell::DOUBLE / clicks, {_DWELL_QUANTILE}) FROM pages WHERE NOT pre AND clicks > 0",
    )
    known = [n for n in PAGE_COLUMNS if single_value(engine, f"SELECT count({n}) FROM pages WHERE NOT pre")]
    return ExperimentPages(
        engine=engine,
        experiment=experiment,
        pages=pages,
        users=users,
        users_in_both_arms=single_value(
            engine, "SELECT count(*) FROM (SELECT user_id FROM arm_users GROUP BY user_id HAVING count(*) > 1)"
        ),
        heaviest_user_share=float(heaviest / pages),
        first=_utc(first).isoformat(timespec="seconds"),
        last=_utc(last).isoformat(timespec="seconds"),
        days=span / (1 - 2 * _STRAY_SHARE) / _DAY,
        slice_ends=[_utc(begin + span * (i + 1) // slices).isoformat(timespec="minutes") for i in range(slices)],
        dwell_cap=float(cap or 0.0),
        columns=frozenset(known),
        has_pre_period=single_value(engine, "SELECT count(*) FROM pages WHERE pre") > 0,
        left_out=left_out,
        model_versions=dict(versions),
        interleaved=_interleaved_wins(engine, chosen, experiment) if log.has_exposures else None,
    )


def _experiment(engine: QueryEngine, chosen: LogSelection, pages: str = "raw WHERE true") -> str:
    """The experiment to report: the chosen one, or the only one of the pages. InputError if there are several, or if
    the chosen one is not among them."""
    found = engine.rows(f"SELECT DISTINCT experiment FROM {pages} AND experiment != '' ORDER BY 1")
    names = [name for (name,) in found]
    if chosen.experiment:
        if chosen.experiment not in names:
            raise InputError(
                f"{chosen.path}: no page of experiment {chosen.experiment!r}; the log has {', '.join(names) or 'none'}"
            )
        return chosen.experiment
    if len(names) > 1:
        raise InputError(f"{chosen.path}: several experiments ({', '.join(names)}); choose one with --experiment")
    return names[0] if names else ""


def _leave_out_heavy_users(engine: QueryEngine, max_pages: int | None, table: str = "raw") -> LeftOut:
    """Make the table `heavy` of users with more pages than max_pages, and count them. table: with a row a page."""
    limit = f"HAVING count(*) > {max_pages}" if max_pages else "HAVING false"
    engine.table("heavy", f"SELECT user_id, count(*) AS n FROM {table} GROUP BY user_id {limit}")
    users, pages = single_row(engine, "SELECT count(*), coalesce(sum(n), 0)::BIGINT FROM heavy")
    return LeftOut(heavy_users=users, heavy_pages=pages)


def _number_users(engine: QueryEngine, chosen: LogSelection, window: str) -> tuple[int, int]:
    """Make the table `arm_users` (user_id, treatment, user_no) and count each arm's.

    InputError if an arm that is needed has fewer than two users. Someone seen in both arms (a leaky split) is a user of
    each, and counted apart.
    """
    engine.table(
        "arm_users",
        f"""SELECT user_id, arm = {literal(chosen.treatment)} AS treatment,
            (row_number() OVER (ORDER BY user_id, arm) - 1)::INT AS user_no FROM (SELECT DISTINCT user_id, arm
            FROM raw ANTI JOIN heavy USING (user_id) WHERE {window})""",
    )
    control, treatment = (
        single_value(engine, f"SELECT count(*) FROM arm_users WHERE treatment = {side}") for side in ("false", "true")
    )
    for arm, count in ((chosen.control, control), (chosen.treatment, treatment)):
        if count < 2 and not (chosen.control_alone and arm == chosen.treatment):
            found = engine.rows("SELECT DISTINCT arm FROM raw WHERE arm != '' ORDER BY 1")
            named = ", ".join(name for (name,) in found) or "none"
            since = f" since {chosen.start}" if chosen.start else ""
            raise InputError(f"{chosen.path}: {count} users in arm {arm!r}{since}; the log has arms {named}")
    return control, treatment


def _main_span(engine: QueryEngine, window: str, first: int, last: int) -> tuple[int, int]:
    """From when to when the pages were served but for _STRAY_SHARE of them at either end, in microseconds.

    Counted in _SPAN_BINS equal parts of the whole time, so that no engine has to hold every page's moment.
    """
    width = max((last - first) // _SPAN_BINS, 1)
    counted = engine.columns(
        f"SELECT (moment - {first}) // {width} AS bin, count(*) AS pages FROM raw WHERE {window} GROUP BY 1 ORDER BY 1"
    )
    bins, so_far = counted["bin"].astype(np.int64), np.cumsum(counted["pages"].astype(np.int64))
    low = np.searchsorted(so_far, _STRAY_SHARE * so_far[-1], "right")
    high = np.searchsorted(so_far, (1 - _STRAY_SHARE) * so_far[-1], "left")
    return first + int(bins[low]) * width, min(first + (int(bins[high]) + 1) * width, last)


def _mark_head_queries(engine: QueryEngine) -> None:
    """Make the table `head`: the most frequent queries that together make up half of the pages."""
    engine.table(
        "head",
        """SELECT query FROM (SELECT query, count(*) AS n,
           sum(count(*)) OVER (ORDER BY count(*) DESC, query ROWS UNBOUNDED PRECEDING) - count(*) AS before
           FROM raw GROUP BY query)
           WHERE before < (SELECT count(*) FROM raw) / 2""",
    )


def _interleaved_wins(
    engine: QueryEngine, chosen: LogSelection, experiment: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Pages won by (treatment's, control's) team per user, of pages that interleaved the two; None if there are none.

    Pages before the start, and those of the users in the table `heavy`, are left out as from the comparison of arms.
    """

    def clicks(arm: str) -> str:
        return f"array_length(list_filter(clicked_positions, lambda p: list_extract(teams, p) = {literal(arm)}))"

    since = f"AND moment >= {_microseconds(chosen.start)}" if chosen.start else ""
    rows = engine.columns(
        f"""SELECT sum((t > c)::INT) AS treatment, sum((c > t)::INT) AS control FROM (SELECT user_id,
            {clicks(chosen.treatment)} AS t, {clicks(chosen.control)} AS c, {_IDENTITY["moment"][0]} AS moment
            FROM log ANTI JOIN heavy USING (user_id)
            WHERE {_INTERLEAVED} AND experiment = {literal(experiment)}) AS page WHERE true {since} GROUP BY user_id"""
    )
    if not len(rows["treatment"]):
        return None
    return rows["treatment"].astype(float), rows["control"].astype(float)


def _utc(microseconds: int) -> datetime:
    return datetime.fromtimestamp(microseconds / 1e6, UTC)


def _microseconds(text: str) -> int:
    """Microseconds since 1970 of an ISO time, UTC where it names no zone. InputError if it is none."""
    try:
        given = datetime.fromisoformat(text)
    except ValueError as problem:
        raise InputError(f"start: {text!r} is not an ISO time like 2026-11-21T00:00:00+00:00") from problem
    return int((given if given.tzinfo else given.replace(tzinfo=UTC)).timestamp() * 1e6)
