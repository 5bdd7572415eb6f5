"""Logs of others as events tables: UBI and GA4, in the forms that their documentation gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ranking.errors import InputError
from ranking.schema import read_table
from tests.helpers.logs_of_others import NOON, ga4_event, lines, ubi_event, ubi_query
from training.clicks.import_events import Config, main

ROOT = Path(__file__).parents[3]
DOCUMENTS = [{"doc_id": d, "title": f"title {d}", "summary": f"summary {d}"} for d in ("a", "b", "c")]


def imported(tmp_path: Path, **log) -> tuple[list[dict], dict]:
    documents = lines(tmp_path / "documents.jsonl", DOCUMENTS)
    main(Config(documents=documents, out=tmp_path / "events.parquet", duckdb_threads=1, **log))
    report = json.loads((tmp_path / "events.report.json").read_text())
    return read_table(tmp_path / "events.parquet", "events").to_pylist(), report


def ubi(tmp_path: Path, queries: list[dict], events: list[dict]) -> tuple[list[dict], dict]:
    paths = lines(tmp_path / "queries.ndjson", queries), lines(tmp_path / "acts.ndjson", events)
    return imported(tmp_path, ubi_queries=str(paths[0]), ubi_events=str(paths[1]))


def test_ubi_pages_become_rows_with_clicks_positions_and_the_time_until_the_next_event(tmp_path):
    acts = [ubi_event(1, "b", 10), ubi_event(1, "c", 55), ubi_event(1, "c", 56, action="add_to_cart")]
    rows, report = ubi(tmp_path, [ubi_query(1)], acts)
    assert [(r["doc_id"], r["position"], r["clicked"], r["dwell_seconds"]) for r in rows] == [
        ("a", 1, False, 0.0), ("b", 2, True, 45.0), ("c", 3, True, 1.0)
    ]  # fmt: skip
    assert {(r["query"], r["user_id"], r["request_id"]) for r in rows} == {("night train", "u", "q1")}
    assert rows[0]["timestamp"].timestamp() == NOON and rows[1]["title"] == "title b"
    assert (report["pages_written"], report["clicks"], report["clicks_on_no_shown_document"]) == (1, 2, 0)


def test_ubi_as_a_search_engine_exports_it_and_a_last_click_counts_as_a_stay(tmp_path):
    wrapped = [{"_index": "ubi_queries", "_id": "1", "_source": ubi_query(1)}]
    rows, _ = ubi(tmp_path, wrapped, [{"_source": ubi_event(1, "a", 5)}])
    assert [r["dwell_seconds"] for r in rows] == [60.0, 0.0, 0.0]


def test_what_does_not_join_is_counted(tmp_path):
    queries = [ubi_query(1, hits=("a", "unknown")), ubi_query(2, hits=()), ubi_query(1)]  # the last one is a repeat
    acts = [ubi_event(1, "elsewhere", 3), ubi_event(9, "a", 4), ubi_event(1, "a", 5)]
    rows, report = ubi(tmp_path, queries, acts)
    assert report["documents_without_text"] == 1 and report["clicks_on_no_shown_document"] == 2
    assert report["pages"] == 2 and report["pages_written"] == 1
    assert next(r for r in rows if r["doc_id"] == "a")["clicked"]


def test_a_click_of_ga4_belongs_to_the_users_last_page_within_a_session(tmp_path):
    hits = [
        ga4_event("view_item_list", 0, ["a", "b"], "night train"),
        ga4_event("view_item_list", 20, ["b", "c"], "red queen"),
        ga4_event("view_item_list", 21, ["a", "b"], "moon", user="8.8"),
        ga4_event("select_item", 30, ["b"]),
        ga4_event("user_engagement", 75, []),
        ga4_event("select_item", 3600, ["c"]),
        ga4_event("view_item_list", 4000, ["a"]),  # a category, no search
    ]
    rows, report = imported(tmp_path, ga4=str(lines(tmp_path / "ga4.ndjson", hits)))
    clicked = [(r["query"], r["doc_id"], r["position"], r["dwell_seconds"]) for r in rows if r["clicked"]]
    assert clicked == [("red queen", "b", 1, 45.0)]
    assert report["pages"] == 3 and report["clicks"] == 2 and report["clicks_on_no_shown_document"] == 1


def test_a_wrong_log_is_one_line(tmp_path):
    queries = lines(tmp_path / "q.ndjson", [ubi_query(1, hits=("x",))])
    with pytest.raises(InputError, match="no page with documents of"):
        imported(tmp_path, ubi_queries=str(queries), ubi_events=str(queries))
    with pytest.raises(InputError, match=r"--ga4 nowhere\.ndjson: no such file"):
        imported(tmp_path, ga4="nowhere.ndjson")
    (tmp_path / "broken.ndjson").write_text("{not json\n")
    with pytest.raises(InputError, match=r"the log cannot be read: .*JSON"):
        imported(tmp_path, ga4=str(tmp_path / "broken.ndjson"))
    with pytest.raises(ValueError, match="give --ubi-queries with --ubi-events, or --ga4"):
        Config(documents=tmp_path, out=tmp_path, ubi_queries="q")


def test_the_program_runs_from_the_command_line(tmp_path):
    documents = lines(tmp_path / "documents.jsonl", DOCUMENTS)
    log = lines(tmp_path / "ga4.ndjson", [ga4_event("view_item_list", 0, ["a", "b"], "night train")])
    flags = ["--documents", documents, "--ga4", log, "--out", tmp_path / "e.parquet", "--clicks", "select_item"]
    done = subprocess.run(
        [sys.executable, "-m", "training.clicks.import_events", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["events_written"] == 2
