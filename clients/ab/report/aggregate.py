"""From an A/B log to per-user totals, with DuckDB: logs larger than memory become a few numbers per user.

Reads what `clients/ab_compact.py` writes (exposures: one row per page) or a plain `events` table (one row per shown
document: your own serving log). Both become one temporary table `pages`; everything else is a GROUP BY over it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np

from ranking.errors import DataError, InputError

RATIO_METRICS = ("page CTR", "user CTR", "dwell per click", "fallback share")
_DAY = 86_400_000_000  # microseconds
# sums of `pages` behind each metric: (numerator, denominator) per user
_TOTALS = {
    "page CTR": ("sum((clicks > 0)::INT)", "count(*)"),
    "user CTR": ("max((clicks > 0)::INT)", "1"),
    "dwell per click": ("sum(least(dwell, $cap * clicks))", "sum(clicks)"),
    "fallback share": ("sum(fell_back::INT)", "count(*)"),
}


@dataclass
class Totals:
    """Per-user sums of both arms for one metric, [control, treatment]; covariate is the pre-period numerator, centred."""

    numerator: list[np.ndarray]
    denominator: list[np.ndarray]
    covariate: list[np.ndarray] | None = None


@dataclass
class AbLog:
    """An opened log of one experiment: DuckDB connection with a `pages` table, and what was counted on the way.

    `pages` has a row per page of the two arms: user (dense int, an arm's user), treatment (bool), pre (bool, before the
    experiment started), bucket (int, slice of time), clicks, dwell, fell_back, latency (NULL where not logged),
    query_words, platform, head (bool: one of the frequent queries that make up half of the pages).
    """

    connection: duckdb.DuckDBPyConnection
    pages: int
    users: tuple[int, int]
    users_in_both_arms: int
    heaviest_user_share: float
    first: str
    last: str
    buckets: list[str]
    experiment: str
    dwell_cap: float
    has_latency: bool
    has_pre_period: bool
    forced_pages: int = 0
    outside_pages: int = 0
    dropped_heavy_users: int = 0
    dropped_heavy_pages: int = 0
    model_versions: dict[str, int] = field(default_factory=dict)
    interleaved: tuple[np.ndarray, np.ndarray] | None = None  # pages won per user: (treatment's, control's)

    def totals(self, metric: str, where: str = "NOT pre") -> Totals:
        """Per-user totals of a ratio metric over pages that match `where`; users without such a page are absent."""
        numerator, denominator = _TOTALS[metric]
        with_pre = self.has_pre_period and where == "NOT pre"
        pre = (
            f", coalesce({numerator} FILTER (pre), 0) AS pn, coalesce({denominator} FILTER (pre), 0) AS pd"
            if with_pre
            else ""
        )
        if metric == "user CTR":
            denominator = "max(1)"
            pre = pre.replace("coalesce(1 FILTER (pre), 0)", "coalesce(max(1) FILTER (pre), 0)")
        keep = "HAVING count(*) FILTER (NOT pre) > 0" if with_pre else ""
        condition, chosen = ("true", "FILTER (NOT pre)") if with_pre else (where, "")
        rows = self._fetch(
            f"SELECT treatment, {numerator} {chosen} AS n, {denominator} {chosen} AS d{pre} "
            f"FROM pages WHERE {condition} GROUP BY treatment, user {keep}"
        )
        sides = [~rows["treatment"], rows["treatment"]]
        n, d = (np.nan_to_num(rows[name].astype(np.float64)) for name in ("n", "d"))
        covariate = None
        if with_pre:
            pn, pd = rows["pn"].astype(np.float64), rows["pd"].astype(np.float64)
            overall = pn.sum() / pd.sum() if pd.sum() else 0.0
            residual = pn - overall * pd  # 0 for users never seen before: they carry no information
            covariate = [residual[side] for side in sides]
        return Totals([n[s] for s in sides], [d[s] for s in sides], covariate)

    def latencies(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(milliseconds, dense user) per page that has a latency, [control, treatment]."""
        arms = []
        for treatment in ("false", "true"):
            rows = self._fetch(
                f"SELECT latency, user FROM pages WHERE NOT pre AND latency IS NOT NULL AND treatment = {treatment}"
            )
            users = np.unique(rows["user"], return_inverse=True)[1] if len(rows["user"]) else rows["user"]
            arms.append((rows["latency"], users))
        return arms

    def by_bucket(self, metric: str) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Per time bucket: (bucket, treatment, user, numerator, denominator) arrays of that bucket's users."""
        numerator, denominator = _TOTALS[metric]
        if metric == "user CTR":
            denominator = "max(1)"
        found = []
        for bucket in range(len(self.buckets)):
            rows = self._fetch(
                f"SELECT treatment, user, {numerator} AS n, {denominator} AS d FROM pages "
                f"WHERE NOT pre AND bucket = {bucket} GROUP BY treatment, user"
            )
            found.append((bucket, rows["treatment"], rows["user"], rows["n"].astype(float), rows["d"].astype(float)))
        return found

    def segments(self) -> dict[str, list[tuple[str, str]]]:
        """Segment family -> [(label, SQL condition)], for the families that the log can tell apart."""
        families = {
            "query frequency": [("head queries", "head"), ("tail queries", "NOT head")],
            "query length": [
                ("1 or 2 words", "query_words <= 2"),
                ("3 or 4 words", "query_words BETWEEN 3 AND 4"),
                ("5 words and more", "query_words >= 5"),
            ],
        }
        names = self.connection.execute(
            "SELECT platform FROM pages WHERE NOT pre AND platform != '' GROUP BY platform ORDER BY count(*) DESC LIMIT 6"
        ).fetchall()
        if len(names) > 1:
            families["platform"] = [(name, "platform = '" + name.replace("'", "''") + "'") for (name,) in names]
        return {
            family: [(label, f"NOT pre AND {condition}") for label, condition in conditions]
            for family, conditions in families.items()
        }

    def _fetch(self, query: str) -> dict[str, np.ndarray]:
        parameters = {"cap": self.dwell_cap} if "$cap" in query else {}
        fetched = self.connection.execute(query, parameters).fetchnumpy()
        return {
            name: np.ma.filled(values, np.nan) if np.ma.isMA(values) else values for name, values in fetched.items()
        }


def open_log(
    path: Path,
    *,
    control: str,
    treatment: str,
    experiment: str = "",
    start: str | None = None,
    max_pages_per_user: int | None = None,
    winsorise: float = 0.99,
    buckets: int = 30,
    memory_limit: str = "4GB",
    threads: int = 2,
) -> AbLog:
    """Read a compacted log folder, or a Parquet file, folder or glob of `events`, into an AbLog.

    start: pages before it are the pre-period (for CUPED) and no part of the result; winsorise: quantile of a click's
    dwell at which dwell is capped, over both arms; buckets: at most this many points of the cumulative lift.
    DataError on unreadable files or missing columns, InputError if an arm has no page.
    """
    connection = duckdb.connect(
        config={"memory_limit": memory_limit, "threads": threads, "preserve_insertion_order": False}
    )
    files, one_row_per_page = _source(path)
    try:
        columns = {
            row[0]
            for row in connection.execute("DESCRIBE SELECT * FROM read_parquet($files)", {"files": files}).fetchall()
        }
    except duckdb.Error as problem:
        raise DataError(path, f"cannot be read as Parquet: {' '.join(str(problem).split())}") from problem
    needed = {"user_id", "timestamp", "arm", "query"} | ({"clicks"} if one_row_per_page else {"request_id", "clicked"})
    if missing := sorted((needed | {"dwell_seconds"}) - columns):
        raise DataError(path, f"no column {', '.join(missing)}")
    try:
        return _load(
            connection, files, one_row_per_page, path, (control, treatment), experiment, start, max_pages_per_user, winsorise,
            buckets,
        )  # fmt: skip
    except duckdb.Error as problem:
        raise DataError(path, " ".join(str(problem).split())) from problem


def read_interleaved(path: Path, control: str, treatment: str, experiment: str) -> tuple[np.ndarray, np.ndarray]:
    """Pages won per user by (treatment's, control's) team in an experiment's interleaved pages.

    DataError if the log is unreadable or holds no row per page, InputError if no page of it is interleaved.
    """
    files, one_row_per_page = _source(path)
    if not one_row_per_page:
        raise DataError(path, "interleaved pages are in the exposures of a compacted log, this is an events table")
    try:
        wins = _interleaved(duckdb.connect(), files, (control, treatment), experiment)
    except duckdb.Error as problem:
        raise DataError(path, " ".join(str(problem).split())) from problem
    if wins is None:
        raise InputError(f"{path}: experiment {experiment!r} has no interleaved page")
    return wins


def _source(path: Path) -> tuple[list[str], bool]:
    """(Parquet files, whether they hold a row per page): a compacted log's exposures, else an events table."""
    if (path / "exposures").is_dir():
        files, pages = sorted((path / "exposures").glob("*.parquet")), True
    elif path.is_dir():
        files, pages = sorted(path.glob("*.parquet")), False
    else:
        files, pages = sorted(path.parent.glob(path.name)), False
    if not files:
        raise DataError(path, "no Parquet file there; run clients/ab_compact.py on the router's log first")
    return [str(file) for file in files], pages


def _load(connection, files, one_row_per_page, path, arms, experiment, start, max_pages, winsorise, buckets) -> AbLog:
    control, treatment = arms
    source = "read_parquet($files)"
    if one_row_per_page:
        rows = f"""SELECT user_id, epoch_us(timestamp) AS moment, arm, query, clicks, dwell_seconds AS dwell,
            fallback != '' AS fell_back,
            latency_ms AS latency, platform, experiment, forced, model_version FROM {source}"""
    else:
        rows = f"""SELECT any_value(user_id) AS user_id, min(epoch_us(timestamp)) AS moment, any_value(arm) AS arm,
            any_value(query) AS query, sum(clicked::INT)::INT AS clicks,
            sum(CASE WHEN clicked THEN dwell_seconds ELSE 0 END)::FLOAT AS dwell, false AS fell_back,
            NULL::FLOAT AS latency, '' AS platform, '' AS experiment, false AS forced, '' AS model_version
            FROM {source} GROUP BY request_id"""
    # literals, not parameters: a CREATE TABLE AS cannot be prepared with them
    connection.execute(f"CREATE TEMP TABLE raw AS {rows.replace('$files', _literal(files))}")
    if one_row_per_page:
        names = [
            n for (n,) in connection.execute("SELECT DISTINCT experiment FROM raw WHERE experiment != ''").fetchall()
        ]
        if not experiment and len(names) > 1:
            raise InputError(f"{path}: several experiments ({', '.join(sorted(names))}); choose one with --experiment")
        experiment = experiment or (names[0] if names else "")
    in_experiment = f"experiment = {_literal(experiment)} AND arm IN ({_literal(control)}, {_literal(treatment)})"
    before = f"moment < {_moment(start)}" if start else "false"
    outside = _one(connection, f"SELECT count(*) FROM raw WHERE NOT ({in_experiment}) AND NOT ({before})")
    forced = _one(connection, "SELECT count(*) FROM raw WHERE forced")
    connection.execute(
        f"CREATE TEMP TABLE heavy AS SELECT user_id FROM raw GROUP BY user_id HAVING count(*) > {max_pages}"
        if max_pages
        else "CREATE TEMP TABLE heavy (user_id VARCHAR)"
    )
    dropped = "user_id IN (SELECT user_id FROM heavy)"
    heavy_pages = _one(connection, f"SELECT count(*) FROM raw WHERE {dropped}") if max_pages else 0
    # an arm's user: someone seen in both arms (a leaky split) is a user of each, and counted apart
    connection.execute(
        f"""CREATE TEMP TABLE arm_users AS SELECT user_id, arm = {_literal(treatment)} AS treatment,
            (row_number() OVER () - 1)::INT AS user FROM (SELECT DISTINCT user_id, arm FROM raw
            WHERE {in_experiment} AND NOT forced AND NOT ({before}) AND NOT {dropped})"""
    )
    users = [_one(connection, f"SELECT count(*) FROM arm_users WHERE treatment = {side}") for side in ("false", "true")]
    for arm, count in zip(arms, users):
        if count < 2:
            found = [a for (a,) in connection.execute("SELECT DISTINCT arm FROM raw WHERE arm != ''").fetchall()]
            raise InputError(
                f"{path}: {count} users in arm {arm!r}; the log has arms {', '.join(sorted(found)) or 'none'}"
            )
    both = _one(connection, "SELECT count(*) FROM (SELECT user_id FROM arm_users GROUP BY user_id HAVING count(*) > 1)")
    window = f"{in_experiment} AND NOT forced AND NOT ({before})"
    first, last = (_one(connection, f"SELECT {end}(moment) FROM raw WHERE {window}") for end in ("min", "max"))
    span = max(last - first, 1)  # microseconds
    slices = max(1, min(buckets, span // _DAY or buckets))
    # queries are head if they belong to the most frequent ones that together make up half of the pages
    connection.execute(
        """CREATE TEMP TABLE head AS SELECT query FROM (SELECT query, count(*) AS n,
           sum(count(*)) OVER (ORDER BY count(*) DESC, query ROWS UNBOUNDED PRECEDING) - count(*) AS before
           FROM raw GROUP BY query)
           WHERE before < (SELECT count(*) FROM raw) / 2"""
    )
    connection.execute(
        f"""CREATE TEMP TABLE pages AS SELECT arm_users.user, arm_users.treatment, ({before}) AS pre,
            least(floor((moment - {first}) / {span} * {slices}), {slices - 1})::INT AS bucket,
            clicks::INT AS clicks, dwell::FLOAT AS dwell, fell_back, latency,
            len(string_split(trim(raw.query), ' '))::INT AS query_words, platform, head.query IS NOT NULL AS head
            FROM raw JOIN arm_users USING (user_id) LEFT JOIN head ON raw.query = head.query
            WHERE ({before} OR ({in_experiment} AND (arm = {_literal(treatment)}) = arm_users.treatment)) AND NOT forced"""
    )
    versions = connection.execute(
        f"SELECT model_version, count(*) FROM raw WHERE {window} AND model_version != '' GROUP BY 1 ORDER BY 2 DESC"
    ).fetchall()
    connection.execute("DROP TABLE raw")
    pages = _one(connection, "SELECT count(*) FROM pages WHERE NOT pre")
    heaviest = (
        _one(connection, "SELECT max(n) FROM (SELECT count(*) AS n FROM pages WHERE NOT pre GROUP BY user)") / pages
    )
    cap = _one(connection, f"SELECT quantile_cont(dwell / clicks, {winsorise}) FROM pages WHERE NOT pre AND clicks > 0")
    ends = [_utc(first + span * (i + 1) // slices).isoformat(timespec="minutes") for i in range(slices)]
    interleaved = _interleaved(connection, files, arms, experiment) if one_row_per_page else None
    return AbLog(
        connection=connection,
        pages=pages,
        users=(users[0], users[1]),
        users_in_both_arms=both,
        heaviest_user_share=float(heaviest),
        first=_utc(first).isoformat(timespec="seconds"),
        last=_utc(last).isoformat(timespec="seconds"),
        buckets=ends,
        experiment=experiment,
        dwell_cap=float(cap or 0.0),
        has_latency=_one(connection, "SELECT count(latency) FROM pages WHERE NOT pre") > 0,
        has_pre_period=_one(connection, "SELECT count(*) FROM pages WHERE pre") > 0,
        forced_pages=forced,
        outside_pages=outside - forced if outside >= forced else outside,
        dropped_heavy_users=_one(connection, "SELECT count(*) FROM heavy"),
        dropped_heavy_pages=heavy_pages,
        model_versions=dict(versions),
        interleaved=interleaved,
    )


def _interleaved(connection, files, arms, experiment) -> tuple[np.ndarray, np.ndarray] | None:
    """Pages won by each team per user, of pages that interleaved the two rankings; None if there are none."""
    control, treatment = map(_literal, arms)
    clicks = {arm: f"len(list_filter(clicked_positions, lambda p: teams[p] = {arm}))" for arm in (control, treatment)}
    rows = connection.execute(
        f"""SELECT sum((t > c)::INT) AS treatment, sum((c > t)::INT) AS control FROM (SELECT user_id,
            {clicks[treatment]} AS t, {clicks[control]} AS c FROM read_parquet({_literal(files)})
            WHERE len(teams) > 0 AND NOT forced AND experiment = {_literal(experiment)}) GROUP BY user_id"""
    ).fetchnumpy()
    if not len(rows["treatment"]):
        return None
    return rows["treatment"].astype(float), rows["control"].astype(float)


def _utc(microseconds: int) -> datetime:
    return datetime.fromtimestamp(microseconds / 1e6, UTC)


def _moment(text: str) -> int:
    """Microseconds since 1970 of an ISO time, UTC where it names no zone. InputError if it is none."""
    try:
        given = datetime.fromisoformat(text)
    except ValueError as problem:
        raise InputError(f"start: {text!r} is not an ISO time like 2026-11-21T00:00:00+00:00") from problem
    return int((given if given.tzinfo else given.replace(tzinfo=UTC)).timestamp() * 1e6)


def _one(connection: duckdb.DuckDBPyConnection, query: str):
    row = connection.execute(query).fetchone()
    return row[0] if row else None


def _literal(value: str | list[str]) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "'" + value.replace("'", "''") + "'"
