"""Logs of others as events tables: UBI and GA4, in the forms that their documentation gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
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


def test_what_is_imported_is_not_written_over(tmp_path):
    documents = lines(tmp_path / "documents.jsonl", DOCUMENTS)
    queries, acts = lines(tmp_path / "q.ndjson", [ubi_query(1)]), lines(tmp_path / "a.ndjson", [ubi_event(1, "b", 1)])
    for read in (documents, queries, acts):
        with pytest.raises(InputError, match="is what is to be read"):
            log = {"ubi_queries": str(tmp_path / "q*"), "ubi_events": str(acts)}
            main(Config(documents=documents, out=read, duckdb_threads=1, **log))


def test_ubi_pages_become_rows_with_clicks_positions_and_the_time_until_the_next_click(tmp_path):
    acts = [ubi_event(1, "b", 10), ubi_event(1, "c", 55), ubi_event(1, "c", 56, action="add_to_cart")]
    rows, report = ubi(tmp_path, [ubi_query(1)], acts)
    assert [(r["doc_id"], r["position"], r["clicked"], r["dwell_seconds"]) for r in rows] == [
        ("a", 1, False, 0.0), ("b", 2, True, 45.0), ("c", 3, True, 60.0)
    ]  # fmt: skip
    assert {(r["query"], r["user_id"], r["request_id"]) for r in rows} == {("night train", "u", "q1")}
    assert rows[0]["timestamp"].timestamp() == NOON and rows[1]["title"] == "title b"
    assert (report["pages_written"], report["clicks"], report["clicks_on_no_shown_document"]) == (1, 2, 0)


@pytest.mark.parametrize(
    ("later", "dwell"),
    [
        ([("page_view", 1, [], None), ("view_item", 1.2, ["a"], None), ("user_engagement", 3, [], None)], 60.0),
        ([("page_view", 1, [], None), ("user_engagement", 200, [], None)], 200.0),  # there until the last event
        ([("page_view", 1, [], None), ("view_search_results", 20, ["a"], "lamp")], 20.0),
        ([("page_view", 1, [], None), ("view_search_results", 20, [], "jeans")], 20.0),  # back to the results
        ([("page_view", 1, [], None), ("view_item_list", 2, ["b", "c"], None), ("select_item", 40, ["b"], None)], 40.0),
        ([("select_item", 5, ["a"], None), ("view_search_results", 90, ["a"], "lamp")], 90.0),  # clicked twice
        ([("add_to_cart", 10, ["a"], None), ("checkout", 100, [], None), ("select_item", 130, ["c"], None)], 130.0),
        ([("add_to_cart", 1000, ["a"], None), ("view_search_results", 4000, ["a"], "lamp")], 1000.0),  # had left before
        ([("view_search_results", 4000, ["a"], "lamp")], 60.0),
    ],
)
def test_a_click_dwells_until_the_next_search_or_the_click_on_another_document(tmp_path, later, dwell):
    hits = [ga4_event("view_item_list", -10, ["a", "b", "c"], "jeans"), ga4_event("select_item", 0, ["a"])]
    hits += [ga4_event(name, seconds, items, term) for name, seconds, items, term in later]
    rows, _ = imported(tmp_path, ga4=str(lines(tmp_path / "ga4.ndjson", hits)))
    assert next(r["dwell_seconds"] for r in rows if r["query"] == "jeans" and r["doc_id"] == "a") == dwell


def numbered(event: dict, first: int | None, step: int = 1) -> dict:
    """The event with the places of its items in the list, as the shop counts them; none for None."""
    for number, item in enumerate(event["items"]):
        item["item_list_index"] = "(not set)" if first is None else str(first + step * number)
    return event


@pytest.mark.parametrize(
    ("first", "second", "positions"),
    [
        (0, 20, [1, 2, 21, 22]),
        (1, 21, [1, 2, 21, 22]),
        (1, 3, [1, 2, 3, 4]),
        (None, None, [1, 2, 1, 2]),
        (0, None, [1, 2, 1, 2]),
    ],
)
def test_a_list_that_comes_in_several_events_of_ga4_has_the_positions_of_one_list(tmp_path, first, second, positions):
    hits = [
        numbered(ga4_event("view_item_list", 0, ["a", "b"], "jeans"), first),
        numbered(ga4_event("view_item_list", 20, ["c", "d"], "jeans"), second),
        ga4_event("view_item_list", 30, ["a", "b"]),  # no search: what it counts from says nothing of searches
        ga4_event("select_item", 40, ["c"]),
    ]
    documents = lines(tmp_path / "documents.jsonl", [{"doc_id": d, "title": d, "summary": d} for d in "abcd"])
    log = lines(tmp_path / "ga4.ndjson", hits)
    main(Config(documents=documents, out=tmp_path / "events.parquet", ga4=str(log), duckdb_threads=1))
    rows = read_table(tmp_path / "events.parquet", "events").to_pylist()
    assert [r["position"] for r in rows] == positions
    assert [r["doc_id"] for r in rows if r["clicked"]] == ["c"]


def test_an_item_list_index_that_is_the_same_for_all_is_not_believed(tmp_path):
    hits = [numbered(ga4_event("view_item_list", 0, ["a", "b", "c"], "jeans"), 1, step=0)]
    rows, _ = imported(tmp_path, ga4=str(lines(tmp_path / "ga4.ndjson", hits)))
    assert [r["position"] for r in rows] == [1, 2, 3]


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
    assert clicked == [("red queen", "b", 1, 60.0)]
    assert report["pages"] == 3 and report["clicks"] == 2 and report["clicks_on_no_shown_document"] == 1


@pytest.mark.parametrize(
    ("kind", "value", "query"), [("int", 501, "501"), ("float", 2.5, "2.5"), ("double", 2.5, "2.5")]
)
def test_a_term_that_ga4_stored_as_a_number_is_a_query_with_its_own_clicks(tmp_path, kind, value, query):
    number = ga4_event("view_search_results", 60, ["a", "b"])
    number["event_params"].append({"key": "search_term", "value": {f"{kind}_value": value}})
    hits = [ga4_event("view_search_results", 0, ["a", "b"], "jeans"), number, ga4_event("select_item", 70, ["b"])]
    rows, report = imported(tmp_path, ga4=str(lines(tmp_path / "ga4.ndjson", hits)))
    assert [(r["query"], r["doc_id"]) for r in rows if r["clicked"]] == [(query, "b")]
    assert (report["pages_written"], report["pages_without_query"]) == (2, 0)


def test_a_list_without_a_search_term_ends_the_search_page_and_its_click_is_of_no_search(tmp_path):
    hits = [
        ga4_event("view_item_list", 0, ["a", "b"], "jeans"),
        ga4_event("view_item_list", 60, ["b", "a"]),  # a category
        ga4_event("select_item", 70, ["b"]),
    ]
    rows, report = imported(tmp_path, ga4=str(lines(tmp_path / "ga4.ndjson", hits)))
    assert [(r["query"], r["doc_id"], r["clicked"]) for r in rows] == [("jeans", "a", False), ("jeans", "b", False)]
    assert (report["pages"], report["pages_without_query"]) == (1, 1)
    assert (report["clicks"], report["clicks_of_no_search"], report["clicks_on_no_shown_document"]) == (1, 1, 0)


def test_the_search_event_that_ga4_sends_by_itself_does_not_end_the_page_of_its_list(tmp_path):
    hits = [
        ga4_event("view_item_list", 0, ["a", "b"], "jeans"),
        ga4_event("view_search_results", 1, [], "jeans"),
        ga4_event("select_item", 10, ["b"]),
        ga4_event("view_search_results", 20, [], "nothing like it"),  # a search that found nothing
        ga4_event("select_item", 30, ["c"]),
    ]
    rows, report = imported(tmp_path, ga4=str(lines(tmp_path / "ga4.ndjson", hits)))
    assert [(r["query"], r["doc_id"]) for r in rows if r["clicked"]] == [("jeans", "b")]
    assert (report["pages"], report["clicks_on_no_shown_document"]) == (2, 1)


@pytest.mark.parametrize(
    "between",
    [
        [("view_item_list", ["x", "y"], None)],  # a carousel
        [("select_item", ["a"], None), ("view_item_list", ["x", "y"], None)],  # on the page of a document, then back
        [("view_search_results", [], "  JEANS ")],  # GA4's own event
        [("view_item_list", ["x"], None), ("view_search_results", [], "jeans")],
        [("view_search_results", [], "nothing like it")],
        [("view_item_list", ["x", "y"], "shirts")],
    ],
)
def test_a_click_is_of_the_last_list_that_showed_its_document(tmp_path, between):
    hits = [
        ga4_event("view_item_list", 0, ["a", "b"], "jeans"),
        *(ga4_event(name, 10 + number, items, term) for number, (name, items, term) in enumerate(between)),
        ga4_event("select_item", 30, ["b"]),
    ]
    rows, report = imported(tmp_path, ga4=str(lines(tmp_path / "ga4.ndjson", hits)))
    assert ("jeans", "b", True) in [(r["query"], r["doc_id"], r["clicked"]) for r in rows]
    assert report["clicks_of_no_search"] == report["clicks_on_no_shown_document"] == 0


@pytest.mark.parametrize(
    ("ids", "hits", "written"),
    [
        (["0001866F-D506-CEB3-7B0B-9131C0000000"], ["0001866F-D506-CEB3-7B0B-9131C0000000"], None),
        ([1, "a4", "007"], ["1", "a4", "007"], None),
        ([1, 2], [1, 2], ["1", "2"]),
    ],
)
def test_ids_and_texts_of_documents_stay_as_they_stand(tmp_path, ids, hits, written):
    texts = {"title": "2026-01-01T00:00:00Z", "summary": 1984}
    documents = lines(tmp_path / "documents.jsonl", [{"doc_id": d, **texts} for d in ids])
    queries = lines(tmp_path / "q.ndjson", [ubi_query(1, hits=hits)])
    acts = lines(tmp_path / "e.ndjson", [ubi_event(1, hits[-1], 5)])
    log = {"ubi_queries": str(queries), "ubi_events": str(acts), "duckdb_threads": 1}
    main(Config(documents=documents, out=tmp_path / "events.parquet", **log))
    rows = read_table(tmp_path / "events.parquet", "events").to_pylist()
    assert [r["doc_id"] for r in rows] == (written or hits) and rows[-1]["clicked"]
    assert {(r["title"], r["summary"]) for r in rows} == {("2026-01-01T00:00:00Z", "1984")}


def test_a_document_that_is_listed_twice_has_one_of_its_texts_and_is_counted(tmp_path):
    """Seen: the title of one row with the summary of another, and nobody was told."""
    twice = [{"doc_id": "a", "title": None, "summary": "S1"}, {"doc_id": "a", "title": "T2", "summary": None}]
    documents = lines(tmp_path / "documents.jsonl", [*twice, *[{"doc_id": "b", "title": "B", "summary": "b"}] * 2])
    log = lines(tmp_path / "ga4.ndjson", [ga4_event("view_item_list", 0, ["a", "b"], "jeans")])
    main(Config(documents=documents, out=tmp_path / "events.parquet", ga4=str(log), duckdb_threads=1))
    rows = read_table(tmp_path / "events.parquet", "events").to_pylist()
    assert [(r["title"], r["summary"]) for r in rows] == [("T2", ""), ("B", "b")]
    assert json.loads((tmp_path / "events.report.json").read_text())["documents_of_several_texts"] == 1


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (
            {"doc_id": "p7", "title": "t", "summary": ["a", "b"]},
            r'document p7: summary is \["a","b"\]: text or a number',
        ),
        ({"doc_id": "p7", "title": {"de": "t"}}, "document p7: title is .*: text or a number is needed"),
        ({"doc_id": True, "title": "t"}, "document true: doc_id is true: text or a number is needed"),
        ({"doc_id": None, "title": "t"}, "doc_id is NULL: text or a number is needed"),
    ],
)
def test_a_document_whose_text_is_no_text_is_named(tmp_path, document, problem):
    documents = lines(tmp_path / "documents.jsonl", [*DOCUMENTS, document])
    queries = lines(tmp_path / "q.ndjson", [ubi_query(1)])
    with pytest.raises(InputError, match=problem):
        main(Config(documents=documents, out=tmp_path / "e.parquet", ubi_queries=str(queries), ubi_events=str(queries)))


def test_documents_come_from_parquet_and_a_column_of_lists_is_refused(tmp_path):
    documents, queries = tmp_path / "documents.parquet", lines(tmp_path / "q.ndjson", [ubi_query(1, hits=("1", "2"))])
    log = {"ubi_queries": str(queries), "ubi_events": str(queries), "duckdb_threads": 1}
    table = {"doc_id": [1, 2], "title": ["one", None], "summary": pa.array(["s", None]).dictionary_encode()}
    pq.write_table(pa.table(table), documents)
    main(Config(documents=documents, out=tmp_path / "e.parquet", **log))
    rows = read_table(tmp_path / "e.parquet", "events").to_pylist()
    assert [(r["doc_id"], r["title"], r["summary"]) for r in rows] == [("1", "one", "s"), ("2", "", "")]
    pq.write_table(pa.table(table | {"summary": [["a"], ["b"]]}), documents)
    with pytest.raises(InputError, match=r"the column summary is VARCHAR\[\]: text or numbers are needed"):
        main(Config(documents=documents, out=tmp_path / "e.parquet", **log))


@pytest.mark.parametrize("nobody", [None, ""])
def test_visitors_without_an_id_do_not_end_each_others_stay(tmp_path, nobody):
    queries = [ubi_query(1, client=nobody), ubi_query(2, client=nobody)]
    acts = [ubi_event(1, "a", 6, client=nobody), ubi_event(2, "a", 7, client=nobody)]
    rows, _ = ubi(tmp_path, queries, acts)
    assert [r["dwell_seconds"] for r in rows if r["clicked"]] == [60.0, 60.0]
    assert all(r["user_id"].startswith("no-user-") for r in rows)  # five of them are not five people
    rows, _ = ubi(tmp_path, queries, [*acts, ubi_event(1, "b", 10, client=nobody)])
    assert sorted(r["dwell_seconds"] for r in rows if r["clicked"]) == [4.0, 60.0, 60.0]


@pytest.mark.parametrize("per_second", [1, 10**3, 10**6, 10**9])
def test_a_numeric_time_is_read_by_its_size(tmp_path, per_second):
    queries = [ubi_query(1) | {"timestamp": NOON * per_second}]
    rows, _ = ubi(tmp_path, queries, [ubi_event(1, "a", 0) | {"timestamp": (NOON + 20) * per_second}])
    assert rows[0]["timestamp"].timestamp() == NOON and rows[0]["clicked"]


def test_pages_and_clicks_without_a_time_a_query_or_a_document_are_counted(tmp_path):
    unsearched = [ubi_query(2) | {"user_query": None}, ubi_query(4) | {"user_query": " "}]
    queries = [ubi_query(1), *unsearched, ubi_query(3) | {"timestamp": "14.11.2023 22:13:20"}]
    acts = [ubi_event(1, "a", 5), ubi_event(2, "a", 6), ubi_event(1, "b", 7) | {"timestamp": "soon"}]
    acts.append(ubi_event(1, "c", 8) | {"event_attributes": {}})
    _, report = ubi(tmp_path, queries, acts)
    counts = {name: report[name] for name in report if "without" in name or name in ("pages", "clicks_of_no_search")}
    assert counts == {
        "pages": 1, "pages_without_query": 2, "pages_without_id_or_time": 1, "documents_without_text": 0,
        "clicks_without_document_or_time": 2, "clicks_of_no_search": 1,
    }  # fmt: skip


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
