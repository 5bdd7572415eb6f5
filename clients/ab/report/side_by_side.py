"""Judgments by eye: good, same or bad, the treatment's ranking seen beside the control's (clients/search_page.py)."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from clients.ab.judging.agreement import VALUES, last_values, verdicts_of_queries
from clients.ab.report.statistics import GoodSameBad
from ranking.errors import DataError

logger = logging.getLogger("ab_report")

COLUMNS = ("verdict", "query", "rater", "reason", "control", "treatment")
csv.field_size_limit(1 << 30)  # Python's own limit is 128 KiB, a query may be longer


def read_judgments(path: Path, control: str = "", treatment: str = "") -> GoodSameBad:
    """Counts of good, same, bad from a CSV or Parquet file with a column `verdict`.

    With columns `query` and `rater` a query counts once, as on the judging page; without them every row counts. With
    columns `control` and `treatment` rows of these two count, or with a warning those of the only two that the file
    has: arms and models may have different names. DataError names the first other word, or what else was judged.
    """
    try:
        rows = _rows(path)
        verdicts = [row["verdict"] for row in rows]
    except (OSError, KeyError, ValueError, csv.Error) as problem:
        raise DataError(path, f"no readable column `verdict`: {problem}") from problem
    for number, (given, row) in enumerate(zip(verdicts, rows), 1):
        # a row without a verdict but with a reason is a query that a rater skipped
        if given not in VALUES and (given or not row.get("reason")):
            raise DataError(path, f"verdict {given!r} is not good, same or bad", number)
    if not any(verdicts):
        raise DataError(path, "no judgment")
    if {"control", "treatment"} <= rows[0].keys() and control:
        rows = _of_arms(path, rows, control, treatment)
        verdicts = [row["verdict"] for row in rows]
    if {"query", "rater"} <= rows[0].keys():
        verdicts = verdicts_of_queries(last_values((row["query"], row["rater"], row["verdict"]) for row in rows))
    return GoodSameBad(*(verdicts.count(name) for name in VALUES))


def _of_arms(path: Path, rows: list[dict[str, Any]], control: str, treatment: str) -> list[dict[str, Any]]:
    judged = sorted({(row["control"], row["treatment"]) for row in rows if row["verdict"]})
    named = ", ".join(f"{treatment} beside {control}" for control, treatment in judged)
    chosen = (control, treatment)
    if chosen not in judged:
        if len(judged) > 1:
            raise DataError(path, f"no judgment of {treatment} beside {control}; it has {named}")
        logger.warning("%s: judgments are of %s; they are taken for %s beside %s", path, named, treatment, control)
        (chosen,) = judged
    return [row for row in rows if (row["control"], row["treatment"]) == chosen]


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        there = pq.read_schema(path).names
        return pq.read_table(path, columns=[name for name in COLUMNS if name in there]).to_pylist()
    # a spreadsheet's mark of UTF-8 would be a part of the first column's name
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))
