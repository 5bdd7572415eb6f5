"""Sampling candidates to label from a larger pool."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ranking import query_engine
from ranking.errors import DataError, InputError
from ranking.schema import TABLES, read_table, write_table
from tests.helpers.tiny_student import make_student
from training import sample_candidates as program
from training.sample_candidates import Config, sample_candidates
from training.sources import pair_strategies
from training.sources.pair_strategies import (
    draw_from_bands,
    k_centres,
    lexical_vectors,
    misplacement,
    read_bands,
    spread_out,
)
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


def test_a_pool_is_not_written_over(tmp_path):
    sample(tmp_path, POOL)
    (tmp_path / "link.parquet").symlink_to(tmp_path / "pool.parquet")
    with pytest.raises(InputError, match=r"link\.parquet: is what is to be read"):
        sample_candidates(Config(pool=str(tmp_path / "*.parquet"), out=tmp_path / "link.parquet"))


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


@pytest.mark.parametrize("name", ["exclude", "labelled"])
def test_queries_to_leave_out_are_text(tmp_path, name):
    """Seen: a null query and a column of numbers ended in stack traces."""
    path = tmp_path / "judged.parquet"
    pq.write_table(pa.table({"query": [None, "word1"]}), path)
    assert sample(tmp_path, POOL, **{name: [path]})[1]["pool_queries"] == 4
    for column, said in (("query", "query is int64, string is needed"), ("text", "no column query; there are text")):
        pq.write_table(pa.table({column: [1, 2]}), path)
        with pytest.raises(DataError, match=said):
            sample(tmp_path, POOL, **{name: [path]})


def test_reworded_test_queries_are_never_drawn(tmp_path):
    """Seen: "hiking boot" was labelled and learnt from beside the test query "Hiking boots"."""
    queries = ("hiking boot", "boots, hiking", "hikingboots", "hiking boost", "rain jacket", "rain jackets", "tent")
    pool = [pair(f"q{q}", f"d{d}", query, f"{query} {d}") for q, query in enumerate(queries) for d in range(3)]
    pq.write_table(pa.table({"query": ["Hiking boots"]}), tmp_path / "test.parquet")
    found, report = sample(tmp_path, pool, exclude=[tmp_path / "test.parquet"])
    assert {row["query"] for row in found} == {"rain jacket", "rain jackets", "tent"}
    assert (report["excluded_queries"], report["pool_queries"]) == (4, 3)
    # those of the dataset folder that the candidates are for need not be named
    (tmp_path / "judgments").mkdir()
    pq.write_table(pa.table({"query": ["jackets for rain", "Rain jackets"]}), tmp_path / "judgments/dev.parquet")
    found, _ = sample(tmp_path, pool, exclude=[tmp_path / "test.parquet"])
    assert {row["query"] for row in found} == {"tent"}
    found, _ = sample(tmp_path, pool, exclude_held_out=False)
    assert {row["query"] for row in found} == set(queries)


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


# Strategies that look at scores or texts.


def scored_sample(tmp_path, rows: list[dict], scores: dict[str, list[float]], **settings):
    """sample() of a pool that has score columns."""
    columns = {name: pa.array(values, pa.float64()) for name, values in scores.items()}
    table = pa.Table.from_pylist(rows, TABLES["candidates"].schema)
    for name, values in columns.items():
        table = table.append_column(name, values)
    pq.write_table(table, tmp_path / "pool.parquet")
    report = sample_candidates(Config(pool=str(tmp_path / "pool.parquet"), out=tmp_path / "out.parquet", **settings))
    return read_table(tmp_path / "out.parquet", "candidates").to_pylist(), report


def test_random_takes_any_documents_of_as_many_queries(tmp_path):
    _, report = sample(tmp_path, POOL, strategy="random", documents=3, queries=4)
    assert (report["queries"], report["pairs"]) == (4, 12)
    drawn = [sample(tmp_path, POOL, strategy="random", documents=3, seed=seed)[0] for seed in range(20)]
    ranks = [int(row["doc_id"][1:]) for rows in drawn for row in rows]
    assert abs(np.mean(ranks) - 14.5) < 3 * 8.7 / len(ranks) ** 0.5  # uniform over ranks 0 to 29


def test_disagreement_draws_the_queries_and_documents_on_which_two_rankers_differ_at_the_top(tmp_path):
    first = [float(-d) for q in range(5) for d in range(30)]
    # of query 3 the other ranker swaps the first and the twentieth document; it shifts the scale of all others
    second = [score * 7 + 100 for score in first]
    second[3 * 30], second[3 * 30 + 20] = second[3 * 30 + 20], second[3 * 30]
    settings = {"strategy": "disagreement", "ranker": ["column:one", "column:two"], "queries": 1, "documents": 2}
    rows, report = scored_sample(
        tmp_path, POOL, {"one": first, "two": second}, **settings, oversample=5, usefulness_power=4
    )
    assert [(row["query_id"], row["doc_id"]) for row in rows] == [("q3", "d00"), ("q3", "d20")]
    assert report["queries"] == 1
    assert report["usefulness"]["drawn"] > 0.5 > report["usefulness"]["pool"]


def test_uncertainty_draws_documents_around_the_cut_below_the_first_places(tmp_path):
    # the first three stand apart from the fourth by little in query 2, by much elsewhere
    def scores(q: int) -> list[float]:
        return [3.0, 2.9, 0.1 if q == 2 else 2.8, *([-0.1 if q == 2 else -3.0] + [-3.0 - d / 100 for d in range(26)])]

    column = [score for q in range(5) for score in scores(q)]
    settings = {"strategy": "uncertainty", "ranker": ["column:s"], "top": 3, "queries": 1, "documents": 2}
    rows, _ = scored_sample(tmp_path, POOL, {"s": column}, **settings, oversample=5, usefulness_power=60)
    assert [(row["query_id"], row["doc_id"]) for row in rows] == [("q2", "d02"), ("q2", "d03")]


def test_diversity_leaves_near_copies_and_labelled_queries_aside(tmp_path):
    texts = ["blue tent", "blue tent tent", "oak table", "jazz record", "jazz record record"]
    rows = [
        pair(f"q{q}", f"d{d}", text, f"thing{d // 4} item{d // 4} {d}")
        for q, text in enumerate(texts)
        for d in range(8)
    ]
    found, _ = sample(tmp_path, rows, strategy="diversity", queries=3, documents=2)
    assert {row["query"].split()[0] for row in found} == {"blue", "oak", "jazz"}
    for q in {row["query_id"] for row in found}:  # of two kinds of document, one each
        assert {int(row["doc_id"][1:]) // 4 for row in found if row["query_id"] == q} == {0, 1}
    before = tmp_path / "before.parquet"
    write_table(before, "candidates", pa.Table.from_pylist([rows[0], rows[24]], TABLES["candidates"].schema))
    found, report = sample(tmp_path, rows, strategy="diversity", queries=1, documents=2, labelled=[before])
    assert {row["query"] for row in found} == {"oak table"}
    assert report["pool_queries"] == 3


@pytest.mark.parametrize("strategy", ["random", "disagreement", "uncertainty", "diversity"])
def test_a_strategy_gives_the_same_pairs_again_whatever_the_pieces(tmp_path, monkeypatch, strategy):
    rankers = {"disagreement": ["column:a", "column:b"], "uncertainty": ["column:a"]}.get(strategy, [])
    drawn = np.random.default_rng(5).normal(size=(2, len(POOL)))
    settings = {"strategy": strategy, "ranker": rankers, "queries": 3, "documents": 4, "oversample": 1.5}
    whole, _ = scored_sample(tmp_path, POOL, {"a": drawn[0], "b": drawn[1]}, **settings)
    backwards, _ = scored_sample(tmp_path, POOL[::-1], {"a": drawn[0][::-1], "b": drawn[1][::-1]}, **settings)
    monkeypatch.setattr(program, "ROWS_AT_ONCE", 40)
    for module in (program, query_engine):
        monkeypatch.setattr(module, "BATCH_ROWS", 23)
    pieces, _ = scored_sample(tmp_path, POOL, {"a": drawn[0], "b": drawn[1]}, **settings)
    other, _ = scored_sample(tmp_path, POOL, {"a": drawn[0], "b": drawn[1]}, **settings, seed=2)
    assert len(whole) == 12
    assert pieces == whole == backwards
    assert other != whole


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy": "disagreement", "ranker": ["bm25"]}, "disagreement compares rankers: give two"),
        ({"strategy": "uncertainty"}, "uncertainty reads scores"),
        ({"strategy": "random", "ranker": ["bm25"]}, "random reads no scores"),
        ({"strategy": "random", "bands": ["10:2"]}, "of the strategy bands"),
        ({"documents": 3}, "bands say how many"),
        ({"strategy": "random", "vectors": "minilm"}, "of the strategy diversity"),
        ({"strategy": "diversity", "oversample": 0.5}, "oversample"),
        ({"seed": -1}, "seed is -1: 0 or more is needed"),
    ],
)
def test_what_a_strategy_lacks_or_does_not_read_is_said(settings, said):
    with pytest.raises(ValueError, match=said):
        Config(pool="pool", out=Path("out"), **settings)


def test_a_ranker_that_the_pool_does_not_have_is_said(tmp_path):
    settings = {"strategy": "disagreement", "documents": 3}
    with pytest.raises(DataError, match=r"no column .*bert"):
        sample(tmp_path, POOL, ranker=["bm25", "column:bert"], **settings)
    with pytest.raises(InputError, match="bert: bm25, column:NAME or checkpoint:PATH"):
        sample(tmp_path, POOL, ranker=["bm25", "bert"], **settings)
    with pytest.raises(DataError, match=r"row 4.*score_bert is NaN"):
        scores = np.ones(len(POOL))
        scores[3] = np.nan
        scored_sample(tmp_path, POOL, {"bert": scores}, ranker=["bm25", "column:bert"], **settings)


def test_misplacement_follows_margins_of_one_ranker_and_deviation_of_several():
    one = misplacement(np.array([[4.0], [2.1], [1.9], [-4.0]]), top=2)
    assert one[1] == pytest.approx(one[2], abs=1e-9)
    assert one[1] > 0.45 > one[0]
    # both rankers put the second and third on the cut's two sides by as much; they differ on the first alone
    two = misplacement(np.array([[4.0, 2.2], [2.1, 2.1], [1.9, 1.9], [-4.0, -4.0]]), top=2)
    assert two[0] > two[3]
    assert misplacement(np.array([[1.0]]), top=5).tolist() == [0.5]


def test_centres_are_far_from_each_other_and_from_what_is_covered():
    angles = np.array([0.0, 0.01, 1.5, 1.51, 3.0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert k_centres(vectors, 3, first=0).tolist() == [0, 4, 2]
    assert k_centres(vectors, 2, covered=vectors[[1, 4]]).tolist()[0] in (2, 3)
    assert sorted(k_centres(vectors, 9).tolist()) == [0, 1, 2, 3, 4]


def test_many_queries_are_spread_block_by_block(monkeypatch):
    monkeypatch.setattr(pair_strategies, "BLOCK_QUERIES", 10)
    vectors = lexical_vectors([f"word{n} thing" for n in range(95)])
    chosen = spread_out(vectors, 33, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == 33
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)


def test_checkpoints_rank_and_embed_the_pool(tmp_path):
    student = str(make_student(tmp_path / "bert"))
    settings = {"queries": 2, "documents": 4}
    by_student = {"strategy": "uncertainty", "ranker": [f"checkpoint:{student}"]}
    for strategy in (by_student, {"strategy": "diversity", "vectors": student}):
        rows, report = sample(tmp_path, POOL, **strategy, **settings)
        assert (len(rows), report["queries"]) == (8, 2)
    with pytest.raises(InputError, match="none: no such folder"):
        sample(tmp_path, POOL, strategy="uncertainty", ranker=[f"checkpoint:{tmp_path}/none"], **settings)
