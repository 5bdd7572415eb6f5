"""Clicks on real text: the log gives back the bias it was made with, and nobody sees the withheld grades."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ranking.click_models import BAIDU_EXAMINATION
from ranking.schema import read_table
from tests.training.sources.test_own_data import QUERIES, beir, judged
from training import prepare_data
from training.clicks.click_pairs import ClickPairSettings, write_clicks
from training.clicks.privacy_gate import OPEN_GATE
from training.prepare_data import Config
from training.sources.simulated_clicks import click_model

FAST = {"judged_fraction": 0.2, "page_views": 3_000, "candidate_documents": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return beir(tmp_path_factory.mktemp("simulated") / "set", {"train": range(50), "test": range(50, 60)})


def simulate(folder: Path, out: Path, **settings) -> dict:
    prepare_data.main(Config(source=f"beir:{folder}", out=out, **{**FAST, **settings}))
    return json.loads((out / "dataset.json").read_text(encoding="utf-8"))["simulated_clicks"]


def pages(out: Path) -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {}
    for row in read_table(out / "events.parquet", "events").to_pylist():
        rows.setdefault(row["request_id"], []).append(row)
    return rows


def test_the_log_gives_back_baidus_bias_through_prepare_clicks(folder, tmp_path):
    content = simulate(folder, tmp_path, simulate_clicks="baidu", page_views=40_000, ranking_noise=1.0)
    settings = ClickPairSettings(
        events=str(tmp_path / "events.parquet"), out=tmp_path / "clicks.parquet", privacy=OPEN_GATE
    )
    report = write_clicks(settings)
    found = list(report["position_bias"]["propensities"].values())
    assert content["examination"][:5] == list(BAIDU_EXAMINATION[:5])
    np.testing.assert_allclose(found, BAIDU_EXAMINATION[: len(found)], rtol=0.15)
    assert report["clicks"] > 0 and report["excluded_queries"] == 0


def test_withheld_judgments_stand_in_no_split_and_only_they_are_clicked(folder, tmp_path):
    simulate(folder, tmp_path, simulate_clicks="baidu")
    splits = [read_table(tmp_path / f"judgments/{name}.parquet", "judgments") for name in ("train", "dev", "test")]
    kept = set(pa.concat_tables(splits).column("query_id").to_pylist())
    shown = set(read_table(tmp_path / "events.parquet", "events").column("query").to_pylist())
    withheld = {QUERIES[f"q{i}"] for i in range(50)} - {QUERIES[query_id] for query_id in kept}
    assert shown == withheld and len(withheld) == 36
    documents = {q: {d for query_id, d, _ in judged() if QUERIES[query_id] == q} for q in shown}
    assert all({row["doc_id"] for row in page} == documents[page[0]["query"]] for page in pages(tmp_path).values())


def test_a_page_shows_each_document_once_in_positions_from_one(folder, tmp_path):
    simulate(folder, tmp_path, simulate_clicks="inverse-rank", page_documents=3)
    for page in pages(tmp_path).values():
        assert [row["position"] for row in page] == [1, 2, 3]
        assert len({row["doc_id"] for row in page}) == 3
        assert len({(row["query"], row["user_id"], row["timestamp"]) for row in page}) == 1


def test_cascade_users_click_once_at_most(folder, tmp_path):
    simulate(folder, tmp_path, simulate_clicks="cascade")
    clicks = [sum(row["clicked"] for row in page) for page in pages(tmp_path).values()]
    assert max(clicks) == 1 and np.mean(clicks) > 0.5


def test_without_ranking_noise_the_page_is_bm25s(folder, tmp_path):
    simulate(folder, tmp_path, simulate_clicks="baidu", ranking_noise=0.0)
    orders: dict[str, set] = {}
    for page in pages(tmp_path).values():
        orders.setdefault(page[0]["query"], set()).add(tuple(row["doc_id"] for row in page))
        assert page[0]["title"].lower() == page[0]["query"]  # the one document with both words
    assert all(len(found) == 1 for found in orders.values())


def test_the_seed_decides_the_log(folder, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        simulate(folder, tmp_path / name, simulate_clicks="baidu", page_views=200, seed=seed)
    first, again, other = ((tmp_path / name / "events.parquet").read_bytes() for name in "abc")
    assert first == again != other


def test_clicks_follow_the_grade_with_noise():
    model = click_model("baidu", 0.1, highest_grade=2)
    np.testing.assert_allclose(model.attractiveness, [0.1, 0.1 + 0.9 / 3, 1, 1, 1])
    assert click_model("baidu", 0.0, highest_grade=1).attractiveness == (0, 1, 1, 1, 1)
    np.testing.assert_allclose(click_model("inverse-rank", 0.1, 4).propensities(4), [1, 1 / 2, 1 / 3, 1 / 4])


def test_clicks_need_withheld_queries(tmp_path):
    with pytest.raises(ValueError, match=r"--judged-fraction 0\.05 withholds 95%"):
        Config(source="beir:x", out=tmp_path, simulate_clicks="baidu")
    with pytest.raises(ValueError, match="give one"):
        Config(source="beir:x", out=tmp_path, simulate_clicks="baidu", judged_fraction=0.5, clicks_from_judgments=True)
    for settings in ({"click_noise": 1.0}, {"ranking_noise": -1.0}, {"page_documents": 0}, {"corpus_limit": -1}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Config(source="beir:x", out=tmp_path, **settings)
