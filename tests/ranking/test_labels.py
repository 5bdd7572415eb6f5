"""Reading a labels folder: only finished, undamaged folders of one teacher are read."""

import hashlib
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clients.labelling.candidate_file import CandidateFile
from ranking.card import fingerprint
from ranking.errors import DataError, InputError
from ranking.labels import (
    REJECTS_SCHEMA,
    LabelSet,
    footer_fingerprint,
    iter_labelled,
    iter_labels,
    read_labels,
    shard_name,
)
from ranking.schema import TABLES


def candidates(n):
    rows = [(f"q{i // 3}", f"d{i}", f"query {i // 3}", f"title {i}", f"summary {i}") for i in range(n)]
    return pa.table([list(c) for c in zip(*rows)], schema=TABLES["candidates"].schema)


@pytest.fixture
def labelled(tmp_path):
    """Seven candidates in shards of four rows; row 6 was rejected."""
    table = candidates(7)
    pq.write_table(table, tmp_path / "candidates.parquet", row_group_size=2)
    folder = tmp_path / "labels"
    folder.mkdir()
    shards = []
    for index, rows in enumerate([[0, 1, 2, 3], [4, 6]]):
        part = table.take(rows)
        labels = pa.table(
            [part["query_id"], part["doc_id"], pa.array([r / 2 for r in rows], pa.float32()), ["t1"] * len(rows)],
            schema=TABLES["labels"].schema,
        )
        path = folder / shard_name(index)
        pq.write_table(labels, path)
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        size = [4, 3][index]
        shards.append({"file": path.name, "first_row": 4 * index, "rows": size, "labels": len(rows), "sha256": sha})
    rejects = pa.table([[6], ["q1"], ["d5"], ["input"], ["query is blank"]], schema=REJECTS_SCHEMA)
    pq.write_table(rejects, folder / "rejects.parquet")
    manifest = {"version": 1, "complete": True, "teacher_id": "t1", "shards": shards}
    manifest["counts"] = {"rows": 7, "labels": 6, "rejects": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_labels_come_shard_by_shard_in_the_order_of_the_candidates(labelled):
    assert [len(piece) for piece in iter_labels(labelled)] == [4, 2]
    assert read_labels(labelled).column("doc_id").to_pylist() == ["d0", "d1", "d2", "d3", "d4", "d6"]


def test_scores_are_joined_to_their_text_past_a_rejected_row(labelled, tmp_path):
    rows = pa.concat_tables(iter_labelled(tmp_path / "candidates.parquet", labelled))
    assert rows.column("title").to_pylist() == [f"title {i}" for i in (0, 1, 2, 3, 4, 6)]
    assert rows.column("teacher_score").to_pylist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]


def test_a_candidate_file_that_changed_is_refused(labelled, tmp_path):
    shuffled = candidates(7).take([1, 0, 2, 3, 4, 5, 6])
    pq.write_table(shuffled, tmp_path / "other.parquet")
    with pytest.raises(DataError, match="its keys are not those of"):
        list(iter_labelled(tmp_path / "other.parquet", labelled))
    pq.write_table(candidates(8), tmp_path / "longer.parquet")
    with pytest.raises(DataError, match="8 rows"):
        list(iter_labelled(tmp_path / "longer.parquet", labelled))


@pytest.mark.parametrize("of_file", [fingerprint, footer_fingerprint])
def test_texts_that_changed_under_their_ids_are_refused(labelled, tmp_path, of_file):
    """label_writer keeps the fingerprint of all bytes, clients/labelling that of the footer."""
    path, manifest = tmp_path / "candidates.parquet", json.loads((labelled / "manifest.json").read_text())
    manifest["candidates"] = {"name": path.name, "rows": 7, "fingerprint": of_file(path)}
    (labelled / "manifest.json").write_text(json.dumps(manifest))
    assert sum(map(len, iter_labelled(path, labelled))) == 6
    table = candidates(7)
    titles = pa.array([title.upper() for title in table["title"].to_pylist()])
    pq.write_table(table.set_column(3, table.schema.field("title"), titles), path, row_group_size=2)
    with pytest.raises(DataError, match=r"not the file that .*labels labelled, or changed since: label it again"):
        list(iter_labelled(path, labelled))


def test_the_footers_fingerprint_is_the_one_that_labelling_keeps(labelled, tmp_path):
    path = tmp_path / "candidates.parquet"
    assert footer_fingerprint(path) == CandidateFile.open(path).fingerprint != fingerprint(path)


def test_labels_of_one_teacher_are_told_apart_by_their_scores(labelled):
    before = LabelSet.load(labelled)
    assert before.mark() == LabelSet.load(labelled).mark()
    shards = (replace(before.shards[0], sha256="0" * 64), *before.shards[1:])
    assert replace(before, shards=shards).mark() != before.mark() != replace(before, teacher_id="t2").mark()


def test_one_flipped_byte_in_a_shard_is_found(labelled):
    path = labelled / shard_name(1)
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"labels-00001[.]parquet: differs from the manifest's checksum"):
        read_labels(labelled)


def test_an_unfinished_folder_and_a_second_teacher_are_refused(labelled):
    path = labelled / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"teacher_id": "t2"}))
    with pytest.raises(DataError, match="by t2"):
        read_labels(labelled)
    path.write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(InputError, match="labelling has not finished"):
        read_labels(labelled)
