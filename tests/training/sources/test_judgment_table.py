"""The user's own table, where its columns, types or splits are not the ones of a clean export."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ranking.errors import DataError, InputError
from ranking.schema import Rejects, read_table
from training.prepare_data import Config, main
from training.sources.judgment_table import read_table_source
from training.sources.row_readers import BadRows

WORDS = ("amber", "birch", "cedar", "daisy", "elder", "fjord", "grove", "hazel", "ivory", "jolly")


def rows_of(queries=WORDS, **more) -> list[dict]:
    return [
        {"query": query, "doc_id": f"d{i}", "title": f"{query} {i}", "grade": i % 3, **more}
        for query in queries
        for i in range(4)
    ]


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(path: Path, out: Path, **settings) -> dict:
    main(Config(source=f"table:{path}", out=out, **settings))
    return json.loads((out / "dataset.json").read_text(encoding="utf-8"))["counts"]


def test_a_column_that_the_first_json_row_leaves_out_is_read(tmp_path):
    rows = [
        row | {"summary": f"about {row['query']}", "split": split}
        for split, queries in (("train", WORDS[:5]), ("dev", WORDS[5:7]), ("test", WORDS[7:]))
        for row in rows_of(queries)
    ]
    del rows[0]["summary"], rows[0]["split"]
    prepare(jsonl(tmp_path / "mine.jsonl", rows), tmp_path / "out")
    test = read_table(tmp_path / "out/judgments/test.parquet", "judgments").to_pylist()
    assert {row["query"] for row in test} == set(WORDS[7:])
    assert all(row["summary"] == f"about {row['query']}" for row in test)


def test_a_json_row_without_a_grade_is_a_pair_to_be_labelled_wherever_it_stands(tmp_path):
    for place in (0, 17):
        rows = rows_of()
        del rows[place]["grade"]
        source = read_table_source(jsonl(tmp_path / "mine.jsonl", rows), {}, BadRows())
        assert source.unlabelled == {(rows[place]["query"], rows[place]["doc_id"])}
        assert sum(map(len, source.judged.values())) == 39


def test_a_column_that_no_json_row_has_is_missing(tmp_path):
    rows = [{"query": "a"}, {"title": "b"}]
    with pytest.raises(DataError, match=r"no column grade; there are query, title; map them"):
        read_table_source(jsonl(tmp_path / "mine.jsonl", rows), {}, BadRows())
    with pytest.raises(DataError, match="no column query, title, grade"):
        read_table_source(jsonl(tmp_path / "mine.jsonl", [{}]), {}, BadRows())


def test_bad_json_rows_are_noted_once(tmp_path):
    path = jsonl(tmp_path / "mine.jsonl", rows_of())
    path.write_text("no json\n" + path.read_text(encoding="utf-8") + "[1]\n", encoding="utf-8")
    bad = BadRows(Rejects(tmp_path / "rejects.tsv"))
    read_table_source(path, {}, bad)
    assert bad.count == 2


@pytest.mark.parametrize("test_first", [False, True])
def test_a_query_without_id_in_train_and_test_stays_in_test(test_first, tmp_path, caplog):
    train, test = rows_of(split="train"), rows_of(WORDS[:3], split="test")
    rows = test + train if test_first else train + test
    counts = prepare(jsonl(tmp_path / "mine.jsonl", rows), tmp_path / "out")
    assert counts["judgments_test"] == 12 and counts["judgments_of_those"] == 12
    assert "3 queries stand in several splits of the source: each counts in the highest one alone" in caplog.text
    train_rows = read_table(tmp_path / "out/judgments/train.parquet", "judgments").to_pylist()
    assert not {row["query"] for row in train_rows} & set(WORDS[:3])


@pytest.mark.parametrize("splits", [("test", "test"), ("", ""), ("", "train"), ("dev", "")])
def test_a_pair_twice_in_what_may_be_one_split_is_a_duplicate(splits, tmp_path):
    rows = [*rows_of(), *(rows_of()[:1][0] | {"query": "kiosk", "split": split} for split in splits)]
    with pytest.raises(DataError, match=r"row 42: duplicate key \(query 'kiosk', document 'd0'\)"):
        prepare(jsonl(tmp_path / "mine.jsonl", rows), tmp_path / "out")


def columns_of(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_columns_that_nobody_asks_for_are_not_read(tmp_path):
    path, n = tmp_path / "mine.parquet", 40
    far = pa.array([2**62] * n, pa.timestamp("us"))  # beyond what Python's datetime holds
    zone = pa.array([0] * n, pa.timestamp("us", tz="Nowhere/Town"))
    pq.write_table(pa.table({**columns_of(rows_of()), "seen": far, "zone": zone}), path)
    assert prepare(path, tmp_path / "out")["documents"] == 4
    with pytest.raises(DataError, match=r"column seen is timestamp\[us\]: text or numbers are needed"):
        prepare(path, tmp_path / "out", columns=["query_id=seen"])
    pq.write_table(pa.table({**columns_of(rows_of()), "summary": [["a"]] * n}), path)
    with pytest.raises(DataError, match=r"column summary is list<.*>: text or numbers are needed"):
        prepare(path, tmp_path / "out")


def test_a_column_that_stands_in_a_file_twice_is_told(tmp_path):
    table = pa.table(columns_of(rows_of()))
    pq.write_table(table.append_column("query", table["title"]), tmp_path / "mine.parquet")
    with pytest.raises(DataError, match=r"mine\.parquet: column query occurs twice"):
        prepare(tmp_path / "mine.parquet", tmp_path / "out")


def test_decimal_grades_and_ids_are_numbers(tmp_path):
    path, columns = tmp_path / "mine.parquet", columns_of(rows_of())
    columns["grade"] = pa.array([Decimal(grade) for grade in columns["grade"]], pa.decimal128(10, 2))
    columns["doc_id"] = pa.array([Decimal(i) for i in range(40)], pa.decimal128(38, 0))
    pq.write_table(pa.table(columns), path)
    source = read_table_source(path, {}, BadRows())
    assert source.judged[""]["amber", "2"] == 2 and set(source.documents) == {str(i) for i in range(40)}


def test_a_folder_of_parquet_files_as_spark_writes_it_is_one_table(tmp_path):
    folder = tmp_path / "mine.parquet"
    folder.mkdir()
    (folder / "_SUCCESS").touch()
    for part, queries in enumerate((WORDS[:5], WORDS[5:])):
        pq.write_table(pa.table(columns_of(rows_of(queries))), folder / f"part-{part}.snappy.parquet")
    counts = prepare(folder, tmp_path / "out")
    assert sum(counts[f"queries_{split}"] for split in ("train", "dev", "test")) == 10
    pq.write_table(pa.table(columns_of(rows_of(["kiosk"], split="test"))), folder / "part-2.parquet")
    with pytest.raises(DataError, match=r"part-2\.parquet: its columns are not those of part-0"):
        prepare(folder, tmp_path / "out")
    with pytest.raises(InputError, match=r"part-0.*: the folder mine\.parquet is not named like split=train"):
        prepare(folder.parent, tmp_path / "other")
    with pytest.raises(InputError, match=r"a folder without \.parquet files"):
        (tmp_path / "empty").mkdir()
        prepare(tmp_path / "empty", tmp_path / "other")


@pytest.mark.parametrize("part", ["", "-00000-of-00001"])
def test_files_named_for_their_splits_are_these_splits(tmp_path, part):
    """Seen: train.parquet, dev.parquet and test.parquet were one table, whose splits were drawn anew."""
    folder, queries = tmp_path / "mine", {"train": WORDS[:6], "validation": WORDS[6:8], "test": WORDS[8:]}
    folder.mkdir()
    for split, words in queries.items():
        pq.write_table(pa.table(columns_of(rows_of(words))), folder / f"{split}{part}.parquet")
    prepare(folder, tmp_path / "out")
    for split, words in zip(("train", "dev", "test"), queries.values()):
        table = read_table(tmp_path / f"out/judgments/{split}.parquet", "judgments")
        assert set(table.column("query").to_pylist()) == set(words)
    pq.write_table(pa.table(columns_of(rows_of(["kiosk"]))), folder / "more.parquet")
    with pytest.raises(
        InputError, match=r"more\.parquet: test.*parquet beside it is named for its split, this file is"
    ):
        prepare(folder, tmp_path / "out")


def test_a_column_says_the_split_whatever_the_files_names(tmp_path):
    for name in ("split", "Fold"):
        folder = tmp_path / name
        folder.mkdir()
        for file, split, words in (("test", "train", WORDS[:6]), ("train", "test", WORDS[6:])):
            pq.write_table(pa.table(columns_of(rows_of(words, **{name: split}))), folder / f"{file}.parquet")
        prepare(folder, tmp_path / "out", columns=["split=Fold"] if name == "Fold" else [])
        test = read_table(tmp_path / "out/judgments/test.parquet", "judgments")
        assert set(test.column("query").to_pylist()) == set(WORDS[6:])


def test_a_folder_partitioned_as_hive_does_it_is_one_table(tmp_path):
    """Seen: `partitionBy("split")` was a folder without files."""
    parts = {"split=train": WORDS[:6], "split=validation": WORDS[6:8], "split=__HIVE_DEFAULT_PARTITION__": WORDS[8:]}
    for grade in (0, 1, 2):
        for part, queries in parts.items():
            rows = [row for row in rows_of(queries) if row["grade"] == grade]
            columns = {name: values for name, values in columns_of(rows).items() if name != "grade"} | {"unused": rows}
            folder = tmp_path / "mine" / part / f"my%20grade={grade}"
            folder.mkdir(parents=True)
            pq.write_table(pa.table(columns), folder / "part-0.parquet")
    (tmp_path / "mine/_delta_log").mkdir()
    (tmp_path / "mine/_delta_log/0.checkpoint.parquet").write_bytes(b"of another kind")
    source = read_table_source(tmp_path / "mine", {"grade": "my grade"}, BadRows())
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.table(columns_of(rows_of())), plain)
    expected = read_table_source(plain, {}, BadRows())
    assert {name: {query for query, _ in grades} for name, grades in source.judged.items()} == {
        "train": set(WORDS[:6]), "dev": set(WORDS[6:8]), "": set(WORDS[8:]),
    }  # fmt: skip
    assert {pair: grade for grades in source.judged.values() for pair, grade in grades.items()} == expected.judged[""]
    (tmp_path / "mine/split=test").mkdir()
    pq.write_table(pa.table(columns_of(rows_of(["kiosk"]))), tmp_path / "mine/split=test/part-0.parquet")
    with pytest.raises(DataError, match="its columns are not those of split="):
        read_table_source(tmp_path / "mine", {"grade": "my grade"}, BadRows())


def test_an_ending_in_capitals_is_the_same_ending(tmp_path):
    path = jsonl(tmp_path / "MINE.JSONL", rows_of())
    assert prepare(path, tmp_path / "out")["documents"] == 4
    path = tmp_path / "MINE.Parquet"
    pq.write_table(pa.table({**columns_of(rows_of()), "day": [datetime.date(2026, 1, 1)] * 40}), path)
    assert prepare(path, tmp_path / "out2")["documents"] == 4
