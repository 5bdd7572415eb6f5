"""What of a click log may be learnt from: no query of few people, none with personal data (docs/privacy.md).

A decoder repeats rare training texts word for word (Carlini et al., "The Secret Sharer", USENIX Security 2019), and a
rare query may be a person's own. So a query counts only once enough people have typed it, as in the k-anonymity of
Sweeney (2002), and a single person moves the weights of pairs only so far.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from ranking.errors import InputError
from ranking.query_engine import QueryEngine, single_row, single_value
from ranking.schema import DROPPED_QUERY, KNOWN_USER, NO_USER
from training.clicks.personal_data import PersonalData, kinds

LOGGER = logging.getLogger(__name__)
_HASHED = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class PrivacySettings:
    """What of people may reach training.

    Args:
        min_users: distinct users who must have typed a query for it to be learnt from, all pages that name no user
            counted as one; 1 takes every query
        window_days: within so many days, at any time of the log
        personal_data: what becomes of queries with e-mail addresses, numbers, postal addresses and the like: "drop"
            them, "mask" those parts before users are counted, or "keep" them
        max_user_clicks: satisfied clicks of one user on one document of a query that count; 0 for all
    """

    min_users: int = 5
    window_days: int = 30
    personal_data: Literal["drop", "mask", "keep"] = "drop"
    max_user_clicks: int = 3

    def __post_init__(self) -> None:
        for name, least in (("min_users", 1), ("window_days", 1), ("max_user_clicks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: {least} or more is needed")


# for logs that no person has written, as a simulation's
OPEN_GATE = PrivacySettings(min_users=1, personal_data="keep", max_user_clicks=0)


class ReadableQueries:
    """Says of each normalised query what may be kept of it. counts: queries left out or masked, by reason."""

    def __init__(self, settings: PrivacySettings):
        self._mode = settings.personal_data
        self._personal = PersonalData() if settings.personal_data != "keep" else None
        self.counts: Counter[str] = Counter()
        self.by_kind: Counter[str] = Counter()

    def __call__(self, query: str) -> str:
        """The query as it may be learnt from; empty if it may not."""
        if query == DROPPED_QUERY or _HASHED.fullmatch(query):
            self.counts["not_stored"] += 1  # the router was told to drop or to hash queries
            return ""
        spans = self._personal.spans(query) if self._personal else []
        if not spans or self._personal is None:
            return query
        self.by_kind += kinds(spans)
        self.counts["personal"] += 1
        return "" if self._mode == "drop" else self._personal.masked(query, spans)


def require_users(settings: PrivacySettings, absent: list[str]) -> None:
    """InputError if the log lacks what the gate counts. absent: columns that the log has not."""
    if settings.min_users > 1 and "user_id" in absent:
        raise InputError(
            f"the log has no user_id, so nobody can say which queries {settings.min_users} users share; name the "
            "column with --columns user_id=THEIRS, or take every query with --privacy.min-users 1"
        )
    if settings.min_users > 1 and "timestamp" in absent:
        LOGGER.warning("the log has no timestamp: users of a query are counted over the whole log, not over a window")


def drop_rare_queries(engine: QueryEngine, settings: PrivacySettings) -> dict[str, Any]:
    """Take the number from every query that fewer than min_users users typed within window_days; returns counts.

    engine: has `people` (user_id, timestamp, query) and `spellings` (raw, query_no) of normalised_queries.py.
    """
    if settings.min_users == 1:
        return {"rare_queries": 0, "rare_events": 0, "unnamed_events": 0}
    engine.table(
        "daily",
        f"""SELECT query_no, {KNOWN_USER} AS user_id, CAST(date_trunc('day', timestamp) AS DATE) AS day
           FROM people JOIN spellings ON people.query = raw GROUP BY ALL""",
    )
    # most queries that pass do so within one day; only the others' few users a day are joined over the window
    engine.table(
        "shared",
        "SELECT DISTINCT query_no FROM daily GROUP BY query_no, day HAVING count(*) >= $users",
        users=settings.min_users,
    )
    engine.table(
        "shared",
        """
        WITH rest AS (SELECT * FROM daily ANTI JOIN shared USING (query_no))
        SELECT query_no FROM shared UNION ALL
        SELECT DISTINCT ends.query_no FROM (SELECT DISTINCT query_no, day FROM rest) ends
        JOIN rest ON rest.query_no = ends.query_no
            AND rest.day BETWEEN ends.day - CAST($days - 1 AS INTEGER) AND ends.day
        GROUP BY ends.query_no, ends.day HAVING count(DISTINCT rest.user_id) >= $users
        """,
        days=settings.window_days,
        users=settings.min_users,
    )
    rare, events = single_row(
        engine,
        """SELECT count(DISTINCT query_no), count(*)
           FROM people JOIN spellings ON people.query = raw ANTI JOIN shared USING (query_no)""",
    )
    engine.table("spellings", "SELECT * FROM spellings SEMI JOIN shared USING (query_no)")
    engine.drop("daily")
    unnamed = single_value(engine, f"SELECT count(*) FROM people WHERE user_id LIKE '{NO_USER}%'")
    if unnamed:
        LOGGER.warning("privacy gate: %d events name no user and count as one person's together", unnamed)
    LOGGER.info(
        "privacy gate: %d queries with %d events have fewer than %d users within %d days and are left out",
        rare, events, settings.min_users, settings.window_days,
    )  # fmt: skip
    return {"rare_queries": rare, "rare_events": events, "unnamed_events": unnamed}


def cap_clicks(engine: QueryEngine, satisfied: str, settings: PrivacySettings, users: bool) -> int:
    """Make `over_cap` (request_id, doc_id): a user's satisfied clicks on a pair beyond max_user_clicks; how many.

    engine: has `people` and `spellings`; satisfied: the SQL condition of a satisfied click; users: whether the log
    tells users apart.
    """
    if not settings.max_user_clicks or not users:
        engine.table("over_cap", "SELECT '' AS request_id, '' AS doc_id WHERE false")
        return 0
    engine.table(
        "over_cap",
        f"""
        SELECT request_id, doc_id FROM people JOIN spellings ON people.query = raw WHERE {satisfied}
        QUALIFY row_number() OVER (PARTITION BY query_no, doc_id, user_id ORDER BY timestamp, request_id) > $most
        """,
        most=settings.max_user_clicks,
    )
    return single_value(engine, "SELECT count(*) FROM over_cap")
