"""Judgments by eye: good, same or bad, the treatment's ranking seen beside the control's (clients/search_page.py)."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow.parquet as pq

from clients.ab.report.statistics import GoodSameBad
from ranking.errors import DataError

VERDICTS = ("good", "same", "bad")
csv.field_size_limit(1 << 30)  # Python's own limit is 128 KiB, a query may be longer


def read_judgments(path: Path) -> GoodSameBad:
    """Counts of good, same, bad from a CSV or Parquet file with a column `verdict`.

    DataError names the first other word.
    """
    try:
        if path.suffix == ".parquet":
            verdicts = pq.read_table(path, columns=["verdict"]).column("verdict").to_pylist()
        else:
            with path.open(encoding="utf-8", newline="") as stream:
                # a row without a verdict but with a reason is a query that a rater skipped
                rows = [row for row in csv.DictReader(stream) if row["verdict"] or not row.get("reason")]
            verdicts = [row["verdict"] for row in rows]
    except (OSError, KeyError, ValueError, csv.Error) as problem:
        raise DataError(path, f"no readable column `verdict`: {problem}") from problem
    for number, given in enumerate(verdicts, 1):
        if given not in VERDICTS:
            raise DataError(path, f"verdict {given!r} is not {', '.join(VERDICTS[:-1])} or {VERDICTS[-1]}", number)
    if not verdicts:
        raise DataError(path, "no judgment")
    return GoodSameBad(*(verdicts.count(name) for name in VERDICTS))
