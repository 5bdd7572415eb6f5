"""Read an A/B log into the table `pages` of one experiment (clients/ab/report/experiment_pages.py says what it holds).

Two kinds of log are read: what `clients/ab_compact.py` writes (exposures: one row per page), and a plain `events` table
(one row per shown document: your own serving log).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np

from clients.ab.report.experiment_pages import ExperimentPages, LeftOut
from clients.ab.report.metrics import PAGE_COLUMNS
from ranking.database import DuckDbSettings, literal, single_value
from ranking.errors import DataError, InputError

_DAY = 86_400_000_000  # microseconds
_TIME_SLICES = 30  # at most this many points of the cumulative lift
_DWELL_QUANTILE = 0.99  # of a click's dwell over both arms, at which dwell is capped (winsorised)

# what identifies a page and its segments: SQL over an exposure, and an aggregate over a page's events
_IDENTITY = {
    "user_id": ("user_id", "any_value(user_id)"),
    "moment": ("epoch_us(timestamp)", "min(epoch_us(timestamp))"),
    "arm": ("arm", "any_value(arm)"),
    "query": ("query", "any_value(query)"),
    "platform": ("platform", "''"),
    "experiment": ("experiment", "''"),
    "forced": ("forced", "false"),
    "model_version": ("model_version", "''"),
}
# without these nothing can be compared; a table of one's own may lack what the report does not read (titles, positions)
_EVENT_COLUMNS = {"request_id", "user_id", "timestamp", "arm", "query", "clicked", "dwell_seconds"}
_EXPOSURE_COLUMNS = {"user_id", "timestamp", "experiment", "arm", "query", "clicks", "dwell_seconds", "forced"}


@dataclass(frozen=True)
class LogSelection:
    """Which pages of which log are compared.

    path: a compacted log's folder, or a Parquet file, folder or glob of `events`; experiment: needed where the log
    holds several; start: ISO time, pages before it are the pre-period (for CUPED) and no part of the result;
    max_pages_per_user: users with more pages are left out.
    """

    path: Path
    control: str
    treatment: str
    experiment: str = ""
    start: str | None = None
    max_pages_per_user: int | None = None


def load_pages(chosen: LogSelection, duckdb_settings: DuckDbSettings) -> ExperimentPages:
    """The pages of the chosen experiment.

    DataError on unreadable files or missing columns, InputError if an arm has none.
    """
    log = _LogFiles.find(chosen.path)
    connection = duckdb_settings.open_database(duckdb_settings.temp_folder)
    try:
        log.check_columns(connection)
        return _load(connection, log, chosen)
    except duckdb.Error as problem:
        raise DataError(chosen.path, " ".join(str(problem).split())) from problem


def load_interleaved(chosen: LogSelection, duckdb_settings: DuckDbSettings) -> tuple[np.ndarray, np.ndarray]:
    """Pages won per user by (treatment's, control's) team in an experiment's interleaved pages, float [users] each.

    DataError if the log is unreadable or holds no row per page, InputError if no page of it is interleaved.
    """
    log = _LogFiles.find(chosen.path)
    if not log.has_exposures:
        raise DataError(
            chosen.path, "interleaved pages are in the exposures of a compacted log, this is an events table"
        )
    try:
        wins = _interleaved_wins(
            duckdb_settings.open_database(duckdb_settings.temp_folder), log, chosen, chosen.experiment
        )
    except duckdb.Error as problem:
        raise DataError(chosen.path, " ".join(str(problem).split())) from problem
    if wins is None:
        raise InputError(f"{chosen.path}: experiment {chosen.experiment!r} has no interleaved page")
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

    @property
    def source(self) -> str:
        """The files as an SQL table. A literal, not a parameter: CREATE TABLE AS cannot be prepared with one."""
        # days that were compacted before a column existed read as NULL there
        return f"read_parquet({literal(self.files)}, union_by_name = true)"

    def check_columns(self, connection: duckdb.DuckDBPyConnection) -> None:
        try:
            described = connection.execute(f"DESCRIBE SELECT * FROM {self.source}").fetchall()
        except duckdb.Error as problem:
            reason = " ".join(str(problem).split())
            raise DataError(self.path, f"cannot be read as Parquet: {reason}") from problem
        needed = _EXPOSURE_COLUMNS if self.has_exposures else _EVENT_COLUMNS
        if missing := sorted(needed - {row[0] for row in described}):
            raise DataError(self.path, f"no column {', '.join(missing)}")

    def page_rows(self) -> str:
        """SQL that gives one row per page: identity, then the report's page columns."""
        if self.has_exposures:
            columns = {name: of_exposure for name, (of_exposure, _) in _IDENTITY.items()}
            columns |= {name: column.of_exposure for name, column in PAGE_COLUMNS.items()}
        else:
            columns = {name: of_events for name, (_, of_events) in _IDENTITY.items()}
            columns |= {name: column.of_events or "NULL" for name, column in PAGE_COLUMNS.items()}
        grouping = "" if self.has_exposures else " GROUP BY request_id"
        return f"SELECT {', '.join(f'{sql} AS {name}' for name, sql in columns.items())} FROM {self.source}{grouping}"


def _load(connection: duckdb.DuckDBPyConnection, log: _LogFiles, chosen: LogSelection) -> ExperimentPages:
    connection.execute(f"CREATE TEMP TABLE raw AS {log.page_rows()}")
    experiment = _experiment(connection, chosen) if log.has_exposures else chosen.experiment
    arms = f"arm IN ({literal(chosen.control)}, {literal(chosen.treatment)})"
    in_experiment = f"experiment = {literal(experiment)} AND {arms}" if log.has_exposures else arms
    before = f"moment < {_microseconds(chosen.start)}" if chosen.start else "false"
    window = f"{in_experiment} AND NOT forced AND NOT ({before})"
    outside = single_value(connection, f"SELECT count(*) FROM raw WHERE NOT ({in_experiment}) AND NOT ({before})")
    left_out = _leave_out_heavy_users(connection, chosen.max_pages_per_user)
    left_out.forced_pages = single_value(connection, "SELECT count(*) FROM raw WHERE forced")
    left_out.outside_pages = outside - left_out.forced_pages if outside >= left_out.forced_pages else outside
    users = _number_users(connection, chosen, window)
    first, last = (single_value(connection, f"SELECT {end}(moment) FROM raw WHERE {window}") for end in ("min", "max"))
    span = max(last - first, 1)  # microseconds
    slices = max(1, min(_TIME_SLICES, span // _DAY or _TIME_SLICES))
    _mark_head_queries(connection)
    treatment = f"arm = {literal(chosen.treatment)}"
    connection.execute(
        f"""CREATE TEMP TABLE pages AS SELECT arm_users.user, arm_users.treatment, ({before}) AS pre,
            least(floor((moment - {first}) / {span} * {slices}), {slices - 1})::INT AS slice,
            {", ".join(PAGE_COLUMNS)}, len(string_split(trim(raw.query), ' '))::INT AS query_words, platform,
            head.query IS NOT NULL AS head
            FROM raw JOIN arm_users USING (user_id) LEFT JOIN head ON raw.query = head.query
            WHERE ({before} OR ({in_experiment} AND ({treatment}) = arm_users.treatment)) AND NOT forced"""
    )
    versions = connection.execute(
        f"SELECT model_version, count(*) FROM raw WHERE {window} AND model_version != '' GROUP BY 1 ORDER BY 2 DESC, 1"
    ).fetchall()
    connection.execute("DROP TABLE raw")
    pages = single_value(connection, "SELECT count(*) FROM pages WHERE NOT pre")
    heaviest = single_value(
        connection, "SELECT max(n) FROM (SELECT count(*) AS n FROM pages WHERE NOT pre GROUP BY user)"
    )
    cap = single_value(
        connection, f"SELECT quantile_cont(dwell / clicks, {_DWELL_QUANTILE}) FROM pages WHERE NOT pre AND clicks > 0"
    )
    known = [n for n in PAGE_COLUMNS if single_value(connection, f"SELECT count({n}) FROM pages WHERE NOT pre")]
    return ExperimentPages(
        connection=connection,
        experiment=experiment,
        pages=pages,
        users=users,
        users_in_both_arms=single_value(
            connection, "SELECT count(*) FROM (SELECT user_id FROM arm_users GROUP BY user_id HAVING count(*) > 1)"
        ),
        heaviest_user_share=float(heaviest / pages),
        first=_utc(first).isoformat(timespec="seconds"),
        last=_utc(last).isoformat(timespec="seconds"),
        slice_ends=[_utc(first + span * (i + 1) // slices).isoformat(timespec="minutes") for i in range(slices)],
        dwell_cap=float(cap or 0.0),
        columns=frozenset(known),
        has_pre_period=single_value(connection, "SELECT count(*) FROM pages WHERE pre") > 0,
        left_out=left_out,
        model_versions=dict(versions),
        interleaved=_interleaved_wins(connection, log, chosen, experiment) if log.has_exposures else None,
    )


def _experiment(connection: duckdb.DuckDBPyConnection, chosen: LogSelection) -> str:
    """The experiment to report: the chosen one, or the only one of the log. InputError if there are several."""
    if chosen.experiment:
        return chosen.experiment
    found = connection.execute("SELECT DISTINCT experiment FROM raw WHERE experiment != '' ORDER BY 1").fetchall()
    names = [name for (name,) in found]
    if len(names) > 1:
        raise InputError(f"{chosen.path}: several experiments ({', '.join(names)}); choose one with --experiment")
    return names[0] if names else ""


def _leave_out_heavy_users(connection: duckdb.DuckDBPyConnection, max_pages: int | None) -> LeftOut:
    """Make the table `heavy` of users with more pages than max_pages, and count them."""
    limit = f"HAVING count(*) > {max_pages}" if max_pages else "HAVING false"
    connection.execute(f"CREATE TEMP TABLE heavy AS SELECT user_id, count(*) AS n FROM raw GROUP BY user_id {limit}")
    users, pages = connection.execute("SELECT count(*), coalesce(sum(n), 0)::BIGINT FROM heavy").fetchall()[0]
    return LeftOut(heavy_users=users, heavy_pages=pages)


def _number_users(connection: duckdb.DuckDBPyConnection, chosen: LogSelection, window: str) -> tuple[int, int]:
    """Make the table `arm_users` (user_id, treatment, user) and count each arm's. InputError if an arm has fewer than
    two.

    Someone seen in both arms (a leaky split) is a user of each, and counted apart.
    """
    connection.execute(
        f"""CREATE TEMP TABLE arm_users AS SELECT user_id, arm = {literal(chosen.treatment)} AS treatment,
            (row_number() OVER () - 1)::INT AS user FROM (SELECT DISTINCT user_id, arm FROM raw
            WHERE {window} AND user_id NOT IN (SELECT user_id FROM heavy))"""
    )
    control, treatment = (
        single_value(connection, f"SELECT count(*) FROM arm_users WHERE treatment = {side}")
        for side in ("false", "true")
    )
    for arm, count in ((chosen.control, control), (chosen.treatment, treatment)):
        if count < 2:
            found = connection.execute("SELECT DISTINCT arm FROM raw WHERE arm != '' ORDER BY 1").fetchall()
            named = ", ".join(name for (name,) in found) or "none"
            raise InputError(f"{chosen.path}: {count} users in arm {arm!r}; the log has arms {named}")
    return control, treatment


def _mark_head_queries(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the table `head`: the most frequent queries that together make up half of the pages."""
    connection.execute(
        """CREATE TEMP TABLE head AS SELECT query FROM (SELECT query, count(*) AS n,
           sum(count(*)) OVER (ORDER BY count(*) DESC, query ROWS UNBOUNDED PRECEDING) - count(*) AS before
           FROM raw GROUP BY query)
           WHERE before < (SELECT count(*) FROM raw) / 2"""
    )


def _interleaved_wins(
    connection: duckdb.DuckDBPyConnection, log: _LogFiles, chosen: LogSelection, experiment: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Pages won by (treatment's, control's) team per user, of pages that interleaved the two; None if there are
    none."""

    def clicks(arm: str) -> str:
        return f"len(list_filter(clicked_positions, lambda p: teams[p] = {literal(arm)}))"

    rows = connection.execute(
        f"""SELECT sum((t > c)::INT) AS treatment, sum((c > t)::INT) AS control FROM (SELECT user_id,
            {clicks(chosen.treatment)} AS t, {clicks(chosen.control)} AS c FROM {log.source}
            WHERE len(teams) > 0 AND NOT forced AND experiment = {literal(experiment)}) GROUP BY user_id"""
    ).fetchnumpy()
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
