"""Judgments by eye as the report counts them: like the judging page where queries and raters are known."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clients.ab.judging.sheet import Sheet
from clients.ab.report.side_by_side import read_judgments
from clients.ab.report.statistics import GoodSameBad
from ranking.errors import DataError

ARMS = ("baseline", "student")


def test_a_later_word_replaces_the_earlier_and_raters_of_a_query_are_one_judgment(tmp_path):
    """Seen: a corrected judgment counted beside its correction, and five raters of one query as five trials."""
    sheet = Sheet(tmp_path / "j.csv", tmp_path / "g.jsonl", [], 0.05, ARMS)
    for verdict in ("bad", "good"):
        sheet.add("a", verdict, "ann", "")
    for rater in ("ann", "ben", "cat", "dan", "eve"):
        sheet.add("b", "good", rater, "")
    sheet.add("c", "", "ann", "not my language")
    sheet.add("d", "bad", "", "")
    found = read_judgments(tmp_path / "j.csv")
    standing = sheet.standing()
    assert found == GoodSameBad(2, 0, 1) == GoodSameBad(*(standing[name] for name in ("good", "same", "bad")))
    assert found.p == 1.0


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_without_a_rater_count_one_by_one(tmp_path, suffix):
    write(path := tmp_path / f"judged{suffix}", {"query": "aaab", "verdict": ["good", "good", "bad", "same"]})
    assert read_judgments(path) == GoodSameBad(2, 1, 1)


def test_a_spreadsheets_mark_of_utf_8_is_no_part_of_a_name(tmp_path):
    """Seen: "query" was another column, and each of a query's raters counted as a query."""
    path = tmp_path / "judged.csv"
    path.write_text("\ufeffquery,verdict,rater\na,good,ann\na,good,ben\nb,bad,ann\n", encoding="utf-8")
    assert read_judgments(path) == GoodSameBad(1, 0, 1)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_wrong_verdict_is_named_by_its_row_in_the_file(tmp_path, suffix):
    """Seen: rows that a rater had skipped were not counted in the number."""
    rows = {"query": "abc", "rater": "xyz", "verdict": ["", "good", "better"], "reason": ["unclear", "", ""]}
    write(path := tmp_path / f"judged{suffix}", rows)
    with pytest.raises(DataError, match="row 3: verdict 'better' is not good, same or bad"):
        read_judgments(path)
    write(path, {"query": "a"})
    with pytest.raises(DataError, match="no readable column `verdict`"):
        read_judgments(path)
    write(path, {"verdict": [""], "reason": ["unclear"]})
    with pytest.raises(DataError, match="no judgment"):
        read_judgments(path)


def write(path: Path, columns: dict) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
        return
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *zip(*columns.values())])
