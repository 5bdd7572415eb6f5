"""The checks of one day: SQL over the compacted log, and the version folders of the models that served."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq

from clients.ab.report.statistics import Estimate, UserTotals, compare_arms, estimate, quantile
from clients.ab.watch.drift import score_drift
from clients.ab.watch.findings import Finding
from ranking.calibration import ece, probability
from ranking.database import literal
from ranking.errors import InputError
from ranking.schema import read_table, reading
from ranking.text import StudentFormat
from ranking.text_figures import text_figures

logger = logging.getLogger("ab_watch")

REFERENCE = "reference.json"  # of a version folder: what the build saw
MIN_USERS = 30  # of a segment or an arm: below, a day says nothing
UNBLENDED = "holds if no caller sends a prior: else build with --callers-send-prior"


@dataclass(frozen=True)
class WatchLimits:
    """From where a change is large enough to tell somebody. What is a test must be significant besides.

    Args:
        psi: population stability index of an arm's scores; 0.1 is usually called a small shift, 0.25 a large one
        new_queries: relative rise of the share of pages whose query the days before had not: 0.5 is half as many again
        new_pages: and by how much of all pages it must rise at least
        unknown_tokens: rise of the share of tokens that the vocabulary does not know
        cut_fields: rise of the share of queries, titles or summaries that are cut
        ece: calibration error on fresh judgments above the build's
        ctr_drop: relative fall of page CTR
        latency_rise: relative rise of the 99th percentile of latency
    """

    psi: float = 0.2
    new_queries: float = 0.5
    new_pages: float = 0.01
    unknown_tokens: float = 0.02
    cut_fields: float = 0.05
    ece: float = 0.05
    ctr_drop: float = 0.05
    latency_rise: float = 0.5


@dataclass(frozen=True)
class Watched:
    """What is looked at: the day, the days before it that it is compared with, and the places."""

    database: duckdb.DuckDBPyConnection
    data: Path
    repository: Path | None
    day: date
    days_before: int
    text_pairs: int
    limits: WatchLimits

    def load(self) -> None:
        """Make the table `page` of both spans, with the column `today`. InputError if the day has no page."""
        folder = self.data / "exposures"
        days = [self.day - timedelta(days=back) for back in range(self.days_before + 1)]
        files = [path for day in days if (path := folder / f"{day}.parquet").is_file()]
        if not (folder / f"{self.day}.parquet").is_file():
            raise InputError(f"{folder}: no pages of {self.day}; run ab_compact.py first")
        self.database.execute(f"""
            CREATE TABLE page AS
            SELECT request_id, user_id, served_by, model_version, fallback, query, platform, documents, scores, clicks,
                   latency_ms, (timestamp AT TIME ZONE 'UTC')::DATE AS day, day = DATE '{self.day}' AS today
            FROM read_parquet({literal(files)}) WHERE NOT forced
        """)
        if not self.value("SELECT count(*) FROM page WHERE today"):
            raise InputError(f"{folder}: every page of {self.day} was forced: nothing to watch")
        for model, version, where in self._served() if self.repository is not None else ():
            if not (where / REFERENCE).is_file():
                logger.warning("%s: no %s: scores and texts of %s %s are not checked", where, REFERENCE, model, version)

    def value(self, query: str) -> Any:
        """The one value of a query."""
        row = self.database.execute(query).fetchone()
        return row[0] if row else None

    def versions(self) -> list[tuple[str, str, Path]]:
        """(arm's model, version, its folder) of the models that ranked today and whose folder is at hand."""
        return [one for one in self._served() if (one[2] / REFERENCE).is_file()]

    def _served(self) -> list[tuple[str, str, Path]]:
        if self.repository is None:
            return []
        found = self.database.execute("""
            SELECT DISTINCT served_by, model_version FROM page
            WHERE today AND served_by NOT IN ('incoming', 'interleaved') AND model_version <> '' ORDER BY ALL
        """).fetchall()
        return [(model, version, self.repository / model / version) for model, version in found]


def score_findings(watched: Watched) -> list[Finding]:
    """Scores of each model today against those that its version was built with."""
    findings = []
    for model, version, folder in watched.versions():
        reference = _reference(folder, "scores")
        # one document of one page of each user: independent draws, as the test wants them
        live = watched.database.execute(
            """
            SELECT scores[1 + (hash(request_id) % len(scores)::UBIGINT)::INTEGER] FROM page
            WHERE today AND served_by = ? AND model_version = ? AND len(scores) > 0
            QUALIFY row_number() OVER (PARTITION BY user_id ORDER BY hash(request_id)) = 1
            """,
            [model, version],
        ).fetchnumpy()
        (values,) = live.values()
        if len(values) < MIN_USERS:
            continue
        drift = score_drift(reference, np.asarray(values))
        limit = watched.limits.psi
        where = {"model": model, "version": version}
        findings.append(Finding("score_drift", where, drift.psi, 0.0, f"{limit:g}", drift.psi > limit, drift.p))
    return findings


def query_findings(watched: Watched) -> list[Finding]:
    """The share of pages whose query the days before had not, against the same share of the days before.

    Every day is measured against as many days before it: half of those at hand, so that the other half is there to
    compare with. The day before alone would do for a jump; a taste that turns slowly has moved it already.
    """
    days = watched.value("SELECT count(DISTINCT day) FROM page") - 1
    if days < 2:
        return []
    back = (days + 1) // 2
    rows = watched.database.execute(
        """
        WITH daily AS (SELECT query, day, dense_rank() OVER (ORDER BY day) AS number FROM page GROUP BY query, day),
        seen AS (SELECT *, number - lag(number) OVER (PARTITION BY query ORDER BY number) AS since FROM daily)
        SELECT today, user_id, sum((since IS NULL OR since > $back)::INT)::DOUBLE AS new, count(*)::DOUBLE AS pages
        FROM page JOIN seen USING (query, day) WHERE number > $back GROUP BY ALL
        """,
        {"back": back},
    ).fetchnumpy()
    compared = _both(rows, "new", "pages")
    if compared is None:
        return []
    before, now = compared
    limit = max(before.value * (1 + watched.limits.new_queries), before.value + watched.limits.new_pages)
    p = compare_arms(before, now).p
    return [Finding("query_mix", {}, now.value, before.value, f"{limit:.4f}", now.value > limit, p)]


def click_findings(watched: Watched) -> list[Finding]:
    """Page CTR of every arm's model and platform against the days before."""
    findings = []
    for column in ("served_by", "platform"):
        # not a query for each name: callers may send as many platforms as they have pages
        watched.database.execute(f"""
            CREATE OR REPLACE TEMP TABLE clicking AS
            SELECT {column} AS name, today, user_id, sum((clicks > 0)::INT)::DOUBLE AS clicked,
                   count(*)::DOUBLE AS pages FROM page GROUP BY ALL;
            CREATE OR REPLACE TEMP TABLE named AS
            SELECT name, row_number() OVER (ORDER BY name) - 1 AS number FROM clicking GROUP BY name
            HAVING least(count(*) FILTER (today), count(*) FILTER (NOT today)) >= {MIN_USERS}
        """)
        names = watched.database.execute("SELECT name FROM named ORDER BY number").fetchall()
        rows = watched.database.execute("""
            SELECT number, today, clicked, pages FROM clicking JOIN named USING (name) ORDER BY number
        """).fetchnumpy()
        ends = np.searchsorted(rows["number"], np.arange(len(names)), "right")
        for (name,), start, end in zip(names, [0, *ends], ends):
            compared = _both({of: values[start:end] for of, values in rows.items()}, "clicked", "pages")
            if compared is None:
                continue
            before, now = compared
            where = {"model" if column == "served_by" else column: name or "(none)"}
            limit = before.value * (1 - watched.limits.ctr_drop)
            p = compare_arms(before, now).p
            findings.append(Finding("click_rate", where, now.value, before.value, f"{limit:.4f}", now.value < limit, p))
    return findings


def latency_findings(watched: Watched) -> list[Finding]:
    """The 99th percentile of latency against the days before."""
    rows = watched.database.execute("""
        SELECT today, latency_ms, dense_rank() OVER (ORDER BY user_id) - 1 AS user FROM page
    """).fetchnumpy()
    today, user = np.asarray(rows["today"], bool), np.asarray(rows["user"])
    if min(len(np.unique(user[of])) for of in (~today, today)) < MIN_USERS:
        return []
    before, now = (
        quantile(np.asarray(rows["latency_ms"], float)[of], _numbered(user[of]), 0.99) for of in (~today, today)
    )
    rise = watched.limits.latency_rise
    limit = f"{before.value * (1 + rise):.1f} ms"
    p = compare_arms(before, now).p
    return [Finding("latency", {}, now.value, before.value, limit, now.value > before.value * (1 + rise), p)]


def text_findings(watched: Watched) -> list[Finding]:
    """Unknown tokens and cut fields of today's pages against the build's candidates, as each version reads them."""
    file = watched.data / "events" / f"{watched.day}.parquet"
    versions = watched.versions()
    if not versions or not file.is_file():
        return []
    rows = watched.database.execute(f"""
        SELECT query, title, summary FROM read_parquet({literal(file)}) WHERE title <> '' OR summary <> ''
        ORDER BY hash(request_id, doc_id) LIMIT {int(watched.text_pairs)}
    """).fetchall()
    if len(rows) < MIN_USERS:
        return []
    findings = []
    for model, version, folder in versions:
        built = _reference(folder, "text")
        live = text_figures(StudentFormat.of_checkpoint(folder), *(list(column) for column in zip(*rows)))
        for name in ("unknown", "cut_query", "cut_title", "cut_summary"):
            check = "unknown_tokens" if name == "unknown" else "cut_fields"
            rise = getattr(watched.limits, check)
            value, before = float(getattr(live, name)), float(built[name])
            where = {"model": model, "version": version, "field": name.removeprefix("cut_")}
            findings.append(Finding(check, where, value, before, f"{before + rise:.3f}", value > before + rise))
    return findings


def calibration_findings(watched: Watched, judgments: Path | None) -> list[Finding]:
    """Calibration error of what was served today on fresh judgments, against the build's.

    judgments: a table of judgments; its (query, doc_id) are looked up among the day's pages. The log does not tell into
    which scores a prior was blended, so the build's word counts: into all with --callers-send-prior, else into none.
    """
    if judgments is None:
        return []
    table = read_table(judgments, "judgments")
    watched.database.register("judged", table.select(["query", "doc_id", "grade"]))
    findings = []
    for model, version, folder in watched.versions():
        if not (folder / "probabilities.json").is_file():
            continue
        found = watched.database.execute(
            """
            SELECT any_value(score) AS score, any_value(grade) AS grade FROM (
                SELECT query, unnest(documents) AS doc_id, unnest(scores) AS score FROM page
                WHERE today AND served_by = ? AND model_version = ?) JOIN judged USING (query, doc_id)
            GROUP BY query, doc_id
            """,
            [model, version],
        ).fetchnumpy()
        if len(found["score"]) < MIN_USERS:
            continue
        maps = json.loads((folder / "probabilities.json").read_text(encoding="utf-8"))
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        quality, errors = manifest["quality"], manifest["probabilities"]
        blended = quality["callers_send_prior"]
        calibration, built = (
            (maps["with_prior"], errors["ece_with_prior"]) if blended else (maps["alone"], errors["ece"])
        )
        note = "" if blended or not quality["prior"]["weight"] else UNBLENDED
        value = ece(probability(np.asarray(found["score"]), calibration), np.asarray(found["grade"]) > 0)
        limit = built + watched.limits.ece
        where = {"model": model, "version": version}
        findings.append(Finding("calibration", where, value, built, f"{limit:.3f}", value > limit, note=note))
    return findings


def latest_day(data: Path, today: date) -> date:
    """The last day that compaction wrote and that is over: of the running one most pages and clicks are still to come.

    The running one where there is no other; one to come, of a router's wrong clock or a simulation, where there is
    nothing else. InputError if there is none, or a file cannot be read.
    """
    days = []
    for path in (data / "exposures").glob("*.parquet"):
        with reading(path):
            if pq.read_metadata(path).num_rows:
                days.append(_day_of(path))
    if not days:
        raise InputError(f"{data / 'exposures'}: no day there; run ab_compact.py first")
    if max(days) > today:
        logger.warning("%s has pages of %s, a day to come: a router's clock was wrong", data, max(days))
    if over := [day for day in days if day < today]:
        return max(over)
    return today if today in days else max(days)


def _day_of(path: Path) -> date:
    try:
        return date.fromisoformat(path.stem)
    except ValueError as problem:
        raise InputError(f"{path}: its name is no day, so ab_compact.py did not write it; move it away") from problem


def _reference(folder: Path, name: str) -> Any:
    """A part of what a version keeps of its build. InputError if it cannot be read."""
    try:
        part = json.loads((folder / REFERENCE).read_text(encoding="utf-8"))[name]
        if not part:
            raise ValueError(f"{name} is empty")
        return part
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise InputError(f"{folder / REFERENCE}: cannot be read ({problem!r}); build the version again") from problem


def _both(rows: dict[str, Any], numerator: str, denominator: str) -> tuple[Estimate, Estimate] | None:
    """A ratio of user totals in the days before and today; None where either has too few users."""
    today = np.asarray(rows["today"], bool)
    if min(today.sum(), (~today).sum()) < MIN_USERS:
        return None
    before, now = (
        estimate(UserTotals(np.asarray(rows[numerator], float)[of], np.asarray(rows[denominator], float)[of]))
        for of in (~today, today)
    )
    return before, now


def _numbered(users: np.ndarray) -> np.ndarray:
    return np.unique(users, return_inverse=True)[1]
