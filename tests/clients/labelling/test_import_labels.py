"""Scores that exist become a labels folder: each kind of file, what does not join, what is wrong, an interruption."""

from __future__ import annotations

import gzip
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clients import import_labels
from clients.import_labels import Config, main
from clients.labelling.score_files import ScoreColumns
from ranking.errors import InputError
from ranking.labels import LabelSet, iter_labelled, read_labels

ROWS = 60


def scores_of(candidates) -> list[tuple[str, str, float]]:
    """A score for every candidate, in an order that is not the file's."""
    rows = pq.read_table(candidates, columns=["query_id", "doc_id"]).to_pylist()
    found = [(row["query_id"], row["doc_id"], float(np.float32(number / 7 - 3))) for number, row in enumerate(rows)]
    random.Random(3).shuffle(found)
    return found


def write_scores(path, rows) -> None:
    """The rows in the format that the file's ending names."""
    names = ("query_id", "doc_id", "score")
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.table(dict(zip(names, zip(*rows)))), path)
        return
    if name.endswith(".jsonl"):
        lines = [json.dumps(dict(zip(names, row))) for row in rows]
    elif name.endswith(".trec"):
        lines = [f"{query}\tQ0  {document} {rank} {score!r} tag" for rank, (query, document, score) in enumerate(rows)]
    else:
        separator = "\t" if name.endswith(".tsv") else ","
        lines = [separator.join(map(str, row)) for row in (names, *rows)]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("name", ["s.parquet", "s.jsonl", "s.csv", "s.tsv", "s.trec", "s.csv.gz", "s.jsonl.gz"])
def test_scores_of_every_kind_of_file_meet_their_candidates(name, write_candidates, tmp_path):
    candidates = write_candidates(ROWS)
    write_scores(tmp_path / name, scores_of(candidates))
    assert main(Config(candidates, tmp_path / name, tmp_path / "out", shard_rows=16)) == 0
    labels = read_labels(tmp_path / "out")
    assert labels.column("teacher_score").to_numpy().tolist() == [float(np.float32(n / 7 - 3)) for n in range(ROWS)]
    texts = pa.concat_tables(iter_labelled(candidates, tmp_path / "out"))
    assert texts.column("title").to_pylist() == [f"title {n}" for n in range(ROWS)]


@pytest.mark.parametrize("separator", [";", "\t", "|"])
@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
def test_a_csv_is_separated_by_what_its_header_has_most_of(separator, ending, write_candidates, tmp_path):
    """As a table of judgments; a spreadsheet's semicolons come with decimal commas."""
    candidates = write_candidates(ROWS)
    lines = [("note, by hand", "score", "doc_id", "query_id"), *(("x", s, d, q) for q, d, s in scores_of(candidates))]
    text = "\n".join(separator.join(map(str, line)) for line in lines)
    content = (text.replace(".", ",") if separator == ";" else text).encode()
    scores = tmp_path / f"s{ending}"
    scores.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    assert main(Config(candidates, scores, tmp_path / "out")) == 0
    labels = read_labels(tmp_path / "out")
    assert labels.column("teacher_score").to_numpy().tolist() == [float(np.float32(n / 7 - 3)) for n in range(ROWS)]


def test_what_does_not_join_is_counted_on_both_sides(write_candidates, tmp_path, caplog):
    candidates = write_candidates(ROWS)
    rows = [row for row in scores_of(candidates) if row[:2] != ("q1", "d2")]
    write_scores(tmp_path / "s.parquet", [*rows, ("q99", "d0", 1.0), ("q98", "d0", 1.0)])
    with caplog.at_level("INFO"):
        assert main(Config(candidates, tmp_path / "s.parquet", tmp_path / "out")) == 3
    assert "59 of 60 candidates have a score; 2 of 61 scores belong to no candidate, e.g. query_id 'q98'" in caplog.text
    (reject,) = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert (reject["row"], reject["query_id"], reject["doc_id"]) == (11, "q1", "d2")
    assert reject["reason"] == "no score in s.parquet"


def test_a_candidate_whose_id_is_not_utf_8_is_a_reject(write_candidates, spoil_text, tmp_path, caplog):
    candidates = write_candidates(ROWS)
    write_scores(tmp_path / "s.parquet", scores_of(candidates))
    spoil_text(candidates, "doc_id", 5)
    with caplog.at_level("INFO"):
        assert main(Config(candidates, tmp_path / "s.parquet", tmp_path / "out")) == 3
    assert "59 of 60 candidates have a score; 1 of 60 scores belong to no candidate" in caplog.text
    (reject,) = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert (reject["row"], reject["cause"], reject["reason"]) == (6, "input", "doc_id is not valid UTF-8")


def test_columns_of_other_names_and_numeric_ids_are_read(write_candidates, tmp_path):
    candidates = tmp_path / "candidates.parquet"
    columns = {
        "query_id": ["7", "7"],
        "doc_id": ["1", "2"],
        "query": ["a", "a"],
        "title": ["x", "y"],
        "summary": ["", ""],
    }
    pq.write_table(pa.table(columns), candidates)
    pq.write_table(pa.table({"qid": [7, 7], "pid": [2, 1], "logit": [0.5, -1]}), tmp_path / "s.parquet")
    names = ScoreColumns("qid", "pid", "logit")
    assert main(Config(candidates, tmp_path / "s.parquet", tmp_path / "out", columns=names)) == 0
    assert read_labels(tmp_path / "out").column("teacher_score").to_pylist() == [-1.0, 0.5]


def test_ids_of_json_lines_stay_as_they_stand(tmp_path):
    """Seen: beside numbers a text id kept its quotes; UUIDs lost their capitals, times their T: none of them joined."""
    ids = [
        "A00048",
        12,
        "00012",
        "2020-01-01T00:00:05",
        "C0FFEE00-0000-4000-8000-00000000ABCD",
        '{"a": 1}',
        "null",
        "ü",
    ]
    columns = {"query_id": ["q/~1"] * len(ids), "doc_id": [str(one) for one in ids]}
    columns |= {"query": ["a"] * len(ids), "title": ["t"] * len(ids), "summary": [""] * len(ids)}
    pq.write_table(pa.table(columns), tmp_path / "candidates.parquet")
    rows = [json.dumps({"q/~1": "q/~1", "doc_id": one, "score": number}) for number, one in enumerate(ids)]
    (tmp_path / "s.jsonl").write_text("\n".join(rows), encoding="utf-8")
    names = ScoreColumns("q/~1", "doc_id", "score")
    assert main(Config(tmp_path / "candidates.parquet", tmp_path / "s.jsonl", tmp_path / "out", columns=names)) == 0
    assert read_labels(tmp_path / "out").column("teacher_score").to_pylist() == list(range(len(ids)))


@pytest.mark.parametrize(
    ("name", "rows", "reason"),
    [
        ("s.parquet", [("q0", "d0", float("nan"))], r"query_id 'q0', doc_id 'd0': the score is 'nan'"),
        ("s.csv", [("q0", "d0", "high")], r"the score is 'high'; a finite number is needed"),
        ("s.jsonl", [("q0", "d0", None)], r"the score is None"),
        ("s.csv", [("q0", "d1", 1.0), ("q0", "d1", 2.0)], r"two different scores for query_id 'q0', doc_id 'd1'"),
        ("s.parquet", [("x", "d0", 1.0)], r"0 of 60 candidates have a score.*wrong file or ids"),
        ("s.xlsx", [("q0", "d0", 1.0)], r"unknown kind of score file"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused_and_nothing_is_written(
    name, rows, reason, write_candidates, tmp_path
):
    write_scores(tmp_path / name, rows)
    with pytest.raises(InputError, match=reason):
        main(Config(write_candidates(ROWS), tmp_path / name, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("labels-*"))


def test_a_missing_file_or_column_is_named(write_candidates, tmp_path):
    candidates = write_candidates(ROWS)
    with pytest.raises(InputError, match="no such file"):
        main(Config(candidates, tmp_path / "none.parquet", tmp_path / "out"))
    write_scores(tmp_path / "s.csv", scores_of(candidates))
    with pytest.raises(InputError, match="no column logit; it has doc_id, query_id, score"):
        main(Config(candidates, tmp_path / "s.csv", tmp_path / "out", columns=ScoreColumns(score="logit")))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="cannot be read"):
        main(Config(candidates, tmp_path / "broken.parquet", tmp_path / "out"))


def test_an_import_that_was_killed_ends_with_the_same_bytes(write_candidates, tmp_path, monkeypatch):
    candidates = write_candidates(ROWS)
    write_scores(tmp_path / "s.parquet", scores_of(candidates))
    main(Config(candidates, tmp_path / "s.parquet", tmp_path / "whole", shard_rows=16))

    class Killed(BaseException):
        """As a kill, it is caught by nothing."""

    def write_two(*arguments, written=[]):  # noqa: B006
        if len(written) == 2:
            raise Killed
        written.append(True)
        return write_shard(*arguments)

    from clients.labelling import scored_rows
    from clients.labelling.label_shards import write_shard

    monkeypatch.setattr(scored_rows, "write_shard", write_two)
    with pytest.raises(Killed):
        main(Config(candidates, tmp_path / "s.parquet", tmp_path / "out", shard_rows=16))
    monkeypatch.undo()
    with pytest.raises(InputError, match="has not finished"):
        LabelSet.load(tmp_path / "out")
    assert import_labels.main(Config(candidates, tmp_path / "s.parquet", tmp_path / "out", shard_rows=16)) == 0
    for path in (tmp_path / "whole").glob("*.parquet"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
