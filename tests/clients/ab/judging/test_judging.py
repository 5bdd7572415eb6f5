"""People as judges: queries of the log by frequency, what they said on disk, agreement, an interval for every look."""

from __future__ import annotations

import csv
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from clients import search_page
from clients.ab.judging.agreement import advantage_interval, krippendorff_alpha
from clients.ab.judging.csv_file import only_writer
from clients.ab.judging.sheet import Sheet, SheetQuery, draw_queries
from clients.ab.report.side_by_side import read_judgments
from clients.ab.report.statistics import GoodSameBad
from clients.search_page import Config, make_app
from ranking.errors import DataError, InputError
from tests.helpers.ab_logs import log_of
from tests.helpers.graded_rankers import write_data

ARMS = ("baseline", "student")
HEADER = b"query,verdict,rater,band,reason,control,treatment\r\n"


def test_queries_come_in_turn_from_the_thirds_of_the_pages(tmp_path):
    pages = {"head": 100, **{f"torso {i}": 20 for i in range(5)}, **{f"tail {i}": 5 for i in range(20)}, "private": 3}
    drawn = draw_queries(log_of(tmp_path / "log", pages | {"(dropped)": 50}), per_band=2, seed=0, min_users=5)
    assert [one.band for one in drawn] == ["head", "torso", "tail", "torso", "tail"]
    assert all(one.query.startswith(one.band) for one in drawn)
    others = draw_queries(tmp_path / "log", per_band=2, seed=1, min_users=5)
    assert {one.query for one in others} != {one.query for one in drawn}
    with pytest.raises(InputError, match="no query that 99 users share"):
        draw_queries(tmp_path / "log", per_band=2, seed=0, min_users=99)
    (tmp_path / "log/exposures/2026-01-05.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"log: DuckDB: .*2026-01-05\.parquet"):
        draw_queries(tmp_path / "log", per_band=2, seed=0, min_users=5)


def test_pages_that_name_no_user_may_all_be_one_persons(tmp_path):
    log = log_of(tmp_path, {"my rash": 20}, named="no-user-")
    assert draw_queries(log, per_band=2, seed=0, min_users=1)
    with pytest.raises(InputError, match="no query that 2 users share"):
        draw_queries(log, per_band=2, seed=0, min_users=2)


def test_a_query_is_drawn_as_the_page_searches_it(tmp_path):
    """Seen: a judgment of "red film" left the log's "red film " open; one too long to be searched too."""
    spellings = {"red film": 3, "red film ": 3, "\u3000red\tfilm\n": 3, "a" * 2000: 5, "a" * 2001: 20}
    drawn = draw_queries(log_of(tmp_path, spellings), per_band=9, seed=0, min_users=3)
    assert sorted(one.query for one in drawn) == ["a" * 2000, "red film"]


def test_a_rater_goes_on_where_she_stopped_and_others_have_their_own_list(tmp_path):
    queries = [SheetQuery("a", "head"), SheetQuery("=b", "tail")]
    sheet = Sheet(tmp_path / "j.csv", tmp_path / "g.csv", queries, 0.05, ARMS)
    sheet.add("a", "good", "ann", "")
    assert sheet.next_for("ann") == {"query": "=b", "done": 1, "total": 2}
    sheet.add("=b", "", "ann", "not my language")
    again = Sheet(tmp_path / "j.csv", tmp_path / "g.csv", queries, 0.05, ARMS)  # the page was started anew
    assert again.next_for("ann") == {"query": None, "done": 2, "total": 2}
    assert again.next_for("ben")["query"] == "a" and again.standing()["skipped"] == 1
    with (tmp_path / "j.csv").open(newline="") as stream:
        assert [row["band"] for row in csv.DictReader(stream)] == ["head", "tail"]
    (tmp_path / "old.csv").write_text("query,verdict\na,good\n")
    with pytest.raises(InputError, match="its columns are not query, verdict, rater"):
        Sheet(tmp_path / "old.csv", tmp_path / "g.csv", queries, 0.05, ARMS)


def test_a_query_counts_once_however_many_judge_it(tmp_path):
    sheet = Sheet(tmp_path / "j.csv", tmp_path / "g.csv", [], 0.05, ARMS)
    for query, verdicts in {"a": "good good bad", "b": "good good", "c": "bad same"}.items():
        for number, verdict in enumerate(verdicts.split()):
            sheet.add(query, verdict, f"r{number}", "")
    sheet.add("b", "same", "r1", "")  # r1 thought again
    found = sheet.standing()
    assert (found["queries"], found["good"], found["same"], found["bad"]) == (3, 1, 1, 1)
    assert found["advantage"] == 0 and not found["decided"] and found["low"] < 0 < found["high"]
    assert read_judgments(tmp_path / "j.csv") == GoodSameBad(1, 1, 1)


def test_judgments_of_other_arms_say_nothing_of_these(tmp_path, caplog):
    """Seen: the second month's student stood from the start where the first month's had ended, and was "enough"."""
    for treatment, verdict in (("student", "good"), ("student_w48", "bad")):
        sheet = Sheet(tmp_path / "j.csv", tmp_path / "g.csv", [SheetQuery("a", "head")], 0.05, ("baseline", treatment))
        assert sheet.next_for("ann")["query"] == "a" and sheet.standing()["queries"] == 0
        sheet.add("a", verdict, "ann", "")
        if treatment == "student":  # an arm may have another name than its model
            assert read_judgments(tmp_path / "j.csv", "old", "new") == GoodSameBad(1, 0, 0)
            assert "judgments are of student beside baseline; they are taken for new beside old" in caplog.text
    assert read_judgments(tmp_path / "j.csv", "baseline", "student") == GoodSameBad(1, 0, 0)
    assert read_judgments(tmp_path / "j.csv", "baseline", "student_w48") == GoodSameBad(0, 0, 1)
    with pytest.raises(DataError, match="no judgment of new beside old; it has student beside baseline, student_w48"):
        read_judgments(tmp_path / "j.csv", "old", "new")


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"control": "student"}, {"grades": Path("grades.csv")}])
def test_settings_that_no_page_can_have_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"alpha is 0|both student|ends in \.jsonl"):
        Config(data=tmp_path, **wrong)


@pytest.mark.parametrize("taken", ["judgments", "grades"])
def test_two_pages_do_not_write_to_one_file(tmp_path, taken):
    """Seen: each wrote the table of grades without the other's."""
    config = Config(data=tmp_path, judgments=tmp_path / "j" / "judged.csv", grades=tmp_path / "g.jsonl")
    refused = pytest.raises(InputError, match="another judging page writes to it; name another file")
    with only_writer(getattr(config, taken)), refused:
        search_page.main(config)
    with pytest.raises(InputError, match="no documents"):  # free again
        search_page.main(config)


def sheet_of(folder) -> Sheet:
    return Sheet(folder / "j.csv", folder / "g.jsonl", [SheetQuery("a", "head"), SheetQuery("b", "tail")], 0.05, ARMS)


@pytest.mark.parametrize("refusing", ["write", "fsync"])
def test_a_judgment_that_a_full_disk_refuses_is_an_error_and_neither_counts_nor_tears_the_file(
    tmp_path, monkeypatch, refusing
):
    """Seen: it counted until the page was started anew, and the next judgment was glued to what was left of it."""
    sheet = sheet_of(tmp_path)
    sheet.add("a", "good", "ann", "")
    sheet.add_grade("ann", {"query": "a", "doc_id": "1", "title": "t", "summary": "s", "grade": 3})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*_args):
        raise OSError(28, "No space left on device")

    if refusing == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60, limits[1]))
    try:
        with pytest.raises(OSError):
            sheet.add("b", "bad", "ann", "r" * 200)
        with pytest.raises(OSError):
            sheet.add_grade("ann", {"query": "b", "doc_id": "1", "title": "t", "summary": "s" * 200, "grade": 3})
    finally:
        monkeypatch.undo()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert sheet.standing()["queries"] == 1 and sheet.next_for("ann")["done"] == 1
    sheet.add("b", "bad", "ann", "")
    assert sheet_of(tmp_path).standing() == sheet.standing() and sheet.standing()["queries"] == 2


TORN = [
    b"b,go",
    b"b,good,ann,he",
    b"b,good,ann,head,",
    b'b,,ann,head,"of ""two',
    b'b,,ann,head,"two\r\n',
    "b,ö".encode()[:-1],
]


@pytest.mark.parametrize("tail", TORN, ids=range(len(TORN)))
def test_a_row_that_a_crash_tore_is_cut_off_and_named_at_the_next_start(tmp_path, caplog, tail):
    """Seen: the page could not be started any more, with a TypeError."""
    sheet_of(tmp_path).add("a", "", "ann", "two\nlines, of ö")
    whole = (tmp_path / "j.csv").read_bytes()
    (tmp_path / "j.csv").write_bytes(whole + tail)
    sheet = sheet_of(tmp_path)
    assert "row 3 has no proper end" in caplog.text and (tmp_path / "j.csv.torn").read_bytes() == tail + b"\n"
    assert (tmp_path / "j.csv").read_bytes() == whole and sheet.next_for("ann")["done"] == 1
    sheet.add("b", "good", "ann", "")
    caplog.clear()
    assert sheet_of(tmp_path).next_for("ann")["done"] == 2 and not caplog.text


def test_a_torn_row_before_others_is_an_error_that_names_it(tmp_path):
    sheet = sheet_of(tmp_path)
    sheet.add("a", "good", "ann", "")
    with (tmp_path / "j.csv").open("ab") as stream:
        stream.write(b"b,go\r\n")
    sheet.add("b", "good", "ann", "")
    with pytest.raises(InputError, match="row 3 has too few cells"):
        sheet_of(tmp_path)


@pytest.mark.parametrize("begun", [b"", b"query,ver", HEADER])
def test_a_file_in_which_nothing_was_written_yet_begins_anew(tmp_path, begun):
    """Seen: refused as one of other columns."""
    (tmp_path / "j.csv").write_bytes(begun)
    sheet_of(tmp_path).add("a", "good", "ann", "")
    assert (tmp_path / "j.csv").read_bytes() == HEADER + b"a,good,ann,head,,baseline,student\r\n"
    assert sheet_of(tmp_path).next_for("ann")["done"] == 1


def test_a_long_summary_does_not_keep_the_page_from_starting(tmp_path):
    sheet_of(tmp_path).add_grade(
        "ann", {"query": "a", "doc_id": "1", "title": "t", "summary": "s" * 200_000, "grade": 3}
    )
    sheet_of(tmp_path).add_grade(
        "ben", {"query": "a", "doc_id": "1", "title": "t", "summary": "s" * 200_000, "grade": 1}
    )
    row = json.loads((tmp_path / "g.jsonl").read_text())
    assert row["grade"] == 1 and len(row["summary"]) == 200_000  # the lower middle of 1 and 3


def test_alpha_is_krippendorffs():
    # his worked example of interval data (2011, "Computing Krippendorff's Alpha-Reliability", section D): 0.849
    rows = {
        "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        "C": [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    }
    units = {
        str(unit): {rater: values[unit] for rater, values in rows.items() if values[unit] is not None}
        for unit in range(12)
    }
    assert krippendorff_alpha(units) == pytest.approx(0.849, abs=0.0005)
    assert krippendorff_alpha({"a": {"x": 1, "y": 1}, "b": {"x": -1, "y": -1}}) == 1
    assert np.isnan(krippendorff_alpha({"a": {"x": 1}})) and np.isnan(krippendorff_alpha({}))


def test_the_interval_may_be_looked_at_after_every_judgment():
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        verdicts = rng.choice(["good", "same", "bad"], 150, p=[0.4, 0.2, 0.4]).tolist()
        looks = [advantage_interval(verdicts[:count]) for count in range(1, 151)]
        wrong += any(low > 0 or high < 0 for _, low, high in looks)
    assert wrong <= 10  # at most 5% of 200 in the long run
    mean, low, high = advantage_interval(["good"] * 80 + ["same"] * 20)
    assert mean == 0.8 and 0.3 < low < mean < high == 1.0 and advantage_interval([]) == (0.0, -1.0, 1.0)


@pytest.fixture
def page(tmp_path):
    config = Config(
        data=write_data(tmp_path / "data"), url="127.0.0.1:1", judgments=tmp_path / "judged.csv",
        grades=tmp_path / "grades.jsonl", log=log_of(tmp_path / "log", {"red film": 30, "blue film": 10}),
    )  # fmt: skip
    app = make_app(config)
    with TestClient(app, "http://127.0.0.1") as client:
        yield client, config


def test_the_page_hands_out_queries_takes_skips_with_a_reason_and_says_how_it_stands(page):
    client, config = page
    first = client.get("/next", params={"rater": "ann"}).json()
    assert first["total"] == 2 and first["done"] == 0 and first["query"] in ("red film", "blue film")
    judged = {"query": first["query"], "left": "student", "better": "left", "rater": "ann"}
    assert client.post("/judge", json=judged).json() == {"verdict": "good"}
    second = client.get("/next", params={"rater": "ann"}).json()
    skip = {"query": second["query"], "better": "skip", "rater": "ann"}  # without sides there is no left one
    assert client.post("/judge", json=skip).status_code == 422
    assert client.post("/judge", json=skip | {"reason": "not my language"}).json() == {"verdict": ""}
    assert client.get("/next", params={"rater": "ann"}).json()["query"] is None
    standing = client.get("/standing").json()
    assert (standing["queries"], standing["good"], standing["skipped"], standing["agreement"]) == (1, 1, 1, None)
    assert read_judgments(config.judgments).good == 1  # the report leaves skips out


def test_grades_become_a_table_of_judgments(page, tmp_path):
    client, config = page
    from clients.search_page import Documents

    documents = Documents(config.data)
    doc_id = documents.ids[0]
    spellings = ("red film", "Red  film", "red film", "RED FILM")  # one query, as prepare_data sees it
    for query, rater, grade in zip(spellings, ("ann", "ben", "cat", "ben"), (4, 1, 3, 2)):
        body = {"query": query, "doc_id": doc_id, "grade": grade, "rater": rater}
        assert client.post("/grade", json=body).status_code == 200
    row = json.loads(config.grades.read_text(encoding="utf-8"))
    assert row["grade"] == 3 and row["title"] == documents.titles[0]  # the middle of 4, 2 and 3
    odd = {"query": "=1+1", "doc_id": doc_id, "grade": 1, "rater": "@ann"}  # what a spreadsheet would run stays itself
    assert client.post("/grade", json=odd).status_code == 200
    assert [json.loads(line)["query"] for line in config.grades.read_text().splitlines()] == ["red film", "=1+1"]
    for wrong in ({"grade": 5}, {"grade": True}, {"doc_id": "nowhere"}):
        body = {"query": "red film", "doc_id": doc_id, "grade": 1, "rater": "ann"} | wrong
        assert client.post("/grade", json=body).status_code == 422
