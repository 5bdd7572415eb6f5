"""Collections as people have them: few or odd judgments, odd files, several languages, one split or none."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from build.judged_pairs import read_judged
from ranking.errors import DataError, InputError
from ranking.schema import read_table
from training import evaluate, prepare_data
from training.clicks.click_pairs import ClickPairSettings, write_clicks
from training.clicks.privacy_gate import OPEN_GATE
from training.prepare_data import Config
from training.pretrain_teacher import _pieces
from training.sources import dataset_folder
from training.sources.grade_scales import as_flag, as_text, by_rank, parse_grades
from training.sources.held_out import held_out_files, held_out_queries
from training.student import student_groups
from training.teacher import teacher_groups

ROOT = Path(__file__).parents[3]
SPLITS = ("train", "dev", "test")
THINGS = ("lantern", "kettle", "blanket", "compass", "hammock", "ladder", "bucket", "whistle", "candle", "anchor")
KINDS = ("copper", "folding", "woollen", "tiny", "heavy", "striped", "wooden", "silent", "foreign", "golden")
QUERIES = {f"q{i}": f"{KINDS[i % 10]} {THINGS[i // 10]}" for i in range(60)}
DOCUMENTS = {
    f"d{i}": (f"{kind.title()} {thing}", f"A {thing} that is {kind}, number {i}.")
    for i, (kind, thing) in enumerate((kind, thing) for thing in THINGS for kind in KINDS)
}


def judged(per_query: int = 5) -> list[tuple[str, str, int]]:
    """(query id, document id, grade 0 to 2): documents of the query's kind or thing, the best one first."""
    rows = []
    for i, query_id in enumerate(QUERIES):
        for j in range(per_query):
            rows.append((query_id, f"d{(i + 10 * j + j // 3) % 100}", 2 if j == 0 else int(j < 3)))
    return rows


def prepare(source: str, out: Path, **settings) -> dict:
    prepare_data.main(Config(source=source, out=out, **settings))
    return json.loads((out / "dataset.json").read_text(encoding="utf-8"))


def rows_of(out: Path, *names: str) -> list[dict]:
    files = {split: f"judgments/{split}" for split in SPLITS} | {"candidates": "candidates"}
    table = {"candidates": "candidates"}
    return [
        row
        for name in names or SPLITS
        for row in read_table(out / f"{files[name]}.parquet", table.get(name, "judgments")).to_pylist()
    ]


def csv_table(path: Path, rows: list[dict], separator: str = ",", end: str = "\n", bom: str = "") -> Path:
    names = list(rows[0])
    lines = [separator.join(names)]
    lines += [separator.join('"' + str(row[name]).replace('"', '""') + '"' for name in names) for row in rows]
    content = (bom + end.join(lines) + end).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def graded_rows(grade=lambda grade: grade) -> list[dict]:
    return [
        {"query": QUERIES[q], "doc_id": d, "title": DOCUMENTS[d][0], "summary": DOCUMENTS[d][1], "grade": grade(g)}
        for q, d, g in judged()
    ]


def beir(folder: Path, splits: dict[str, range], grade=lambda grade: grade) -> Path:
    """A BEIR folder with all queries and documents, and judgments for the numbers of queries in each split."""
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (
        ("corpus", [{"_id": d, "title": t, "text": s} for d, (t, s) in DOCUMENTS.items()]),
        ("queries", [{"_id": q, "text": text} for q, text in QUERIES.items()]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for split, numbers in splits.items():
        lines = [f"{q}\t{d}\t{grade(g)}\n" for q, d, g in judged() if int(q[1:]) in numbers]
        (folder / f"qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines), encoding="utf-8")
    return folder


# candidates


def test_a_table_in_which_every_pair_is_graded_gives_candidates(tmp_path, caplog):
    caplog.set_level("INFO")
    content = prepare(f"table:{csv_table(tmp_path / 'all.csv', graded_rows())}", tmp_path / "out")
    train = {(row["query_id"], row["doc_id"]) for row in rows_of(tmp_path / "out", "train")}
    candidates = [(row["query_id"], row["doc_id"]) for row in rows_of(tmp_path / "out", "candidates")]
    assert train < set(candidates) and len(set(candidates)) == len(candidates)
    assert {query for query, _ in candidates} == {query for query, _ in train}
    assert content["candidates_are"]["pairs_of_the_source"] == len(train)
    assert f"{len(candidates)} pairs of 0 queries without grades, {len({q for q, _ in train})} judged" in caplog.text
    # BM25 finds documents that share a word with the query
    found = [row for row in rows_of(tmp_path / "out", "candidates") if (row["query_id"], row["doc_id"]) not in train]
    assert found and all(set(row["query"].split()) & set(row["title"].lower().split()) for row in found)


def test_queries_without_judgments_get_documents_from_the_whole_corpus(tmp_path):
    folder = beir(tmp_path / "set", {"train": range(10, 30), "test": range(30, 40)})
    queries = folder / "queries.jsonl"
    near = json.dumps({"_id": "reworded", "text": f"{QUERIES['q30'].upper()}s!"}) + "\n"
    queries.write_text(queries.read_text(encoding="utf-8") + near, encoding="utf-8")
    content = prepare(f"beir:{folder}", tmp_path / "out", candidate_documents=8)
    assert content["candidates_are"]["queries_without_grades"] == 30
    rows = rows_of(tmp_path / "out", "candidates")
    held_out = {row["query_id"] for row in rows_of(tmp_path / "out", "dev", "test")}
    assert not {row["query_id"] for row in rows} & (held_out | {"reworded"})
    per_query = [sum(row["query_id"] == query_id for row in rows) for query_id in ("q0", "q45", "q59")]
    assert per_query == [8, 8, 8]
    titles = [row["title"] for row in rows if row["query_id"] == "q59"]
    assert "Golden ladder" in titles  # nobody judged anything for "golden ladder"


def test_the_corpus_that_bm25_searches_can_be_bounded(tmp_path):
    folder = beir(tmp_path / "set", {"train": range(8)})
    used = {d for q, d, _ in judged() if int(q[1:]) < 8}
    prepare(f"beir:{folder}", tmp_path / "out", corpus_limit=3, candidate_documents=100)
    found = {row["doc_id"] for row in rows_of(tmp_path / "out", "candidates")}
    assert found - used == set([d for d in DOCUMENTS if d not in used][:3])


# splits


def test_a_collection_with_a_test_split_alone_is_prepared_and_evaluated(tmp_path, caplog, capsys):
    folder = beir(tmp_path / "set", {"test": range(60)})
    content = prepare(f"beir:{folder}", tmp_path / "out")
    assert [content["counts"][f"queries_{split}"] for split in SPLITS] == [0, 0, 60]
    assert "the train split is empty" in caplog.text and "--resplit" in caplog.text
    evaluate.main(evaluate.Config(data=tmp_path / "out", out=tmp_path / "report", resamples=50, permutations=50))
    assert "bm25" in capsys.readouterr().out
    # the titles that no test query resembles are all there is to ask
    titles = {row["query"] for row in rows_of(tmp_path / "out", "candidates")}
    assert content["candidates_are"]["queries_titles"] == len(titles) == 40
    assert not {title.lower() for title in titles} & set(QUERIES.values())


def test_programs_that_need_a_split_that_is_empty_say_so_in_one_line(tmp_path):
    prepare(f"beir:{beir(tmp_path / 'set', {'test': range(60)})}", tmp_path / "out")
    unused: Any = None  # the text format: an empty table has nothing to tokenise
    train, dev = (tmp_path / f"out/judgments/{split}.parquet" for split in ("train", "dev"))
    reason = r"judgments/(train|dev)\.parquet: the dataset has no \1 judgments; prepare_data --resplit draws"
    for read in (
        lambda: student_groups.judged_groups(train, unused),
        lambda: teacher_groups.judged_groups(train, unused),
        lambda: read_judged(tmp_path / "out", "dev", unused, 10),
        lambda: evaluate.judgments_of(dev),
    ):
        with pytest.raises(DataError, match=reason) as error:
            read()
        assert "\n" not in str(error.value)


def test_resplit_draws_all_splits_anew_from_a_test_collection(tmp_path):
    folder = beir(tmp_path / "set", {"test": range(60)})
    content = prepare(f"beir:{folder}", tmp_path / "out", resplit=True)
    assert all(content["counts"][f"queries_{split}"] > 0 for split in SPLITS)
    assert len(rows_of(tmp_path / "out")) == len(judged())


def test_a_collection_of_reworded_queries_is_told_why_splits_are_empty(tmp_path, caplog):
    """Seen: the advice was --resplit, which changes nothing here."""
    reworded = dict(zip(list(QUERIES.values()), ("red shoes", "shoes red", "Red Shoes!", "blue hat")))
    rows = [dict(row, query=reworded[row["query"]]) for row in graded_rows() if row["query"] in reworded]
    path = csv_table(tmp_path / "few.csv", rows)
    content = prepare(f"table:{path}", tmp_path / "out")
    assert [content["counts"][f"queries_{split}"] for split in SPLITS] == [3, 1, 0]
    assert "the test split is empty" in caplog.text and "--resplit" not in caplog.text
    assert "of the 4 judged queries only 2 are not near-identical" in caplog.text


def test_a_rewrite_that_is_killed_leaves_one_draw_or_none_that_says_it_is_whole(tmp_path, monkeypatch):
    """Seen: killed between two tables, test queries of the old draw were train queries of the new one; exit 0 after."""
    path = csv_table(tmp_path / "mine.csv", graded_rows())
    prepare(f"table:{path}", tmp_path / "out")
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    written, write = [], dataset_folder.write_table

    def third_fails(*given):
        written.append(given)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return write(*given)

    monkeypatch.setattr(dataset_folder, "write_table", third_fails)
    with pytest.raises(OSError, match="No space left"):
        prepare(f"table:{path}", tmp_path / "out", seed=7, test_fraction=0.3)
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before
    (tmp_path / "out/.prepare-of-a-killed-run/judgments").mkdir(parents=True)
    content = prepare(f"table:{path}", tmp_path / "out", seed=7, test_fraction=0.3)
    assert content["counts"]["queries_test"] == 18 and not list((tmp_path / "out").glob(".prepare*"))
    for inside in (tmp_path / "out", tmp_path / "out/judgments"):
        with pytest.raises(InputError, match="is the source itself"):
            prepare(f"dataset:{tmp_path / 'out'}", inside)


def test_a_dev_only_table_and_a_dataset_made_of_it(tmp_path, caplog):
    rows = [dict(row, split="validation") for row in graded_rows()]
    path = csv_table(tmp_path / "dev.csv", rows)
    content = prepare(f"table:{path}", tmp_path / "out")
    assert [content["counts"][f"queries_{split}"] for split in SPLITS] == [0, 60, 0]
    assert "the test split is empty" in caplog.text
    again = prepare(f"dataset:{tmp_path / 'out'}", tmp_path / "again", dev_queries=20)
    assert again["counts"]["queries_dev"] == 20
    assert again["counts"]["queries_candidates"] == content["candidates_are"]["queries_titles"]


def test_the_four_forms_of_own_data_give_what_later_stages_read(tmp_path):
    values = [0, 1.33, 2.67, 3]
    sources = {
        "grades_alone": f"table:{csv_table(tmp_path / 'grades.csv', graded_rows())}",
        "test_alone": f"beir:{beir(tmp_path / 'test_alone', {'test': range(60)})}",
        "thirds": f"beir:{beir(tmp_path / 'thirds', {'train': range(40), 'test': range(40, 60)}, values.__getitem__)}",
    }
    for name, source in sources.items():
        content = prepare(source, tmp_path / name / "out")
        rows = rows_of(tmp_path / name / "out")
        assert len(rows) == len(judged()) and {row["grade"] for row in rows} == {0, 1, 2}
        held_out = {row["query"] for row in rows_of(tmp_path / name / "out", "dev", "test")}
        candidates = rows_of(tmp_path / name / "out", "candidates")
        assert candidates and not {row["query"].lower() for row in candidates} & held_out
        assert content["counts"]["candidates"] == len(candidates)


def test_a_handful_of_queries_still_fills_every_split(tmp_path):
    rows = [row for row in graded_rows() if row["query"] in list(QUERIES.values())[:5]]
    content = prepare(f"table:{csv_table(tmp_path / 'five.csv', rows)}", tmp_path / "out")
    assert [content["counts"][f"queries_{split}"] for split in SPLITS] == [3, 1, 1]


# grades

THIRDS = {0: "1", 1: "2.33", 2: "3"}


def grades_of(out: Path) -> dict[tuple[str, str], int]:
    return {(row["query_id"], row["doc_id"]): row["grade"] for row in rows_of(out)}


def test_thirds_are_mapped_by_rank_and_the_map_is_stated(tmp_path, caplog):
    values = ["1", "1.33", "1.67", "2", "2.33", "2.67", "3"]
    rows = [dict(row, grade=values[i % 7]) for i, row in enumerate(graded_rows())]
    content = prepare(f"table:{csv_table(tmp_path / 'thirds.csv', rows)}", tmp_path / "out")
    expected = {"1": 0, "1.33": 1, "1.67": 1, "2": 2, "2.33": 3, "2.67": 3, "3": 4}
    assert content["settings"]["grades"] == expected
    flag = "--grades=1=0,1.33,1.67=1,2=2,2.33,2.67=3,3=4"
    assert flag in caplog.text
    found = grades_of(tmp_path / "out")
    assert all(found[r["query"], r["doc_id"]] == expected[r["grade"]] for r in rows)
    # the stated flag, pasted, does the same
    again = prepare(f"table:{tmp_path / 'thirds.csv'}", tmp_path / "again", grades=flag.partition("=")[2].split(","))
    assert again["settings"]["grades"] == expected and grades_of(tmp_path / "again") == found


@pytest.mark.parametrize(
    "theirs, flag, expected",
    [
        ({0: -2, 1: 0, 2: 1}, [], {0: 0, 1: 0, 2: 1}),  # TREC: junk is not relevant
        ({0: -2, 1: 0, 2: 1}, ["by-rank"], {0: 0, 1: 1, 2: 2}),
        ({0: 0, 1: 6, 2: 10}, [], {0: 0, 1: 1, 2: 2}),
        ({0: 0, 1: 6, 2: 10}, ["0=0", "6=2", "10=4"], {0: 0, 1: 2, 2: 4}),
        ({0: 1, 1: 3, 2: 5}, ["1", "2=0", "3=1", "4", "5=3"], {0: 0, 1: 1, 2: 3}),
        ({0: -1, 1: 0.5, 2: 1}, [], {0: 0, 1: 1, 2: 2}),
        ({0: "1,5", 1: "2,5", 2: "3"}, [], {0: 0, 1: 1, 2: 2}),  # decimal commas
        ({0: 1, 1: 2, 2: 3}, [], {0: 1, 1: 2, 2: 3}),
        ({0: 1, 1: 2, 2: 3}, ["by-rank"], {0: 0, 1: 1, 2: 2}),
    ],
)
def test_other_scales(theirs, flag, expected, tmp_path, caplog):
    path = csv_table(tmp_path / "mine.csv", graded_rows(lambda grade: theirs[grade]))
    prepare(f"table:{path}", tmp_path / "out", grades=flag)
    assert grades_of(tmp_path / "out") == {(QUERIES[q], d): expected[g] for q, d, g in judged()}
    assert ("no judgment has grade 0" in caplog.text) == (0 not in expected.values())
    assert ("grades are mapped" in caplog.text) == (not flag and expected != theirs)


def test_grades_that_are_words_are_named(tmp_path):
    words = ["Irrelevant", "Partial", "Exact"]
    path = csv_table(tmp_path / "mine.csv", graded_rows(lambda grade: words[grade]))
    with pytest.raises(
        DataError, match=r"'[A-Z][a-z]+' is not a number; grades that are words are named, as in --grades"
    ):
        prepare(f"table:{path}", tmp_path / "out")
    with pytest.raises(
        DataError, match=r"not one judged pair is left; 300 rows were refused, the first one: .*, row 2: gr"
    ):
        prepare(f"table:{path}", tmp_path / "out", on_bad_row="reject")
    content = prepare(f"table:{path}", tmp_path / "out", grades=["irrelevant=0", "PARTIAL=1", "Exact=3"])
    assert grades_of(tmp_path / "out") == {(QUERIES[q], d): [0, 1, 3][g] for q, d, g in judged()}
    assert content["settings"]["grades"] == {"irrelevant": 0, "partial": 1, "exact": 3}
    with pytest.raises(DataError, match="'Exact' is none of irrelevant, partial; name it in --grades"):
        prepare(f"table:{path}", tmp_path / "out", grades=["irrelevant=0", "partial=1"])


def test_train_queries_beyond_the_limit_are_candidates_without_grades(tmp_path):
    path = csv_table(tmp_path / "mine.csv", graded_rows())
    everything = prepare(f"table:{path}", tmp_path / "all")["counts"]
    content = prepare(f"table:{path}", tmp_path / "out", train_queries=3)
    assert content["counts"]["queries_train"] == 3 < everything["queries_train"]
    assert content["candidates_are"]["queries_without_grades"] == everything["queries_train"] - 3
    assert content["counts"]["queries_candidates"] == everything["queries_candidates"]


def test_zero_to_ten_in_beir_is_spread_over_the_scale(tmp_path):
    draw = random.Random(1)
    folder = beir(tmp_path / "set", {"train": range(40), "test": range(40, 60)}, lambda _: draw.randrange(11))
    content = prepare(f"beir:{folder}", tmp_path / "out")
    assert list(content["settings"]["grades"].values()) == [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    assert content["settings"]["grades"]["10"] == 4


def test_a_stray_grade_is_refused_with_the_flag_that_takes_it(tmp_path):
    rows = graded_rows()
    rows[7]["grade"] = 77
    path = csv_table(tmp_path / "mine.csv", rows)
    with pytest.raises(DataError, match="row 9: grade 77 is no whole number from 0 to 4; if it is meant") as error:
        prepare(f"table:{path}", tmp_path / "out")
    assert "--grades=0=0,1=1,2=2,77=3" in str(error.value)
    content = prepare(f"table:{path}", tmp_path / "out", on_bad_row="reject")
    assert content["counts"]["rejected_rows"] == 1 and len(rows_of(tmp_path / "out")) == len(rows) - 1
    content = prepare(f"table:{path}", tmp_path / "out", grades=["0=0", "1=1", "2=2", "77=3"])
    assert content["grades"]["train"]["3"] + content["grades"]["dev"]["3"] + content["grades"]["test"]["3"] == 1


def test_wrong_maps_of_grades_are_named(tmp_path):
    path = csv_table(tmp_path / "mine.csv", graded_rows())
    with pytest.raises(InputError, match=r"--grades: 2 of the source \(60 judgments\) has no grade; by rank all would"):
        prepare(f"table:{path}", tmp_path / "out", grades=["0=0", "1=1"])
    for words, reason in (
        (["0=5"], "0=5"),
        (["zero=0"], "zero=0 gives all documents one grade"),
        (["zero=0", "1=1"], "either words or numbers"),
        (["zero=0", "one=9"], "one=9: a grade from 0 to 4"),
        (["0=0", "1"], "1 has no grade"),
        (["rank"], "rank"),
    ):
        with pytest.raises(ValueError, match=reason):
            Config(source="table:x", out=tmp_path, grades=words)
    assert parse_grades(["1", "1.33=0", "2=1"]) == {1: 0, 1.33: 0, 2: 1}


def test_large_grades_are_named_in_all_their_digits(tmp_path, caplog):
    rows = graded_rows(lambda grade: 1_700_000_000 + grade)
    content = prepare(f"table:{csv_table(tmp_path / 'large.csv', rows)}", tmp_path / "out")
    assert content["settings"]["grades"] == {"1700000000": 0, "1700000001": 1, "1700000002": 2}
    flag = "--grades=1700000000=0,1700000001=1,1700000002=2"
    assert flag in caplog.text and parse_grades(flag.removeprefix("--grades=").split(",")) == {
        1.7e9: 0, 1.7e9 + 1: 1, 1.7e9 + 2: 2,
    }  # fmt: skip
    assert [as_text(value) for value in (4 / 3, 0.5, 2.0, 1234567.25)] == ["1.33333", "0.5", "2", "1234567.25"]


def test_a_split_whose_queries_cannot_be_ranked_is_warned_of(tmp_path, caplog):
    rows = graded_rows()
    for i, row in enumerate(rows):
        row["split"] = ("train", "dev", "test")[i // 5 % 3]
        if row["split"] == "test" or (row["split"] == "dev" and i < 200):
            row["grade"] = 1
    prepare(f"table:{csv_table(tmp_path / 'equal.csv', rows)}", tmp_path / "out")
    assert "the test split: only 0 of 20 queries have documents of different grades" in caplog.text
    assert "the dev split: only 7 of 20 queries" in caplog.text and "the train split" not in caplog.text


def test_a_map_by_rank_keeps_the_order_and_its_flag_reads_back():
    draw = random.Random(2)
    for size in range(1, 40):
        values = draw.sample(range(-50, 50), size)
        mapping = by_rank(values)
        ordered = [mapping[value] for value in sorted(values)]
        assert ordered == sorted(ordered) and ordered[0] == 0 and ordered[-1] == min(size - 1, 4)
        rule = parse_grades(as_flag(mapping).removeprefix("--grades=").split(","))
        assert rule == (mapping if size <= 30 else "by-rank")


# texts


def test_a_summary_around_the_querys_words_stays_with_its_query(tmp_path):
    rows = [dict(row, summary=f"... {row['query']} in {row['title']} ...") for row in graded_rows()]
    prepare(f"table:{csv_table(tmp_path / 'biased.csv', rows)}", tmp_path / "out")
    wanted = {(row["query"], row["doc_id"]): row["summary"] for row in rows}
    assert {(r["query_id"], r["doc_id"]): r["summary"] for r in rows_of(tmp_path / "out")} == wanted
    first = {}
    for row in rows:
        first.setdefault(row["doc_id"], row["summary"])
    for row in rows_of(tmp_path / "out", "candidates"):
        pair = row["query_id"], row["doc_id"]
        assert row["summary"] == wanted.get(pair, first[pair[1]])  # BM25's documents have the text of their first row
    prepare(f"dataset:{tmp_path / 'out'}", tmp_path / "again")
    assert {(r["query_id"], r["doc_id"]): r["summary"] for r in rows_of(tmp_path / "again")} == wanted


def test_65000_judgments_with_two_spellings_of_one_title(tmp_path):
    count = 65_000
    doc = np.arange(count) % 4_000
    columns = {
        "query": [f"{KINDS[i % 10]} {THINGS[i // 10 % 10]} {i * 7919 % 100_000}" for i in np.arange(count) // 65],
        "doc_id": [int(number) for number in doc],  # ids are numbers in many tables
        "title": [f"Thing number {number}" for number in doc],
        "grade": [int(i % 3) for i in range(count)],
    }
    columns["title"][40_000] = "Thing  nº 0"
    pq.write_table(pa.table(columns), tmp_path / "big.parquet")
    content = prepare(f"table:{tmp_path / 'big.parquet'}", tmp_path / "out", candidate_documents=0)
    counts = content["counts"]
    assert sum(counts[f"judgments_{split}"] for split in SPLITS) + counts["judgments_of_those"] == count


# files


@pytest.mark.parametrize("name", ["mine.csv", "mine.csv.gz"])
def test_a_spreadsheets_csv_with_byte_order_mark_semicolons_and_windows_line_ends(name, tmp_path):
    rows = [dict(row, title=f'{row["title"]}; "the" one, größer') for row in graded_rows()]
    rows = [{key.title(): value for key, value in row.items()} for row in rows]  # Query;Doc_Id;Title;...
    prepare(f"table:{csv_table(tmp_path / name, rows, ';', chr(13) + chr(10), chr(0xFEFF))}", tmp_path / "out")
    titles = {row["doc_id"]: row["title"] for row in rows_of(tmp_path / "out")}
    assert titles == {row["Doc_Id"]: row["Title"] for row in rows}


@pytest.mark.parametrize(
    "encoding, reason",
    [("utf-16", "this is UTF-16; iconv -f UTF-16"), ("cp1252", r"row 2: not valid UTF-8 .*; iconv -f WINDOWS-1252")],
)
def test_a_file_in_another_encoding_is_refused_with_what_converts_it(encoding, reason, tmp_path):
    path = csv_table(tmp_path / "mine.csv", [dict(row, title="größer") for row in graded_rows()])
    path.write_bytes(path.read_bytes().decode().encode(encoding))
    with pytest.raises(DataError, match=reason):
        prepare(f"table:{path}", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("mine.csv", gzip.compress(b"query,title,grade\na,b,1\n", mtime=0), "mine.csv: this is gzip: give it a name"),
        ("mine.csv.gz", b"query,title,grade\na,b,1\n", r"row 1: .*; if it is no gzip, take \.gz off its name"),
        ("mine.csv", b"PK\x03\x04\x14\x00\x06\x00", r"mine.csv: this is a zip archive, as Excel's \.xlsx is one"),
        ("mine.csv", b'query,title,grade\ra,"b\rc",1\rd,e,0\r', "mine.csv: its lines end in carriage returns .*; tr"),
        ("mine.tsv", b"query\ttitle\tgrade\ra\tb\t1\r", r"mine.tsv: its lines end in carriage returns alone"),
        ("mine.csv", "query,title,grade\n靴,革靴,1\n".encode("cp932"), "row 2: not valid UTF-8 .* they are CP932"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("on_bad_row", ["stop", "reject"])
def test_a_file_of_another_kind_is_told_what_it_is(name, content, told, on_bad_row, tmp_path):
    """Seen: packed files were to be converted from WINDOWS-1252, and one without line feeds had no header."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        prepare(f"table:{tmp_path / name}", tmp_path / "out", on_bad_row=on_bad_row)


def test_grades_may_be_true_and_false(tmp_path):
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.Table.from_pylist(graded_rows(lambda grade: grade > 0)), path)
    with pytest.raises(DataError, match="grade is bool, a number is needed; --grades true=1,false=0"):
        prepare(f"table:{path}", tmp_path / "out")
    prepare(f"table:{path}", tmp_path / "out", grades=["true=1", "false=0"])
    assert [row["grade"] for row in rows_of(tmp_path / "out")].count(1) == sum(grade > 0 for _, _, grade in judged())


def test_a_csv_whose_separator_is_a_tab(tmp_path):
    prepare(f"table:{csv_table(tmp_path / 'mine.csv', graded_rows(), chr(9))}", tmp_path / "out")
    assert len(rows_of(tmp_path / "out")) == len(judged())


def test_empty_titles_and_documents_without_any_text(tmp_path):
    rows = [dict(row, title="", summary=row["summary"] if i % 2 else "") for i, row in enumerate(graded_rows())]
    prepare(f"table:{csv_table(tmp_path / 'mine.csv', rows)}", tmp_path / "out")
    assert {row["title"] for row in rows_of(tmp_path / "out")} == {""}
    blank = [dict(row, title="", summary="") for row in rows]
    content = prepare(f"table:{csv_table(tmp_path / 'blank.csv', blank)}", tmp_path / "blank")
    assert content["candidates_are"]["pairs_found_by_bm25"] == 0
    assert content["counts"]["candidates"] == content["counts"]["judgments_train"] > 0


def test_one_document_per_query_is_refused_with_what_to_do(tmp_path):
    rows = [{"query": QUERIES[q], "title": DOCUMENTS[d][0], "grade": 1} for q, d, g in judged() if g == 2]
    path = csv_table(tmp_path / "one.csv", rows)
    with pytest.raises(DataError, match=r"none has documents of different grades; .* --negatives 20 adds documents"):
        prepare(f"table:{path}", tmp_path / "out")
    content = prepare(f"table:{path}", tmp_path / "out", negatives=5)
    assert content["counts"]["candidates"] > 0
    assert content["grades"]["train"]["0"] > content["grades"]["train"]["1"] > 0


def test_one_query_under_several_ids_stands_in_one_split(tmp_path):
    rows = [
        {"query_id": f"{q}-{n}", "query": spelling, "doc_id": d, "title": DOCUMENTS[d][0], "grade": g}
        for q, d, g in judged()
        for n, spelling in enumerate((QUERIES[q], QUERIES[q].upper(), f" {QUERIES[q]}s"))
    ]
    prepare(f"table:{csv_table(tmp_path / 'mine.csv', rows)}", tmp_path / "out")
    split_of: dict[str, set[str]] = {}
    for split in SPLITS:
        for row in rows_of(tmp_path / "out", split):
            split_of.setdefault(row["query_id"].partition("-")[0], set()).add(split)
    assert len(split_of) == 60 and all(len(splits) == 1 for splits in split_of.values())
    candidates = {row["query_id"].partition("-")[0] for row in rows_of(tmp_path / "out", "candidates")}
    assert all(split_of[query] == {"train"} for query in candidates)


SENTENCES = {
    "ja": ("赤い 靴", "赤い靴を買う", "歩きやすい赤い靴です"),
    "ar": ("حذاء أحمر", "حذاء أحمر جديد", "حذاء مريح للمشي"),
    "ru": ("красные туфли", "Красные туфли", "Удобные туфли для прогулок"),
    "th": ("รองเท้าสีแดง", "รองเท้าสีแดง", "รองเท้าใส่สบาย"),
    "de": ("rote Schuhe größe 38", "Rote Schuhe", "Bequeme Schuhe für Spaziergänge"),
    "hi": ("लाल जूते", "लाल जूते", "आरामदायक जूते"),
}


def test_other_languages_give_judgments_and_candidates(tmp_path):
    rows = [
        {
            "query": f"{query} {number}",
            "title": SENTENCES[other][1],
            "summary": SENTENCES[other][2],
            "grade": other == own,
        }
        for own, (query, _, _) in SENTENCES.items()
        for number in (11, 22, 33)
        for other in SENTENCES
    ]
    path = csv_table(tmp_path / "mine.csv", [dict(row, grade=int(row["grade"])) for row in rows])
    content = prepare(f"table:{path}", tmp_path / "out")
    assert all(content["counts"][f"queries_{split}"] for split in SPLITS) and content["counts"]["candidates"]
    assert sum(content["counts"][f"judgments_{split}"] for split in SPLITS) == len(rows)


# click logs


def log_rows(with_dwell: bool = True) -> list[dict]:
    """A log as a shop has it: numbers for ids, its own column names, no arm."""
    draw = random.Random(3)
    rows = []
    for page in range(600):
        query_id = f"q{draw.randrange(60)}"
        documents = [d for q, d, _ in judged() if q == query_id]
        grades = {d: g for q, d, g in judged() if q == query_id}
        draw.shuffle(documents)
        for place, doc_id in enumerate(documents, 1):
            clicked = draw.random() < (0.05 + 0.4 * grades[doc_id]) / place**0.5
            row = {
                "page": page, "doc_id": doc_id, "visitor": page // 5, "search": QUERIES[query_id],
                "title": DOCUMENTS[doc_id][0], "position": place, "clicked": int(clicked),
            }  # fmt: skip
            rows.append(row | ({"dwell_seconds": 45.0 if clicked and page % 2 else 0.0} if with_dwell else {}))
    return rows


NAMES = ["request_id=page", "user_id=visitor", "query=search"]


@pytest.mark.parametrize("with_dwell", [True, False])
def test_grades_and_a_click_log_without_arms_become_a_dataset_that_stage_1_reads(with_dwell, tmp_path, caplog):
    out, log = tmp_path / "out", tmp_path / "log.parquet"
    prepare(f"table:{csv_table(tmp_path / 'grades.csv', graded_rows())}", out)
    rows = log_rows(with_dwell)
    pq.write_table(pa.Table.from_pylist(rows), log)
    command = [
        sys.executable,
        "-m",
        "training.prepare_clicks",
        "--events",
        str(log),
        "--out",
        str(out / "clicks.parquet"),
    ]
    command += ["--privacy.min-users", "1"]
    done = subprocess.run([*command, "--columns", ",".join(NAMES)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("the log has no dwell_seconds: every click counts" in done.stderr) == (not with_dwell)
    assert "the log has no summary" in done.stderr and "no arm" not in done.stderr
    held_out = {row["query"] for row in rows_of(out, "dev", "test")}
    clicks = read_table(out / "clicks.parquet", "clicks").to_pylist()
    assert clicks and not {row["query"] for row in clicks} & held_out
    report = json.loads((out / "clicks.report.json").read_text(encoding="utf-8"))
    assert report["excluded_queries"] == len(held_out)
    assert report["excluded_events"] == sum(row["search"] in held_out for row in rows)
    clicked = {row["search"] for row in rows if row["clicked"] and row.get("dwell_seconds", 99) >= 30}
    assert {row["query"] for row in clicks} == clicked - held_out
    assert sum(map(len, _pieces(out / "clicks.parquet", out))) == len(clicks)


def test_a_log_in_csv_is_refused_with_the_command_that_converts_it(tmp_path):
    path = csv_table(tmp_path / "log.csv", log_rows())
    with pytest.raises(InputError, match="Parquet is needed") as error:
        write_clicks(ClickPairSettings(events=str(path), out=tmp_path / "clicks.parquet", columns=NAMES))
    command = str(error.value).partition("DuckDB makes it: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    report = write_clicks(
        ClickPairSettings(
            events=str(tmp_path / "log.parquet"),
            out=tmp_path / "clicks.parquet",
            columns=NAMES,
            debias=False,
            privacy=OPEN_GATE,
        )
    )
    assert report["events_read"] == len(log_rows()) and report["clicks"] > 0


def test_stage_1_leaves_out_clicks_of_a_reworded_test_query(tmp_path, caplog):
    out = tmp_path / "out"
    prepare(f"table:{csv_table(tmp_path / 'grades.csv', graded_rows())}", out)
    test, train = (rows_of(out, split)[0]["query"] for split in ("test", "train"))
    pq.write_table(
        pa.table(
            {
                "query": [" ".join(reversed(test.split())), train, f"{test}s"], "doc_id": ["a", "b", "c"],
                "title": ["t"] * 3, "summary": [""] * 3, "weight": pa.array([1.0] * 3, pa.float32()),
            }
        ),
        out / "clicks.parquet",
    )  # fmt: skip
    pieces = list(_pieces(out / "clicks.parquet", out))
    assert [piece.column("query").to_pylist() for piece in pieces] == [[train]]
    assert "2 queries (2 rows) are near-identical to a dev or test query" in caplog.text
    assert test.upper() in held_out_queries(held_out_files(out))


def test_a_log_may_keep_held_out_queries_only_where_asked(tmp_path):
    out, log = tmp_path / "out", tmp_path / "log.parquet"
    prepare(f"table:{csv_table(tmp_path / 'grades.csv', graded_rows())}", out)
    pq.write_table(pa.Table.from_pylist(log_rows()), log)
    settings = {"events": str(log), "columns": NAMES, "debias": False, "privacy": OPEN_GATE}
    kept = write_clicks(ClickPairSettings(out=out / "clicks.parquet", exclude_held_out=False, **settings))
    default = write_clicks(ClickPairSettings(out=out / "clicks.parquet", **settings))
    given = write_clicks(
        ClickPairSettings(out=tmp_path / "clicks.parquet", exclude=[out / "judgments/test.parquet"], **settings)
    )
    assert kept["excluded_queries"] == 0 < given["excluded_queries"] < default["excluded_queries"]
    with pytest.raises(DataError, match="no column query"):
        write_clicks(ClickPairSettings(out=out / "c.parquet", exclude=[log], **settings))
    with pytest.raises(
        DataError, match=r"no column query \(question\); there are page, doc_id, visitor.*; map them with"
    ):
        write_clicks(ClickPairSettings(out=out / "c.parquet", **settings | {"columns": [*NAMES, "query=question"]}))
    with pytest.raises(ValueError, match="'words=x' is not OURS=THEIRS"):
        ClickPairSettings(out=out / "c.parquet", **settings | {"columns": ["words=x"]})
