"""The teacher without judgments: similarity, weights, the labels folder, and the same blend on judged pairs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ranking.errors import InputError
from ranking.labels import LabelSet, iter_labelled, read_labels
from ranking.schema import read_table, write_table
from tests.helpers.tiny_student import make_judged, make_student
from training.blend_labels import Config, blend_labels
from training.evaluate import Config as EvaluateConfig
from training.evaluate import main as evaluate
from training.evaluation import blend_weights
from training.evaluation.blend import Blend, BlendScorer
from training.evaluation.blend_weights import MAX_PAIRS, PULLS, _judged_margins, choose_pull, fit_weights
from training.evaluation.sentence_similarity import SentenceEncoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return make_student(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_judged(tmp_path_factory.mktemp("data"))


def settings(data: Path, encoder: Path, out: Path, **more) -> Config:
    return Config(data=data, out=out, encoder=str(encoder), precision="float32", **more)


def test_a_text_is_most_similar_to_itself_whatever_batch_it_stands_in(encoder):
    texts = ["red king", "a story of a fast ship at night " * 4, "", "blue"]
    model = SentenceEncoder.load(str(encoder), max_tokens=16)
    vectors = model.embed(texts)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (np.argmax(vectors @ vectors.T, axis=1) == np.arange(4)).all()
    alone = np.concatenate([model.embed([text], batch_tokens=1) for text in texts])
    assert np.allclose(alone, vectors, atol=1e-5)
    pairs = model.similarity(["red king", "blue", "red king"], ["blue", "blue", "red king"])
    assert np.allclose(pairs, [vectors[0] @ vectors[3], 1, 1], atol=1e-5)


def test_a_vector_is_the_mean_of_the_token_states(encoder):
    model = SentenceEncoder.load(str(encoder))
    ids = torch.tensor([model.tokenizer("red king")["input_ids"]])
    with torch.inference_mode():
        mean = model.model(input_ids=ids).last_hidden_state[0].mean(0)
    assert np.allclose(model.embed(["red king"])[0], (mean / mean.norm()).numpy(), atol=1e-5)


def test_weights_follow_the_ranker_that_orders_and_stay_equal_without_evidence():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), 6)
    grades = rng.integers(0, 3, len(groups))
    good, noise = grades + 1.5 * rng.normal(size=len(groups)), rng.normal(size=len(groups))
    weights = fit_weights(np.stack([good, noise], axis=1), grades, groups)
    assert weights.sum() == pytest.approx(1) and weights[0] > 0.85
    few = groups < 2
    pulled = fit_weights(np.stack([good, noise], axis=1)[few], grades[few], groups[few], pull=1.0)
    assert 0.5 < pulled[0] < 0.6
    assert fit_weights(np.stack([good, noise], axis=1), np.ones_like(grades), groups).tolist() == [0.5, 0.5]


def test_cross_validation_chooses_how_far_weights_stay_equal():
    """Equal views of one truth want a strong pull; one good ranker among useless ones wants none, with few queries."""
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(30), 8)
    grades = rng.integers(0, 3, len(groups))
    alike = grades[:, None] + 2.0 * rng.normal(size=(len(groups), 4))
    useless = np.column_stack([grades + 0.7 * rng.normal(size=len(groups)), rng.normal(size=(len(groups), 3))])
    assert choose_pull(alike, grades, groups) > choose_pull(useless, grades, groups)
    assert fit_weights(useless, grades, groups)[0] > fit_weights(useless, grades, groups, pull=1.0)[0] + 0.03
    one = groups == 0
    assert choose_pull(useless[one], grades[one], groups[one]) == PULLS[-1]


def test_the_labels_are_a_finished_folder_whose_blend_can_be_scored_again(data, encoder, tmp_path):
    blend = blend_labels(settings(data, encoder, tmp_path / "labels"))
    labels = LabelSet.load(tmp_path / "labels")
    candidates = read_table(data / "candidates.parquet", "candidates")
    assert (labels.labels, labels.rejects, labels.teacher_id) == (len(candidates), 0, blend.teacher_id())
    joined = pa.concat_tables(iter_labelled(data / "candidates.parquet", tmp_path / "labels"))
    assert joined.column("doc_id").to_pylist() == candidates.column("doc_id").to_pylist()
    kept = Blend.of_labels(tmp_path / "labels")
    assert kept == blend and sum(ranker.weight for ranker in kept.rankers) == pytest.approx(1)
    some = candidates.slice(17, 5)
    again = BlendScorer(data, kept.encoder, kept.max_tokens, kept.precision).blended(kept, some)
    assert np.allclose(again, joined.column("teacher_score").to_numpy()[17:22], atol=1e-4)
    path = tmp_path / "labels/manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for damage in ({"of_a_later_release": 1}, {"rankers": [{}]}):
        path.write_text(json.dumps(manifest | {"blend": manifest["blend"] | damage}), encoding="utf-8")
        with pytest.raises(InputError, match="labels: its blend is not one of this release"):
            Blend.of_labels(tmp_path / "labels")


def test_the_teacher_id_covers_what_moves_a_score(data, encoder, tmp_path):
    blend = blend_labels(settings(data, encoder, tmp_path / "a", weight=[1, 1, 1, 1]))
    assert blend_labels(settings(data, encoder, tmp_path / "b", weight=[1, 1, 1, 1])).teacher_id() == blend.teacher_id()
    other = make_student(tmp_path / "other", seed=1)
    assert blend_labels(settings(data, other, tmp_path / "c", weight=[1, 1, 1, 1])).teacher_id() != blend.teacher_id()
    for change in ({"max_tokens": 8}, {"corpus": "x"}, {"precision": "bfloat16"}):
        assert dataclasses.replace(blend, **change).teacher_id() != blend.teacher_id()
    assert blend_labels(settings(data, encoder, tmp_path / "d", weight=[2, 1, 1, 1])).teacher_id() != blend.teacher_id()


def test_a_checkpoint_and_labels_are_rankers_of_the_blend(data, encoder, tmp_path):
    student = make_student(tmp_path / "student")
    first = settings(data, encoder, tmp_path / "first", ranker=["bm25"])
    blend_labels(first)
    both = ["bm25", f"checkpoint:{student}", f"labels:{tmp_path / 'first'}"]
    blend = blend_labels(settings(data, encoder, tmp_path / "both", ranker=both, weight=[1, 0, 1]))
    scores = [read_labels(tmp_path / name).column("teacher_score").to_numpy() for name in ("first", "both")]
    assert np.allclose(*scores, atol=1e-5)  # both rankers with a weight are BM25
    assert [ranker.weight for ranker in blend.rankers] == [0.5, 0.0, 0.5]


def test_without_judgments_the_weights_are_equal(data, encoder, tmp_path, caplog):
    bare = tmp_path / "bare"
    bare.mkdir()
    write_table(bare / "candidates.parquet", "candidates", read_table(data / "candidates.parquet", "candidates"))
    with caplog.at_level("INFO"):
        blend = blend_labels(settings(bare, encoder, tmp_path / "labels"))
    assert {ranker.weight for ranker in blend.rankers} == {0.25}
    assert "equal weights: no judgments in" in caplog.text


def test_evaluate_scores_judged_pairs_with_the_blend(data, encoder, tmp_path):
    blend_labels(settings(data, encoder, tmp_path / "labels"))
    systems = ["bm25", f"teacher=blend:{tmp_path / 'labels'}"]
    evaluate(
        EvaluateConfig(data=data, split="dev", system=systems, out=tmp_path / "out", resamples=50, permutations=50)
    )
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["teacher"] == "teacher" and set(found["systems"]) == {"bm25", "teacher"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ranker": ["bm26"]}, "--ranker bm26"),
        ({"ranker": ["checkpoint:nowhere"]}, "nowhere"),
        ({"encoder": "/nowhere"}, "/nowhere: no such folder"),
    ],
)
def test_a_ranker_that_is_none_is_named(data, encoder, tmp_path, monkeypatch, change, words):
    # a name that is no folder is looked for on the hub, which without a network is tried again for most of a minute
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=words):
        blend_labels(dataclasses.replace(settings(data, encoder, tmp_path / "labels"), **change))


def test_a_query_of_thousands_of_documents_is_fitted_on_a_sample_of_its_pairs(monkeypatch):
    """Seen: one dev query of 10,000 judged documents took three minutes and 2.4 GB; all of its pairs were formed."""
    rng = np.random.default_rng(2)
    groups = np.repeat([0, 1, 2], [2000, 8, 8])
    grades = np.concatenate([rng.choice(5, 2000, p=[0.9, 0.04, 0.03, 0.02, 0.01]), np.tile([0, 1, 2, 3], 4)])
    scores = np.stack([grades + 2.0 * rng.normal(size=len(groups)), rng.normal(size=len(groups))], axis=1)
    margins, weights = _judged_margins(scores, grades, groups)
    assert len(margins) <= MAX_PAIRS + 2 * 64 and weights.sum() == pytest.approx(3)
    monkeypatch.setattr(blend_weights, "MAX_PAIRS", 10**9)
    all_margins, all_weights = _judged_margins(scores, grades, groups)
    assert len(all_margins) > 30 * len(margins)
    np.testing.assert_allclose(weights @ margins, all_weights @ all_margins, atol=0.15)
    np.testing.assert_allclose(weights @ margins**2, all_weights @ all_margins**2, rtol=0.05)


def test_a_changed_dataset_or_an_existing_folder_is_refused(data, encoder, tmp_path, monkeypatch):
    blend = blend_labels(settings(data, encoder, tmp_path / "labels", ranker=["bm25"]))
    other = make_judged(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="not the documents that the blend was made on"):
        BlendScorer(other, blend.encoder, blend.max_tokens, blend.precision).blended(
            blend, read_table(other / "candidates.parquet", "candidates")
        )
    # seen: said after all candidates had been scored
    monkeypatch.setattr(BlendScorer, "scores", None)
    with pytest.raises(InputError, match="is there already"):
        blend_labels(settings(data, encoder, tmp_path / "labels", ranker=["bm25"]))


def test_a_collection_without_titles_is_labelled_by_the_other_rankers(data, encoder, tmp_path, caplog):
    bare = tmp_path / "bare"
    rows = read_table(data / "candidates.parquet", "candidates")
    place = rows.column_names.index("title")
    write_table(bare / "candidates.parquet", "candidates", rows.set_column(place, "title", pa.array([""] * len(rows))))
    with caplog.at_level("INFO"):
        blend = blend_labels(settings(bare, encoder, tmp_path / "labels"))
    assert "bm25:title is left out" in caplog.text
    assert "bm25:title" not in [ranker.source for ranker in blend.rankers]
    with pytest.raises(InputError, match=r"scores all candidates of .* alike"):
        blend_labels(settings(bare, encoder, tmp_path / "given", ranker=["bm25:title", "bm25"], weight=[1, 1]))
