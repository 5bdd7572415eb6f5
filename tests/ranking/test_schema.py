"""Tables are checked at every read: file, row and reason, and nothing lost on the way."""

from __future__ import annotations

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ranking.errors import DataError
from ranking.limits import MAX_FIELD_BYTES
from ranking.schema import TABLES, Rejects, iter_table, read_table, write_table

GOOD = {
    "query_id": ["q1", "q1", "q2"],
    "doc_id": ["a", "b", "a"],
    "query": ["x", "x", "y"],
    "title": ["t", "", "t"],
    "summary": ["", "s", ""],
    "grade": [0, 4, 1],
}


def write(path, **changes) -> None:
    columns = {name: values for name, values in {**GOOD, **changes}.items() if values is not None}
    pq.write_table(pa.table(columns), path)


def test_a_table_with_other_integer_and_text_types_is_cast_without_loss(tmp_path):
    path = tmp_path / "j.parquet"
    write(path, grade=pa.array([0, 4, 1], pa.int64()), query=pa.array(["x", "x", "y"]).dictionary_encode(),
          title=pa.array(["t", "", "t"], pa.large_string()), extra=[1, 2, 3])  # fmt: skip
    found = read_table(path, "judgments")
    assert found.schema == TABLES["judgments"].schema
    assert found.to_pydict() == GOOD


BAD = [
    ({"title": None}, r"no column title; judgments has query_id, doc_id, query, title, summary, grade", None),
    ({"grade": ["0", "4", "1"]}, r"column grade is string, int8 is needed", None),
    ({"query": [1, 2, 3]}, r"column query is int64, string is needed", None),
    ({"grade": [True, False, True]}, r"column grade is bool, int8 is needed", None),
    ({"grade": [[0], [4], [1]]}, r"column grade is list<.*>, int8 is needed", None),
    ({"grade": [[0], [1], [2]]}, r"column grade is list", None),
    ({"grade": [0.0, 4.0, math.nan]}, r"column grade: ", 3),
    ({"grade": [0.0, math.inf, 1.0]}, r"column grade: ", 2),
    ({"grade": [0.0, 1.5, 1.0]}, r"column grade: ", 2),
    ({"grade": [0, 1000, 1]}, r"column grade: ", 2),
    ({"grade": [0, 5, 1]}, r"grade is outside 0 to 4", 2),
    ({"grade": [0, 1, -1]}, r"grade is outside 0 to 4", 3),
    ({"grade": [0, None, 1]}, r"grade is null", 2),
    ({"query": ["x", None, "y"]}, r"query is null", 2),
    ({"query": ["x", "x", " \t\n"]}, r"query is blank", 3),
    ({"query": ["x", "x", "\u3000\u200b\ufeff"]}, r"query is blank", 3),
    ({"doc_id": ["a", "", "a"]}, r"doc_id is blank", 2),
    ({"doc_id": ["a", "a", "a"]}, r"duplicate key \(query_id, doc_id\)", 2),
    ({"summary": ["", "x" * (MAX_FIELD_BYTES + 1), ""]}, r"summary is longer than 1048576 bytes", 2),
]


@pytest.mark.parametrize("changes, reason, row", BAD)
def test_a_bad_table_names_file_row_and_reason(changes, reason, row, tmp_path):
    path = tmp_path / "j.parquet"
    write(path, **changes)
    with pytest.raises(DataError, match=reason) as error:
        read_table(path, "judgments")
    assert error.value.row == row and str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_column_that_stands_in_a_file_twice_is_told(tmp_path):
    path = tmp_path / "j.parquet"
    write(path)
    table = pq.read_table(path)
    pq.write_table(table.append_column("query", table["query"]), path)
    with pytest.raises(DataError, match=r"Multiple matches for .*query"):
        read_table(path, "judgments")
    with pytest.raises(DataError, match="column query occurs twice"):
        list(iter_table(path, "judgments"))


@pytest.mark.parametrize("changes, reason, row", [case for case in BAD if "column" not in case[1]])
def test_a_bad_row_can_be_rejected_and_counted(changes, reason, row, tmp_path):
    path = tmp_path / "j.parquet"
    write(path, **changes)
    rejects = Rejects(tmp_path / "rejects.tsv")
    found = read_table(path, "judgments", rejects)
    assert len(found) + rejects.count == 3
    lines = (tmp_path / "rejects.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "file\trow\treason" and lines[1].startswith(f"{path}\t{row}\t")


def test_several_bad_rows_are_counted_in_the_message(tmp_path):
    path = tmp_path / "j.parquet"
    write(path, grade=[9, 9, 1])
    with pytest.raises(DataError, match=r"row 1: grade is outside 0 to 4 \(1 more bad rows\)"):
        read_table(path, "judgments")


def test_nan_and_infinite_scores_and_weights_are_refused(tmp_path):
    path = tmp_path / "l.parquet"
    labels = {"query_id": ["q", "q"], "doc_id": ["a", "b"], "teacher_id": ["t", "t"]}
    for bad in (math.nan, math.inf, -math.inf):
        pq.write_table(pa.table({**labels, "teacher_score": [0.5, bad]}), path)
        with pytest.raises(DataError, match="row 2: teacher_score is NaN or infinite"):
            read_table(path, "labels")
    pq.write_table(pa.table({**labels, "teacher_score": [0.5, 1e300]}), path)  # finite in float64 alone
    with pytest.raises(DataError, match="row 2: teacher_score is NaN or infinite"):
        read_table(path, "labels")


def broken_text(*values: bytes) -> pa.Array:
    """A string column that holds bytes which are no UTF-8: Parquet does not stop anybody from writing it."""
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


def test_text_that_is_not_utf8_is_found_in_parquet_too(tmp_path):
    path = tmp_path / "j.parquet"
    write(path, title=broken_text(b"t", b"caf\xe9", b"t"))
    for read in (read_table, lambda *a: list(iter_table(*a))):
        with pytest.raises(DataError, match="row 2: column title is not valid UTF-8"):
            read(path, "judgments")


def test_files_that_break_off_or_are_something_else_are_named(tmp_path):
    path = tmp_path / "j.parquet"
    with pytest.raises(DataError, match="no such file"):
        read_table(path, "judgments")
    write(path)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b"", b"PAR1", b"not parquet"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            read_table(path, "judgments")
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            list(iter_table(path, "judgments"))


def test_a_damaged_page_is_found_while_streaming(tmp_path):
    path = tmp_path / "j.parquet"
    rows = {name: values * 2000 for name, values in GOOD.items()}
    rows["doc_id"] = [f"d{i}" for i in range(6000)]
    pq.write_table(pa.table(rows), path, compression="zstd", write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 4 + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read as Parquet|not valid"):
        for _ in iter_table(path, "judgments"):
            pass


def test_streaming_gives_the_same_rows_in_pieces_with_running_row_numbers(tmp_path):
    path = tmp_path / "j.parquet"
    rows = {name: values * 30 for name, values in GOOD.items()}
    rows["doc_id"] = [f"d{i}" for i in range(90)]
    pq.write_table(pa.table(rows), path)
    pieces = list(iter_table(path, "judgments", batch_rows=7))
    assert max(map(len, pieces)) <= 7 and pa.concat_tables(pieces).to_pydict() == rows
    rows["grade"][80] = 7
    pq.write_table(pa.table(rows), path)
    with pytest.raises(DataError, match="row 81: grade"):
        list(iter_table(path, "judgments", batch_rows=7))


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
visible = text.filter(lambda t: any(c.isalnum() for c in t))


@given(
    st.lists(
        st.fixed_dictionaries(
            {"query_id": visible, "doc_id": visible, "query": visible, "title": text, "summary": text,
             "grade": st.integers(0, 4)}
        ),
        max_size=20,
        unique_by=lambda row: (row["query_id"], row["doc_id"]),
    ),
    st.integers(1, 5),
)  # fmt: skip
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_written_is_read_back_whole_and_in_pieces(tmp_path, rows, batch):
    path = tmp_path / "j.parquet"
    table = pa.Table.from_pylist(rows, TABLES["judgments"].schema)
    assert write_table(path, "judgments", table) == len(rows)
    assert read_table(path, "judgments").to_pylist() == rows
    assert [row for piece in iter_table(path, "judgments", batch) for row in piece.to_pylist()] == rows
    assert write_table(path, "judgments", (table.slice(i, 3) for i in range(0, len(rows), 3))) == len(rows)
    assert read_table(path, "judgments").to_pylist() == rows


grades = st.one_of(st.integers(-300, 300), st.floats(), st.none())


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), grades), min_size=1, max_size=12))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_grades_are_kept_rejected_or_an_error_and_never_lost(tmp_path, rows):
    path, sink = tmp_path / "j.parquet", tmp_path / "r.tsv"
    sink.unlink(missing_ok=True)
    query_ids, doc_ids, values = zip(*rows)
    columns = {"query_id": query_ids, "doc_id": doc_ids, "query": query_ids, "title": doc_ids, "summary": doc_ids}
    kind = pa.float64() if any(isinstance(v, float) for v in values) else pa.int16()
    pq.write_table(pa.table({**{k: list(v) for k, v in columns.items()}, "grade": pa.array(values, kind)}), path)
    rejects = Rejects(sink)
    try:
        found = read_table(path, "judgments", rejects)
    except DataError as problem:
        assert "column grade" in str(problem)
        assert any(v is not None and (not math.isfinite(v) or v != int(v) or not -128 <= v <= 127) for v in values)
        return
    kept = found.to_pylist()
    assert len(kept) + rejects.count == len(rows)
    assert len({(row["query_id"], row["doc_id"]) for row in kept}) == len(kept)
    assert all(0 <= row["grade"] <= 4 for row in kept)


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "j.parquet"
    write_table(path, "judgments", pa.table(GOOD))
    before = path.read_bytes()
    with pytest.raises(DataError, match="row 2: grade"):
        write_table(path, "judgments", pa.table({**GOOD, "grade": [0, 9, 1]}))
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["j.parquet"]
