"""The judging sheet: which queries are to be judged, and the files of what people said."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.ab.judging.agreement import (
    VALUES,
    advantage_interval,
    krippendorff_alpha,
    last_values,
    verdicts_of_queries,
)
from clients.ab.judging.csv_file import append_row, read_rows
from ranking.database import DuckDbSettings, literal, querying
from ranking.errors import InputError
from ranking.files import write_text
from ranking.schema import DROPPED_QUERY, KNOWN_USER
from ranking.text import normalise

BANDS = ("head", "torso", "tail")  # a third of the pages each: frequent, middling and rare queries
COLUMNS = ("query", "verdict", "rater", "band", "reason", "control", "treatment")
GRADE_COLUMNS = ("query", "doc_id", "title", "summary", "grade")
MAX_QUERY = 2000  # characters


@dataclass(frozen=True)
class SheetQuery:
    """A query to judge. band: one of BANDS, empty for one that a rater typed."""

    query: str
    band: str


def draw_queries(log: Path, per_band: int, seed: int, min_users: int) -> list[SheetQuery]:
    """Queries of a compacted A/B log, per_band of each third of its pages, taken in turn from the bands.

    White space and control characters are one space between words and none at the ends, as the page searches a query:
    else no judgment would ever be of it. Queries of over MAX_QUERY characters are left out. min_users: a query of fewer
    users may be a person's own and is shown to no rater; pages that name no user count as one. InputError if the log
    has none.
    """
    files = sorted((log / "exposures").glob("*.parquet"))
    if not files:
        raise InputError(f"{log / 'exposures'}: no day there; run ab_compact.py first")
    with DuckDbSettings().open_database() as database, querying(log):
        rows = database.execute(f"""
            WITH page AS (
                SELECT trim(regexp_replace(query, '[\\p{{Cc}}\\p{{Z}}]+', ' ', 'g')) AS query, user_id
                FROM read_parquet({literal(files)}) WHERE NOT forced AND query <> {literal(DROPPED_QUERY)}),
            asked AS (
                SELECT query, count(*) AS pages, count(DISTINCT {KNOWN_USER}) AS users FROM page
                WHERE length(query) <= {MAX_QUERY} GROUP BY query),
            shared AS (SELECT *, sum(pages) OVER (ORDER BY pages DESC, query) - pages / 2 AS place,
                              sum(pages) OVER () AS total FROM asked WHERE users >= {int(min_users)})
            SELECT query, least(2, floor(3 * place / total))::INTEGER AS band FROM shared
            QUALIFY row_number() OVER (PARTITION BY band ORDER BY hash(query || {int(seed)})) <= {int(per_band)}
            ORDER BY hash(query || {int(seed)})
        """).fetchall()
    if not rows:
        raise InputError(f"{log}: no query that {min_users} users share, so none that a rater may see")
    by_band = [[SheetQuery(query, BANDS[band]) for query, band in rows if band == number] for number in range(3)]
    return [part[turn] for turn in range(per_band) for part in by_band if turn < len(part)]


class Sheet:
    """Judgments and grades on disk, and what is still open for a rater. InputError if a file is of another kind.

    arms: control and treatment; judgments of two others may stand in the same file, and say nothing of these.
    """

    def __init__(
        self, judgments: Path, grades: Path, queries: Sequence[SheetQuery], alpha: float, arms: tuple[str, str]
    ):
        self.judgments, self.grades, self.queries, self.alpha = judgments, grades, list(queries), alpha
        self.arms = arms
        self._rows = [row for row in read_rows(judgments, COLUMNS) if (row["control"], row["treatment"]) == arms]
        self._graded = read_rows(grades.with_suffix(".raters.csv"), (*GRADE_COLUMNS, "rater"))

    def next_for(self, rater: str) -> dict[str, Any]:
        """The rater's next query, None where all are judged or skipped; with how many are done."""
        seen = {row["query"] for row in self._rows if row["rater"] == rater}
        left = [one for one in self.queries if one.query not in seen]
        done = len(self.queries) - len(left)
        return {"query": left[0].query if left else None, "done": done, "total": len(self.queries)}

    def add(self, query: str, verdict: str, rater: str, reason: str) -> None:
        """Append a judgment, or a skip: verdict empty, with its reason. A rater's later word on a query replaces it.

        OSError if it cannot be stored; then it does not count either.
        """
        band = next((one.band for one in self.queries if one.query == query), "")
        row = dict(zip(COLUMNS, (query, verdict, rater, band, reason, *self.arms)))
        append_row(self.judgments, COLUMNS, row)
        self._rows.append(row)

    def add_grade(self, rater: str, row: dict[str, Any]) -> None:
        """Append a rater's grade, and write the table that prepare_data reads: the middle grade of each pair.

        OSError if either cannot be written.
        """
        grade = {name: str(row[name]) for name in GRADE_COLUMNS} | {"rater": rater}
        append_row(self.grades.with_suffix(".raters.csv"), (*GRADE_COLUMNS, "rater"), grade)
        self._graded.append(grade)
        pairs: dict[tuple[str, str], dict[str, dict[str, str]]] = defaultdict(dict)
        for one in self._graded:
            # a rater's later grade replaces the earlier one, however the query was typed: prepare_data calls
            # "Red film" and "red film" one query, and would refuse a table with both
            pairs[normalise(one["query"]).casefold(), one["doc_id"]][one["rater"]] = one
        lines = []
        for by_rater in pairs.values():
            middle = sorted(by_rater.values(), key=lambda one: int(one["grade"]))[(len(by_rater) - 1) // 2]
            line = {name: middle[name] for name in GRADE_COLUMNS} | {"grade": int(middle["grade"])}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        write_text(self.grades, "".join(lines))

    def standing(self) -> dict[str, Any]:
        """Counts of queries, advantage with its always-valid interval, agreement, and whether one may stop."""
        last = last_values((row["query"], row["rater"], row["verdict"]) for row in self._rows)
        verdicts = verdicts_of_queries(last)
        advantage, low, high = advantage_interval(verdicts, self.alpha)
        agreement = krippendorff_alpha(last)
        return {
            "queries": len(verdicts),
            **{name: verdicts.count(name) for name in VALUES},
            "advantage": advantage,
            "low": low,
            "high": high,
            "decided": bool(verdicts) and (low > 0 or high < 0),
            "agreement": None if math.isnan(agreement) else agreement,
            "skipped": sum(not row["verdict"] for row in self._rows),
        }
