"""Bad input to prepare_data: one line that names file, row and reason and a non-zero exit, or a counted reject."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ranking.errors import DataError, InputError
from ranking.limits import MAX_FIELD_BYTES
from ranking.schema import Rejects, read_table
from training.prepare_data import Config, main
from training.sources.row_readers import (
    BadRows,
    grade_field,
    json_rows,
    parquet_rows,
    text_field,
    text_lines,
)
from training.sources.separated_rows import separated_rows

ROOT = Path(__file__).parents[3]
NAMES = ("amber", "birch", "cedar", "daisy", "elder", "fjord", "grove", "hazel", "ivory", "jolly")


def beir(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": f"Title {i}", "text": f"text {i}"} for i in range(4)]
    queries = [{"_id": f"q{i}", "text": name} for i, name in enumerate(NAMES)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for split, ids in (("train", range(7)), ("test", range(7, 10))):
        rows = "".join(f"q{q}\td{d}\t{int(d == q % 4)}\n" for q in ids for d in range(4))
        (folder / f"qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows, encoding="utf-8")
    return folder


def replace_line(path: Path, number: int, line: bytes) -> None:
    lines = path.read_bytes().splitlines()
    lines[number - 1] = line
    path.write_bytes(b"\n".join(lines) + b"\n")


# file, row that is replaced, by what, the reason that must be given
BAD_ROWS = {
    "grade NaN": ("qrels/train.tsv", 3, b"q0\td1\tNaN", "grade is NaN or infinite"),
    "grade infinite": ("qrels/train.tsv", 3, b"q0\td1\t-inf", "grade is NaN or infinite"),
    "grade too high": (
        "qrels/train.tsv",
        3,
        b"q0\td1\t5",
        "grade 5 is no whole number from 0 to 4; if it is meant, --grades=0=0,1=1,5=2 maps",
    ),
    "grade fraction": ("qrels/train.tsv", 3, b"q0\td1\t0.5", "grade 0.5 is no whole number from 0 to 4"),
    "grade no number": ("qrels/train.tsv", 3, b"q0\td1\tgood", "grade 'good' is not a number"),
    "unknown document": ("qrels/train.tsv", 3, b"q0\td9\t1", "document 'd9' is not in the corpus"),
    "unknown query": ("qrels/train.tsv", 3, b"q99\td1\t1", "query 'q99' is not among the queries"),
    "duplicate key": ("qrels/train.tsv", 3, b"q0\td0\t1", "duplicate key (query 'q0', document 'd0')"),
    "missing field": ("qrels/train.tsv", 3, b"q0\td1", "2 fields, the header has 3"),
    "duplicate document": ("corpus.jsonl", 2, b'{"_id": "d0", "text": "b"}', "document 'd0' stands already in an"),
    "wrong type": ("corpus.jsonl", 2, b'{"_id": "d1", "text": ["b"]}', "text is list, text is needed"),
    "document without text": ("corpus.jsonl", 2, b'{"_id": "d1", "title": "b"}', "no field text; there are _id, title"),
    "document without id": ("corpus.jsonl", 2, b'{"_id": null, "text": "b"}', "_id is null, text is needed"),
    "no JSON": ("corpus.jsonl", 2, b'{"_id": "d1", ', "not JSON: "),
    "no object": ("corpus.jsonl", 2, b"[1, 2]", "not a JSON object"),
    "deep JSON": ("corpus.jsonl", 2, b"[" * 100_000, "not JSON: "),
    "invalid UTF-8": ("corpus.jsonl", 2, b'{"_id": "d1", "text": "caf\xe9"}', "not valid UTF-8 at byte 27"),
    "half a surrogate": ("corpus.jsonl", 2, b'{"_id": "d1", "text": "\\ud800"}', "text holds half a surrogate pair"),
    "5 MB document": ("corpus.jsonl", 2, b'{"_id": "d1", "text": "%s"}' % (b"x" * 5_000_000), "text is 5000000 bytes"),
    "empty query": ("queries.jsonl", 2, b'{"_id": "q1", "text": " \\t "}', "query is blank"),
    "duplicate query": ("queries.jsonl", 2, b'{"_id": "q0", "text": "x"}', "query 'q0' stands already in row 1"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_stops_with_file_row_and_reason(case, tmp_path):
    file, row, line, reason = BAD_ROWS[case]
    folder = beir(tmp_path / "set")
    replace_line(folder / file, row, line)
    with pytest.raises(InputError) as error:
        main(Config(source=f"beir:{folder}", out=tmp_path / "out"))
    message = str(error.value)
    assert f"{folder / file}, row {row}: " in message and reason in message
    assert "--on-bad-row reject" in message and "\n" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_rejected_with_a_count_where_asked(case, tmp_path):
    file, row, line, reason = BAD_ROWS[case]
    folder = beir(tmp_path / "set")
    replace_line(folder / file, row, line)
    out = tmp_path / "out"
    for _ in range(2):  # a second run starts the rejects file anew
        main(Config(source=f"beir:{folder}", out=out, on_bad_row="reject"))
    rejects = [line.split("\t") for line in (out / "rejects.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    counts = json.loads((out / "dataset.json").read_text(encoding="utf-8"))["counts"]
    assert counts["rejected_rows"] == len(rejects)
    assert any(r[0] == str(folder / file) and r[1] == str(row) and reason in r[2] for r in rejects)
    # what hangs on a rejected document or query is rejected too; the rest is all there
    total = sum(counts[f"judgments_{name}"] for name in ("train", "dev", "test"))
    assert total == 40 - sum("qrels" in r[0] for r in rejects)


def test_a_missing_column_is_the_whole_files_fault(tmp_path):
    folder = beir(tmp_path / "set")
    replace_line(folder / "qrels/train.tsv", 1, b"query-id\tdoc\tscore")
    with pytest.raises(DataError, match=r"train\.tsv: no column corpus-id; there are query-id, doc, score"):
        main(Config(source=f"beir:{folder}", out=tmp_path / "out", on_bad_row="reject"))


def test_a_broken_off_gzip_stops_even_where_rows_are_rejected(tmp_path):
    folder = beir(tmp_path / "set")
    corpus = folder / "corpus.jsonl"
    packed = gzip.compress(corpus.read_bytes())
    corpus.unlink()
    for broken in (packed[:-20], packed[:40], b"not gzip at all"):
        (folder / "corpus.jsonl.gz").write_bytes(broken)
        with pytest.raises(DataError, match=r"corpus\.jsonl\.gz, row \d+: truncated or damaged gzip") as error:
            main(Config(source=f"beir:{folder}", out=tmp_path / "out"))
        assert "--on-bad-row" not in str(error.value)  # it would not help
        with pytest.raises(DataError):
            main(Config(source=f"beir:{folder}", out=tmp_path / "out", on_bad_row="reject"))


def test_missing_files_and_empty_sets_are_named(tmp_path):
    folder = beir(tmp_path / "set")
    (folder / "queries.jsonl").unlink()
    with pytest.raises(DataError, match=r"queries\.jsonl: no such file"):
        main(Config(source=f"beir:{folder}", out=tmp_path / "out"))
    for file in (folder / "qrels").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"qrels: no \.tsv or \.qrels file"):
        main(Config(source=f"beir:{folder}", out=tmp_path / "out"))
    with pytest.raises(InputError, match="no such folder"):
        main(Config(source=f"beir:{tmp_path / 'none'}", out=tmp_path / "out"))


def test_zero_usable_queries_is_an_error(tmp_path):
    folder = beir(tmp_path / "set")
    for file in (folder / "qrels").iterdir():
        file.write_text("query-id\tcorpus-id\tscore\n", encoding="utf-8")
    with pytest.raises(DataError, match="no usable query: not one judged pair is left"):
        main(Config(source=f"beir:{folder}", out=tmp_path / "out"))
    for file in (folder / "qrels").iterdir():
        file.write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t1\n", encoding="utf-8")
    with pytest.raises(DataError, match="none has documents of different grades"):
        main(Config(source=f"beir:{folder}", out=tmp_path / "out"))


TABLE = {
    "query": ["a", "a", "b", "b"],
    "doc_id": ["1", "2", "1", "2"],
    "title": ["x", "y", "x", "y"],
    "grade": [1, 0, 0, 1],
}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"grade": [1, 0, float("nan"), 1]}, "row 3: grade is NaN"),
        ({"grade": [True, False, True, True]}, "row 1: grade is bool"),
        ({"query": ["a", "a", "b", None]}, "row 4: query is null"),
        ({"doc_id": ["1", "1", "1", "2"], "title": ["x", "x", "x", "y"]},
     r"row 2: duplicate key \(query 'a', document '1'\)"),
        ({"split": ["train", "test", "dev", "holdout"]}, "row 4: split 'holdout': one of train, dev, test"),
        ({"query_id": ["1", "1", "2", "1"]}, "row 4: query '1' has another text"),
    ],
)  # fmt: skip
def test_bad_rows_of_the_users_parquet(change, reason, tmp_path):
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({**TABLE, **change}), path)
    with pytest.raises(InputError, match=reason):
        main(Config(source=f"table:{path}", out=tmp_path / "out"))


def test_parquet_text_that_is_not_utf8_is_a_bad_row(tmp_path):
    path = tmp_path / "mine.parquet"
    raw = pa.array([b"x", b"y", b"caf\xe9", b"y"], pa.binary())
    title = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    pq.write_table(pa.table({**TABLE, "title": title}), path)
    with pytest.raises(DataError, match="row 3: not valid UTF-8"):
        main(Config(source=f"table:{path}", out=tmp_path / "out"))
    bad = BadRows(Rejects(tmp_path / "rejects.tsv"))
    assert [number for number, _ in parquet_rows(path, bad)] == [1, 2, 4] and bad.count == 1


def test_wrong_column_maps_and_formats_are_named(tmp_path):
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table(TABLE), path)
    source = f"table:{path}"
    with pytest.raises(DataError, match=r"no column query \(search\); there are query, doc_id, title, grade; map them"):
        main(Config(source=source, out=tmp_path / "out", columns=["query=search"]))
    with pytest.raises(InputError, match="--columns text=x: write OURS=THEIRS"):
        main(Config(source=source, out=tmp_path / "out", columns=["text=x"]))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"mine\.parquet: cannot be read as Parquet"):
        main(Config(source=source, out=tmp_path / "out"))
    for name in ("mine.xlsx", "none.csv"):
        (tmp_path / "mine.xlsx").write_bytes(b"PK")
        with pytest.raises(InputError, match=r"is expected|no such file"):
            main(Config(source=f"table:{tmp_path / name}", out=tmp_path / "out"))
    empty = tmp_path / "empty.csv"
    for content in ("", "query,title,grade\n"):
        empty.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=r"a header line is needed|the table has no row"):
            main(Config(source=f"table:{empty}", out=tmp_path / "out"))
    empty.write_text("query,query,grade\n", encoding="utf-8")
    with pytest.raises(DataError, match="occurs twice"):
        main(Config(source=f"table:{empty}", out=tmp_path / "out"))


def test_the_command_ends_with_one_line_and_a_non_zero_exit(tmp_path):
    folder = beir(tmp_path / "set")
    replace_line(folder / "qrels/train.tsv", 5, b"q0\td3\tInfinity")
    command = [
        sys.executable,
        "-m",
        "training.prepare_data",
        "--source",
        f"beir:{folder}",
        "--out",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert "\r" not in done.stderr  # a log file is no place for progress bars
    last = done.stderr.strip().splitlines()[-1].rpartition("\r")[2].strip()
    assert last.startswith("error: ") and "train.tsv, row 5: grade is NaN or infinite" in last
    assert "Traceback" not in done.stderr


@given(st.text(max_size=300).map(lambda t: t.encode("utf-8", "surrogatepass")) | st.binary(max_size=300))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_give_rows_and_rejects_that_cover_every_line(tmp_path, content):
    # UTF-16, gzip and zip are the whole file's fault
    assume(not content.startswith((b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b", b"PK\x03\x04")))
    path, sink = tmp_path / "any.jsonl", tmp_path / "rejects.tsv"
    sink.unlink(missing_ok=True)
    path.write_bytes(content)
    bad = BadRows(Rejects(sink))
    rows = list(json_rows(path, bad))
    blank = sum(number not in {r for r, _ in rows} for number, _ in enumerate(content.split(b"\n"), 1)) - bad.count
    assert blank == sum(is_blank(line) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))


def is_blank(line: bytes) -> bool:
    try:
        return not line.decode("utf-8").strip()
    except UnicodeDecodeError:
        return False


plain_text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)


@given(st.lists(st.fixed_dictionaries({"query": plain_text, "title": plain_text}), min_size=1, max_size=20))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_jsonl_and_csv_give_back_what_was_written(tmp_path, rows):
    import csv

    jsonl, table = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    jsonl.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n"
    )
    assert [row for _, row in json_rows(jsonl, BadRows())] == rows
    with table.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["query", "title"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    assert [row for _, row in separated_rows(table, BadRows())] == rows


@given(
    st.floats() | st.integers() | st.text(max_size=8) | st.none() | st.booleans() | st.lists(st.integers(), max_size=1)
)
def test_a_grade_is_a_finite_number_or_an_error(value):
    try:
        grade = grade_field(value)
    except ValueError as problem:
        assert str(problem).startswith("grade ")
    else:
        assert type(grade) is float and math.isfinite(grade)


@given(st.text(st.characters()) | st.integers() | st.floats() | st.none() | st.booleans())
def test_a_text_field_is_encodable_text_or_an_error(value):
    try:
        text = text_field(value, "title", blank_ok=True)
    except ValueError as problem:
        assert str(problem).startswith("title ")
    else:
        assert len(text.encode("utf-8")) <= MAX_FIELD_BYTES and text == ("" if value is None else str(value))


def test_windows_line_ends_and_a_byte_order_mark_are_no_part_of_the_text(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_bytes("\ufeffquery\ttitle\r\nä\tb \r\n\r\nc\td".encode())
    assert list(separated_rows(path, BadRows())) == [
        (2, {"query": "ä", "title": "b "}),
        (4, {"query": "c", "title": "d"}),
    ]
    assert [number for number, _ in text_lines(path, BadRows())] == [1, 2, 4]


def test_every_written_table_can_be_read_back(tmp_path):
    folder = beir(tmp_path / "set")
    main(Config(source=f"beir:{folder}", out=tmp_path / "out"))
    for name in ("train", "dev", "test"):
        assert len(read_table(tmp_path / f"out/judgments/{name}.parquet", "judgments"))
