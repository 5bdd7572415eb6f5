"""The router's logged pages, and how another model would have ordered them, as rows for the estimators.

Weights follow the position-based model: a document that the new arm would show at position k' and that stood at
position k has the weight p_k' / p_k. Relevance of a pair, for the doubly robust estimate, is its clicks divided by its
expected examinations on the pages of other users.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clients.ab.forecast.estimators import Floats, LoggedRows
from ranking.database import literal
from ranking.errors import DataError, InputError
from ranking.schema import reading

FOLDS = 5
PRIOR_EXAMINATIONS = 5.0  # a pair's relevance is drawn towards the mean as if it had been looked at so often


@dataclass(frozen=True)
class PositionBias:
    """Examination propensities of positions 1, 2, ..., float [k], 0 where nobody looks; errors of their logs."""

    values: Floats
    log_errors: Floats

    @classmethod
    def read(cls, path: Path) -> PositionBias:
        """From the report that prepare_clicks writes beside its clicks. InputError if it has no such figures."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["position_bias"]
            values = {int(k): float(v) for k, v in found["propensities"].items()}
            errors = {int(k): float(v) for k, v in found["standard_errors_of_log"].items()}
            if sorted(values) != list(range(1, len(values) + 1)) or not values:
                raise ValueError(f"positions {sorted(values)[:5]}: all from 1 on are needed")
            if not np.isfinite([*values.values(), *errors.values()]).all() or min(values.values()) < 0:
                raise ValueError("a propensity or an error of one that is negative or no number")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            raise InputError(
                f"{path}: no position bias there ({problem!r}); give the .report.json of prepare_clicks without "
                "--no-debias"
            ) from problem
        depth = len(values)
        return cls(*(np.array([of.get(k, 0.0) for k in range(1, depth + 1)]) for of in (values, errors)))

    def at(self, places: NDArray[np.int64]) -> Floats:
        """Propensities of 0-based places, float [n]; below the last known position nobody is taken to look."""
        return np.where(places < len(self.values), self.values[np.minimum(places, len(self.values) - 1)], 0.0)


@dataclass(frozen=True)
class ScoredPages:
    """Logged pages with another model's scores. n shown documents, p pages.

    page, place, new_place: int [n], 0-based, as shown and as the other model would show; clicked: float [n]; pair: int
    [n], number of query and document; user: int [p].
    """

    page: NDArray[np.int64]
    place: NDArray[np.int64]
    new_place: NDArray[np.int64]
    clicked: Floats
    pair: NDArray[np.int64]
    user: NDArray[np.int64]


def read_pages(
    database: duckdb.DuckDBPyConnection, data: Path, model: str, experiment: str, arm: str, scores: Path | None
) -> ScoredPages:
    """Pages that were not forced, with the scores that `model` gave them in the shadow.

    data: what ab_compact wrote; experiment, arm: take only these pages, empty for all; scores: Parquet (request_id,
    doc_id, score) in the shadow's place. InputError if no page has such scores.
    """
    folders = {name: data / name for name in ("exposures", *(() if scores else ("shadows",)))}
    for name, folder in folders.items():
        if not any(folder.glob("*.parquet")):
            advice = "give the experiment a `shadow` share, or score pages yourself and give --scores"
            raise InputError(f"{folder}: no {name} there" + (f"; {advice}" if name == "shadows" else ""))
    given = f"read_parquet({literal(sorted(folders['exposures'].glob('*.parquet')))})"
    if scores is None:
        shadows = literal(sorted(folders["shadows"].glob("*.parquet")))
        other = f"""SELECT request_id, unnest(documents) AS doc_id, unnest(scores) AS score
            FROM read_parquet({shadows}) WHERE model = {literal(model)} AND failure = ''"""
    else:
        with reading(scores):
            names = pq.read_schema(scores).names
        if missing := {"request_id", "doc_id", "score"} - set(names):
            raise DataError(scores, f"no column {', '.join(sorted(missing))}")
        _check_scores(database, scores)
        other = f"SELECT request_id::VARCHAR AS request_id, doc_id::VARCHAR AS doc_id, score FROM {_table(scores)}"
    wanted = [f"{name} = {literal(value)}" for name, value in (("experiment", experiment), ("arm", arm)) if value]
    rows = database.execute(f"""
        WITH shown AS (
            SELECT request_id, user_id, query, unnest(documents) AS doc_id,
                   generate_subscripts(documents, 1) - 1 AS place, clicked_positions
            FROM {given} WHERE {" AND ".join(["NOT forced", *wanted])}),
        joined AS (
            SELECT shown.*, score, count(score) OVER page = count(*) OVER page AS whole
            FROM shown LEFT JOIN ({other}) USING (request_id, doc_id) WINDOW page AS (PARTITION BY request_id))
        SELECT dense_rank() OVER (ORDER BY request_id) - 1 AS page, dense_rank() OVER (ORDER BY user_id) - 1 AS user,
               place, list_contains(clicked_positions, place + 1)::DOUBLE AS clicked,
               dense_rank() OVER (ORDER BY query, doc_id) - 1 AS pair,
               row_number() OVER (PARTITION BY request_id ORDER BY score DESC, place) - 1 AS new_place
        FROM joined WHERE whole ORDER BY page, place
    """).fetchnumpy()
    if not len(rows["page"]):
        chosen = f" of {' and '.join(wanted)}" if wanted else ""
        raise InputError(f"{data}: no page{chosen} was scored by {model or scores} in every document it showed")
    whole = {name: np.asarray(column).astype(np.int64) for name, column in rows.items() if name != "clicked"}
    first = np.unique(whole["page"], return_index=True)[1]
    clicked = np.asarray(rows["clicked"], np.float64)
    return ScoredPages(whole["page"], whole["place"], whole["new_place"], clicked, whole["pair"], whole["user"][first])


def _table(scores: Path) -> str:
    return f"read_parquet({literal(scores)})"


def _check_scores(database: duckdb.DuckDBPyConnection, scores: Path) -> None:
    """DataError: no numbers, or a document of a page twice. A null is a document without a score."""
    with reading(scores):
        kind = pq.read_schema(scores).field("score").type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)):
        raise DataError(scores, f"score is {kind}: numbers are needed")
    for problem, query in {
        # not by isnan: DuckDB 2.0 takes the file's own statistics for a proof that there is none
        "has a score that is NaN": f"SELECT request_id, doc_id FROM {_table(scores)} WHERE score::VARCHAR ILIKE 'nan'",
        "is there twice": f"SELECT request_id, doc_id FROM {_table(scores)} GROUP BY ALL HAVING count(*) > 1",
    }.items():
        if found := database.execute(f"{query} LIMIT 1").fetchone():
            raise DataError(scores, f"document {found[1]!r} of page {found[0]!r} {problem}")


def rows_of(pages: ScoredPages, bias: PositionBias) -> LoggedRows:
    """The estimators' rows under the position-based model."""
    shown, wanted = bias.at(pages.place), bias.at(pages.new_place)
    weight = np.divide(wanted, shown, out=np.zeros(len(shown)), where=shown > 0)
    relevance = cross_fitted_relevance(pages, shown)
    count = len(pages.user)
    return LoggedRows(
        pages.page,
        pages.clicked,
        weight,
        shown,
        shown * relevance,
        pages.user,
        np.bincount(pages.page, wanted, minlength=count).astype(np.float64),
        np.bincount(pages.page, wanted * relevance, minlength=count).astype(np.float64),
        _log_error(pages, weight, bias),
    )


def cross_fitted_relevance(pages: ScoredPages, shown: Floats) -> Floats:
    """Clicks over expected examinations of each row's pair, on other users' pages, drawn to the mean: float [n]."""
    fold = (pages.user % FOLDS)[pages.page]
    pairs = int(pages.pair.max()) + 1
    key = fold * pairs + pages.pair
    sums = [
        np.bincount(key, values, minlength=FOLDS * pairs).reshape(FOLDS, pairs) for values in (pages.clicked, shown)
    ]
    clicks, examinations = (of.sum(0) - of for of in sums)  # [folds, pairs], each fold's own pages left out
    mean = clicks.sum(1, keepdims=True) / np.maximum(examinations.sum(1, keepdims=True), 1e-9)
    found = (clicks + PRIOR_EXAMINATIONS * mean) / (examinations + PRIOR_EXAMINATIONS)
    return np.minimum(found[fold, pages.pair], 1.0)


def _log_error(pages: ScoredPages, weight: Floats, bias: PositionBias) -> float:
    """Standard error of log(estimate) from the propensities' own: the delta method, positions taken as independent."""
    total = float((weight * pages.clicked).sum())
    if not total:
        return 0.0
    depth = len(bias.values)
    effect = np.zeros(depth)
    for places, sign in ((pages.new_place, 1.0), (pages.place, -1.0)):
        inside = places < depth
        effect += sign * np.bincount(places[inside], (weight * pages.clicked)[inside], minlength=depth)
    return float(np.sqrt(((effect / total * bias.log_errors) ** 2).sum()))
