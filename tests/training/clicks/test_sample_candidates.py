"""Sampling candidates to label from a larger pool."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ranking import query_engine
from ranking.errors import DataError
from ranking.schema import TABLES, read_table, write_table
from training import sample_candidates as program
from training.sample_candidates import Config, draw_from_bands, read_bands, sample_candidates
from training.world.dataset import WorldConfig, write_world


def pair(query_id: str, doc_id: str, query: str, title: str, summary: str = "") -> dict:
    return {"query_id": query_id, "doc_id": doc_id, "query": query, "title": title, "summary": summary}


def sample(tmp_path, rows: list[dict], **settings) -> tuple[list[dict], dict]:
    write_table(tmp_path / "pool.parquet", "candidates", pa.Table.from_pylist(rows, TABLES["candidates"].schema))
    report = sample_candidates(Config(pool=str(tmp_path / "pool.parquet"), out=tmp_path / "out.parquet", **settings))
    assert json.loads((tmp_path / "out.report.json").read_text()) == report
    return read_table(tmp_path / "out.parquet", "candidates").to_pylist(), report


POOL = [
    pair(f"q{q}", f"d{d:02d}", f"word{q}", f"word{q} " * max(0, 30 - d) + f"filler {q} {d}")
    for q in range(5)
    for d in range(30)
]


def test_each_rank_band_gives_its_share(tmp_path):
    rows, report = sample(tmp_path, POOL, bands=["3:2", "10:3", "rest:4"])
    assert (report["queries"], report["pairs"], report["duplicates"]) == (5, 45, 0)
    for q in range(5):
        ranks = sorted(int(row["doc_id"][1:]) for row in rows if row["query_id"] == f"q{q}")  # d00 is BM25's best
        assert [sum(low <= rank < high for rank in ranks) for low, high in ((0, 3), (3, 10), (10, 30))] == [2, 3, 4]


def test_the_seed_decides_and_the_order_of_the_pool_does_not(tmp_path):
    settings = {"queries": 3, "bands": ["rest:5"]}
    first, _ = sample(tmp_path, POOL, **settings)
    again, _ = sample(tmp_path, POOL[::-1], **settings)
    other, _ = sample(tmp_path, POOL, **settings, seed=2)
    assert again == first
    assert other != first


def test_small_pieces_of_the_pool_give_the_same_queries(tmp_path, monkeypatch):
    whole, _ = sample(tmp_path, POOL, bands=["3:3", "10:2"])
    monkeypatch.setattr(program, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(query_engine, "BATCH_ROWS", 11)
    pieces, _ = sample(tmp_path, POOL, bands=["3:3", "10:2"])
    assert pieces == whole


def test_spellings_of_a_query_and_documents_of_one_text_count_once(tmp_path):
    rows = [
        pair("q2", "d1", "Red  Tent", "a tent"),
        pair("q1", "d1", "red tent", "a tent"),
        pair("q1", "d2", "red tent", "a tent"),
        pair("q2", "d3", "RED TENT", "another tent"),
    ]
    found, report = sample(tmp_path, rows)
    assert [(row["query_id"], row["query"], row["doc_id"]) for row in found] == [
        ("q1", "red tent", "d1"),
        ("q1", "red tent", "d3"),
    ]
    assert (report["pool_pairs"], report["duplicates"]) == (4, 2)


def test_excluded_queries_are_never_drawn_whatever_their_spelling(tmp_path):
    judged = pa.table({"query": ["  WORD1", "word3"]})
    pq.write_table(judged, tmp_path / "test.parquet")
    found, report = sample(tmp_path, POOL, exclude=[tmp_path / "test.parquet"])
    assert {row["query"] for row in found} == {"word0", "word2", "word4"}
    assert report["pool_queries"] == 3


def test_queries_are_drawn_by_their_tempered_frequency(tmp_path):
    rows = [pair(f"q{q}", "d1", f"word{q}", "title") for q in range(400)]
    stamp = np.datetime64("2026-01-05", "us").astype(object)
    # the first hundred queries are asked 16 times, the others once; two results a page must not count twice
    pages = [f"word{q}" for q in range(400) for _ in range(16 if q < 100 else 1)]
    log = [
        {
            "request_id": f"r{number}",
            "doc_id": f"d{d}",
            "user_id": "u",
            "timestamp": stamp,
            "query": query,
            "title": "t",
        }
        | {"summary": "s", "position": d + 1, "clicked": False, "dwell_seconds": 0.0, "arm": "logged"}
        for number, query in enumerate(pages)
        for d in range(2)
    ]
    pq.write_table(pa.Table.from_pylist(log, TABLES["events"].schema), tmp_path / "events.parquet")
    shares = {}
    for power in (0.0, 0.5, 1.0):
        settings = {"events": str(tmp_path / "events.parquet"), "queries": 40, "frequency_power": power}
        drawn, _ = sample(tmp_path, rows, **settings)
        shares[power] = np.mean([int(row["query"][4:]) < 100 for row in drawn])
    # expected of a first draw: 100/400, 400/700 and 1600/1900
    assert shares[0.0] < 0.42 < shares[0.5] < 0.74 < shares[1.0]


@pytest.mark.parametrize("n", [0, 1, 4, 9, 100])
def test_a_short_pool_gives_what_it_has_and_a_long_one_the_full_count(n):
    picked = draw_from_bands(np.arange(n, dtype=float), [(2, 2), (5, 2), (float("inf"), 3)], np.random.default_rng(0))
    assert len(picked) == len(set(picked.tolist())) == min(n, 7)
    assert picked.tolist() == sorted(picked.tolist(), reverse=True)  # best first


def test_what_a_band_lacks_comes_from_other_ranks():
    picked = draw_from_bands(-np.arange(30, dtype=float), [(2, 5), (10, 3)], np.random.default_rng(0))
    assert len(picked) == 8
    assert {0, 1} <= set(picked.tolist())


@pytest.mark.parametrize("bands", [["ten:3"], ["10"], ["10:2", "5:2"], ["rest:2", "20:1"], ["10:0"], ["10:-1"]])
def test_senseless_bands_are_refused(bands):
    with pytest.raises(ValueError, match="bands"):
        Config(pool="pool", out=Path("out"), bands=bands)
    assert read_bands(["10:8", "rest:4"]) == [(10, 8), (float("inf"), 4)]


def test_a_pool_whose_queries_are_all_excluded_is_refused(tmp_path):
    pq.write_table(pa.table({"query": [f"word{q}" for q in range(5)]}), tmp_path / "test.parquet")
    with pytest.raises(DataError, match="no query is left"):
        sample(tmp_path, POOL, exclude=[tmp_path / "test.parquet"])


def test_it_samples_a_world_with_its_log(tmp_path):
    write_world(WorldConfig.small(), tmp_path)
    config = Config(
        pool=str(tmp_path / "candidates.parquet"),
        out=tmp_path / "sample.parquet",
        events=str(tmp_path / "events.parquet"),
    )
    config.queries, config.bands = 20, ["5:3", "rest:2"]
    report = sample_candidates(config)
    assert (report["queries"], report["pairs"]) == (20, 100)
    assert set(Counter(read_table(config.out, "candidates")["query_id"].to_pylist()).values()) == {5}
