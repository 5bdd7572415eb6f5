"""The store: nothing is asked twice, teachers never mix, a run that was cut off ends with the same bytes."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clients.label_over_http import Config, main
from clients.labelling import label_store
from clients.labelling.candidate_file import CandidateFile
from clients.labelling.http_costs import Prices
from clients.labelling.label_store import RUN_SCHEMA, LabelStore, write_keys
from ranking.database import DuckDbSettings
from ranking.errors import DataError, InputError
from ranking.labels import LabelSet, iter_labelled, read_labels
from ranking.pair_keys import pair_keys
from ranking.schema import TABLES
from tests.helpers.stub_reranker import reranker, stub_score

COLUMNS = TABLES["candidates"].schema.names


def write_rows(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(zip(COLUMNS, zip(*rows))), schema=TABLES["candidates"].schema), path)


def corpus(count: int) -> list[tuple[str, ...]]:
    return [(f"q{n // 8}", f"d{n}", f"query {n // 8}", f"title {n}", f"what {n} says") for n in range(count)]


def run(stub, candidates, folder, name: str, **changes) -> int:
    settings = {"model": stub.model, "documents": 8, "shard_rows": 64, "key_variable": "", "store": folder / "store"}
    out = folder / name
    return main(Config(candidates=candidates, out=out, dialect="tei", url=[stub.url], **(settings | changes)))


def expected(rows) -> list[float]:
    return [float(np.float32(stub_score(row[2], f"{row[3]} {row[4]}".strip()))) for row in rows]


def files(folder) -> dict[str, bytes]:
    """Every Parquet file below a folder, less what names the run it was made in."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def test_rows_that_were_added_or_changed_are_asked_and_no_others(tmp_path):
    first = corpus(200)
    write_rows(tmp_path / "a.parquet", first)
    changed = [*first[:50], ("q6", "d50", "query 6", "title 50", "another summary"), *first[51:]]
    second = [*changed, ("q25", "d200", "query 25", "title 200", ""), ("q25", "d201", "query 25", "title 201", "")]
    write_rows(tmp_path / "b.parquet", second)
    with reranker("tei") as stub:
        assert run(stub, tmp_path / "a.parquet", tmp_path, "a") == 0
        assert len(stub.answered) == 200
        stub.answered.clear()
        assert run(stub, tmp_path / "b.parquet", tmp_path, "b") == 0
        assert set(stub.answered) == {
            ("query 6", "title 50 another summary"), ("query 25", "title 200"), ("query 25", "title 201"),
        }  # fmt: skip
        stub.answered.clear()
        assert run(stub, tmp_path / "b.parquet", tmp_path, "c") == 0  # nothing is left to ask
        assert not stub.answered
    for name, rows in (("a", first), ("b", second), ("c", second)):
        assert read_labels(tmp_path / name).column("teacher_score").to_pylist() == expected(rows)
    joined = pa.concat_tables(iter_labelled(tmp_path / "b.parquet", tmp_path / "b"))
    assert joined.column("summary").to_pylist() == [row[4] for row in second]


def test_a_text_that_stands_twice_is_asked_once_whatever_its_ids_and_spaces_are(tmp_path):
    rows = [
        ("q0", "d0", "shoes", "Light shoes", "red"),
        ("q0", "d1", "shoes", "Ｌｉｇｈｔ\n shoes", " red"),
        ("q1", "d0", "shoes", "Light shoes", "red"),
        ("q1", "d1", "shoes", "Light", "shoes red"),  # the same words in other fields are another text
    ]
    write_rows(tmp_path / "a.parquet", rows)
    with reranker("tei") as stub:
        assert run(stub, tmp_path / "a.parquet", tmp_path, "a") == 0
    assert stub.answered.total() == 2
    scores = read_labels(tmp_path / "a").column("teacher_score").to_pylist()
    assert scores[0] == scores[1] == scores[2]


def test_a_run_that_was_cut_off_leaves_the_bytes_of_one_that_was_not(tmp_path):
    write_rows(tmp_path / "a.parquet", corpus(300))
    with reranker("tei") as stub:
        assert run(stub, tmp_path / "a.parquet", tmp_path / "whole", "a") == 0
        cut = 0
        while True:
            try:
                budget = {"budget": 7.0, "prices": Prices(per_1000_requests=1000.0), "in_flight": 1}
                assert run(stub, tmp_path / "a.parquet", tmp_path / "parts", "a", **budget) == 0
                break
            except InputError:
                cut += 1
        assert cut > 3
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert len(files(tmp_path / "parts" / "store")) == 1


def test_another_teacher_gets_labels_of_its_own(tmp_path):
    write_rows(tmp_path / "a.parquet", corpus(32))
    with reranker("tei") as stub:
        run(stub, tmp_path / "a.parquet", tmp_path, "a")
        run(stub, tmp_path / "a.parquet", tmp_path, "b", revision="quantised")
        assert set(stub.answered.values()) == {2}
        with pytest.raises(InputError, match="two teachers' scores do not mix"):
            run(stub, tmp_path / "a.parquet", tmp_path, "a", revision="quantised")
    teachers = {LabelSet.load(tmp_path / name).teacher_id for name in ("a", "b")}
    assert {path.name for path in (tmp_path / "store").iterdir()} == teachers and len(teachers) == 2


def test_what_the_teacher_fails_on_is_no_label_and_can_be_asked_again(tmp_path):
    write_rows(tmp_path / "a.parquet", [*corpus(32), ("q9", "d99", "   ", "title", "")])
    with reranker("tei", poison="what 17 says") as stub:
        assert run(stub, tmp_path / "a.parquet", tmp_path, "a") == 3
        rejects = pq.read_table(tmp_path / "a/rejects.parquet").to_pylist()
        assert [(reject["row"], reject["cause"]) for reject in rejects] == [(18, "teacher"), (33, "input")]
        stub.poison = ""
        stub.answered.clear()
        assert run(stub, tmp_path / "a.parquet", tmp_path, "a", retry_rejects=True) == 3
        assert LabelSet.load(tmp_path / "a").labels == 32
    teacher = LabelSet.load(tmp_path / "a").teacher_id
    assert LabelStore(tmp_path / "store", teacher).check() == 32


def labels_file(path, numbers, score=0.0) -> None:
    high, low = pair_keys([f"q {n}" for n in numbers], [f"t {n}" for n in numbers], [""] * len(numbers))
    scores = np.array([n + score for n in numbers], np.float32)
    pq.write_table(pa.table([high, low, scores], schema=RUN_SCHEMA), path)


def test_of_a_hundred_thousand_labelled_pairs_and_one_per_cent_more_those_are_missing(tmp_path):
    total, known = 101_000, set(range(101_000))
    new = set(random.Random(5).sample(range(total), 1000))
    store = LabelStore(tmp_path / "store", "t")
    for part in range(3):
        labels_file(tmp_path / f"{part}.parquet", [n for n in sorted(known - new) if n % 3 == part])
        store.add(tmp_path / f"{part}.parquet", source=str(part))
    assert store.check() == 100_000
    write_rows(tmp_path / "c.parquet", [(f"q{n}", "d", f"q {n}", f"t {n}", "") for n in range(total)])
    candidates = CandidateFile.open(tmp_path / "c.parquet")
    assert write_keys(candidates, tmp_path / "keys.parquet") == 0
    assert store.missing(tmp_path / "keys.parquet", candidates, tmp_path / "missing.parquet") == 1000
    found = pq.read_table(tmp_path / "missing.parquet").column("query_id").to_pylist()
    assert found == [f"q{n}" for n in sorted(new)]
    scores = pa.Table.from_batches(store.scores(tmp_path / "keys.parquet", tmp_path))
    assert scores.column("row").to_pylist() == sorted(known - new)
    assert scores.column("teacher_score").to_pylist() == [float(n) for n in sorted(known - new)]


def test_a_runs_bytes_depend_on_its_labels_alone_and_a_source_is_added_once(tmp_path):
    labels_file(tmp_path / "up.parquet", list(range(500)))
    labels_file(tmp_path / "down.parquet", [*range(499, -1, -1), 7, 7])
    for name in ("up", "down"):
        assert LabelStore(tmp_path / name, "t").add(tmp_path / f"{name}.parquet", source="s") == 500
        assert LabelStore(tmp_path / name, "t").add(tmp_path / f"{name}.parquet", source="s") == 0
    assert files(tmp_path / "up") == files(tmp_path / "down")
    labels_file(tmp_path / "more.parquet", list(range(400, 600)), score=0.5)
    assert LabelStore(tmp_path / "up", "t").add(tmp_path / "more.parquet", source="r") == 100  # what is there stays


def test_a_damaged_run_is_named(tmp_path):
    labels_file(tmp_path / "a.parquet", list(range(10)))
    store = LabelStore(tmp_path / "store", "t")
    store.add(tmp_path / "a.parquet", source="s")
    path = tmp_path / "store/t/run-00000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])
    with pytest.raises(InputError, match=r"run-00000\.parquet: differs from its checksum"):
        store.check()
    path.unlink()
    with pytest.raises(InputError, match=r"run-00000\.json: the run cannot be read"):
        store.runs()


def test_no_corpus_is_labelled_out_of_a_damaged_run(tmp_path):
    """Seen: 26 of 5,000 labels were missing or another number's, and exit code 0."""
    write_rows(tmp_path / "a.parquet", corpus(64))
    write_rows(tmp_path / "b.parquet", corpus(72))
    with reranker("tei") as stub:
        assert run(stub, tmp_path / "a.parquet", tmp_path, "a") == 0
        (path,) = (tmp_path / "store").glob("*/run-00000.parquet")
        whole = path.read_bytes()
        path.write_bytes(whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])
        asked = stub.requests
        with pytest.raises(InputError, match=r"run-00000\.parquet: differs from its checksum"):
            run(stub, tmp_path / "b.parquet", tmp_path, "b")
        assert stub.requests == asked
        path.write_bytes(whole)
        assert run(stub, tmp_path / "b.parquet", tmp_path, "b") == 0


def test_a_join_that_the_disk_or_the_memory_ends_is_one_line(tmp_path, monkeypatch):
    """Seen: a traceback of DuckDB where its spill folder was full."""
    labels_file(tmp_path / "a.parquet", list(range(10)))
    monkeypatch.setattr(label_store, "DUCKDB", DuckDbSettings(duckdb_memory_gb=0.001))
    with pytest.raises(DataError, match="t: DuckDB: Out of Memory"):
        LabelStore(tmp_path / "store", "t").add(tmp_path / "a.parquet", source="s")


def test_a_new_run_takes_the_place_of_no_other(tmp_path):
    store = LabelStore(tmp_path / "store", "t")
    for number in range(4):
        labels_file(tmp_path / f"{number}.parquet", [number])
        store.add(tmp_path / f"{number}.parquet", source=str(number))
    for gone in ("run-00001.json", "run-00001.parquet", "run-00003.json"):
        (store.folder / gone).unlink()
    before = files(store.folder)
    labels_file(tmp_path / "more.parquet", [7])
    assert store.add(tmp_path / "more.parquet", source="more") == 1
    assert [run.file for run in store.runs()] == [f"run-0000{number}.parquet" for number in (0, 2, 4)]
    assert store.check() == 3 and files(store.folder).items() > before.items()


def test_a_folder_goes_on_with_the_store_it_was_begun_with(tmp_path):
    """Seen: with another store it ended at once, and called the texts that the first one had rejects of the teacher."""
    rows = corpus(200)
    write_rows(tmp_path / "a.parquet", rows[:160])
    write_rows(tmp_path / "b.parquet", rows)
    with reranker("tei") as stub:
        assert run(stub, tmp_path / "a.parquet", tmp_path, "a") == 0
        budget = {"budget": 2.0, "prices": Prices(per_1000_requests=1000.0), "in_flight": 1}
        with pytest.raises(InputError, match="the budget of 2 is spent"):
            run(stub, tmp_path / "b.parquet", tmp_path, "b", **budget)
        stub.answered.clear()
        with pytest.raises(InputError, match="lacks 160 labels that the store had when this folder was begun"):
            run(stub, tmp_path / "b.parquet", tmp_path, "b", store=tmp_path / "other")
        assert not stub.answered
        assert run(stub, tmp_path / "b.parquet", tmp_path, "b") == 0
        assert stub.answered.total() == 24
    assert read_labels(tmp_path / "b").column("teacher_score").to_pylist() == expected(rows)


def test_a_text_that_is_not_utf_8_is_a_reject_and_the_others_are_labelled(spoil_text, tmp_path):
    rows = corpus(64)
    write_rows(tmp_path / "a.parquet", rows)
    spoil_text(tmp_path / "a.parquet", "title", 9)
    with reranker("tei") as stub:
        assert run(stub, tmp_path / "a.parquet", tmp_path, "a") == 3
    (reject,) = pq.read_table(tmp_path / "a/rejects.parquet").to_pylist()
    assert (reject["row"], reject["cause"], reject["reason"]) == (10, "input", "title is not valid UTF-8")
    scores = read_labels(tmp_path / "a").column("teacher_score").to_pylist()
    assert scores == expected(rows[:9] + rows[10:])


def test_label_corpus_asks_a_triton_teacher_only_for_what_the_store_lacks(label, stub, write_candidates, tmp_path):
    flags = ("--url", stub.url, "--store", str(tmp_path / "store"), "--shard-rows", "100")
    whole, part = write_candidates(400), write_candidates(160)
    code, log = label.run(part, tmp_path / "a", *flags)
    assert code == 0 and "160 of 160 pairs are not in the store yet" in log
    code, log = label.run(whole, tmp_path / "b", *flags)
    assert code == 0 and "240 of 400 pairs are not in the store yet" in log
    code, _ = label.run(whole, tmp_path / "c", "--url", stub.url, "--shard-rows", "100")
    assert code == 0
    assert read_labels(tmp_path / "b").equals(read_labels(tmp_path / "c"))
