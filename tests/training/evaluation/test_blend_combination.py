"""Several teachers' labels made one: ranks, stacking, the disagreement that is kept, and weights by it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from ranking.errors import InputError
from ranking.label_writer import write_labels
from ranking.labels import iter_labelled, read_labels
from ranking.schema import read_judgments, read_table, write_table
from ranking.text import StudentFormat
from tests.helpers.tiny_student import make_judged, make_student
from training.blend_labels import Config, blend_labels
from training.distill_student import StudentLossSettings
from training.evaluation.blend import BlendScorer
from training.evaluation.blend_combination import disagreement, rank_fractions, ridge_weights
from training.student.student_groups import confidence_weights, labelled_groups


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_judged(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teachers(data, tmp_path_factory):
    """Labels of two teachers: noisy views of one truth."""
    folder, draw = tmp_path_factory.mktemp("teachers"), np.random.default_rng(3)
    named = []
    for name, noise in (("sharp", 0.3), ("dull", 1.5)):
        rows = read_table(data / "candidates.parquet", "candidates")
        scores = (10 * (np.arange(len(rows)) % 3) + 10 * noise * draw.normal(size=len(rows))).astype(np.float32)
        write_labels(folder / name, data / "candidates.parquet", rows, scores, name, {})
        named.append(folder / name)
    return named


def blended(data, teachers, out, **changes):
    rankers = [f"labels:{folder}" for folder in teachers]
    return blend_labels(Config(data=data, out=out, ranker=rankers, precision="float32", **changes))


def test_a_rank_fraction_is_the_share_of_the_others_below_with_ties_in_the_middle():
    scores = np.array([3.0, 100.0, 1.0, 1.0, 7.0])
    groups = np.array([4, 9, 4, 4, 4])
    assert rank_fractions(scores, groups).tolist() == [2 / 3, 0.5, 0.5 / 3, 0.5 / 3, 1.0]


def test_ridge_weights_recover_a_linear_teacher_and_ignore_a_querys_level():
    draw = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 10)
    columns = draw.normal(size=(600, 3))
    grades = np.round(2 * columns[:, 0] - columns[:, 1] + 5 * draw.normal(size=60)[groups]).astype(int)
    weights = ridge_weights(columns, grades, groups)
    assert np.allclose(weights, [2, -1, 0], atol=0.1)
    shifted = columns + 100 * draw.normal(size=(60, 3))[groups]
    assert np.allclose(ridge_weights(shifted, grades, groups), weights, atol=1e-6)
    assert ridge_weights(columns, np.zeros(600, int), groups).tolist() == [1 / 3] * 3
    # seen: weights of 0, and labels that are all alike, where the rankers tell no judged document from its neighbours
    alike = np.repeat(columns[:30].astype(np.float32), 20, axis=0).astype(np.float64)
    assert ridge_weights(alike, grades, np.repeat(np.arange(30), 20)).tolist() == [1 / 3] * 3


def test_teachers_of_pure_noise_get_hardly_any_weight():
    largest = []
    for seed in range(20):
        draw = np.random.default_rng(seed)
        columns, grades = draw.normal(size=(240, 4)), draw.integers(0, 3, 240)
        largest.append(np.abs(ridge_weights(columns, grades, np.repeat(np.arange(30), 8))).max())
    assert np.median(largest) < 0.03  # plain least squares has 0.08


def test_the_disagreement_is_kept_beside_the_blended_score(data, teachers, tmp_path):
    blended(data, teachers, tmp_path / "both", weight=[1, 1])
    columns = []
    for folder in teachers:
        scores = read_labels(folder).column("teacher_score").to_numpy().astype(np.float64)
        columns.append((scores - scores.mean()) / scores.std())
    rows = pa.concat_tables(iter_labelled(data / "candidates.parquet", tmp_path / "both"))
    expected = np.abs(columns[0] - columns[1]) / 2
    assert np.allclose(rows.column("disagreement").to_numpy(), expected, atol=1e-5)
    assert np.allclose(rows.column("teacher_score").to_numpy(), (columns[0] + columns[1]) / 2, atol=1e-5)
    assert read_labels(tmp_path / "both").column_names == ["query_id", "doc_id", "teacher_score", "teacher_id"]
    assert disagreement(np.array([[1.0, 1.0], [0.0, 4.0]])).tolist() == [0.0, 2.0]


def test_ranks_are_added_up_and_judged_pairs_get_the_same_blend(data, teachers, tmp_path):
    blend = blended(data, teachers, tmp_path / "rank", combine="rank")
    weighted = blended(data, teachers, tmp_path / "weighted", weight=[1, 1])
    assert blend.teacher_id() != weighted.teacher_id()
    rows = read_table(data / "candidates.parquet", "candidates")
    groups = np.unique(rows.column("query_id").to_numpy(zero_copy_only=False), return_inverse=True)[1]
    ranks = [rank_fractions(read_labels(folder).column("teacher_score").to_numpy(), groups) for folder in teachers]
    labels = read_labels(tmp_path / "rank").column("teacher_score").to_numpy()
    assert np.allclose(labels, np.mean(ranks, axis=0), atol=1e-6)
    again = BlendScorer(data, blend.encoder, blend.max_tokens, blend.precision).blended(blend, rows)
    assert np.allclose(again, labels, atol=1e-6)


def test_ridge_needs_judgments_and_takes_no_given_weights(data, teachers, tmp_path):
    with pytest.raises(ValueError, match="finds the weights itself"):
        Config(data=data, out=tmp_path, ranker=["bm25", "bm25:title"], weight=[1, 1], combine="ridge")
    bare = tmp_path / "bare"
    (bare).mkdir()
    (bare / "candidates.parquet").write_bytes((data / "candidates.parquet").read_bytes())
    with pytest.raises(InputError, match="combine ridge needs"):
        blended(bare, teachers, tmp_path / "out", combine="ridge")


def test_a_label_counts_the_less_the_further_its_teachers_are_apart(data, tmp_path):
    rows = read_table(data / "candidates.parquet", "candidates")
    apart = np.where(np.arange(len(rows)) % 2, 3.0, 1.0).astype(np.float32)
    scores = np.arange(len(rows), dtype=np.float32)
    write_labels(tmp_path / "labels", data / "candidates.parquet", rows, scores, "t", {}, apart)
    weights = confidence_weights(data / "candidates.parquet", tmp_path / "labels")
    student = make_student(tmp_path / "student")
    groups = labelled_groups(data / "candidates.parquet", tmp_path / "labels", StudentFormat.of_checkpoint(student))
    near = (groups.targets.astype(int) % 2) == 0  # a document's score is its row's number
    assert weights.mean() == pytest.approx(1, abs=1e-6)
    ratio = (1 + (3 / apart.mean()) ** 2) / (1 + (1 / apart.mean()) ** 2)
    assert np.allclose(weights[near] / weights[~near][0], ratio, rtol=1e-5)
    assert np.ptp(weights[~near]) == 0


def test_labels_of_reworded_held_out_queries_teach_nothing_in_groups_and_weights_alike(data, tmp_path):
    """Whoever brings candidates of their own may have asked the teacher about dev and test queries."""
    rows = read_table(data / "candidates.parquet", "candidates")
    held_out = read_judgments(data / "judgments/dev.parquet").column("query")[0].as_py()
    words, mine = " ".join(reversed(held_out.split())), rows.column("query_id")[0].as_py()
    query_ids = rows.column("query_id").to_pylist()
    theirs = np.array([query_id == mine for query_id in query_ids])
    queries = pa.array(
        [words if query_id == mine else f"tents of maker {query_id}" for query_id in query_ids], pa.string()
    )
    rows = rows.set_column(rows.column_names.index("query"), rows.schema.field("query"), queries)
    write_table(tmp_path / "candidates.parquet", "candidates", rows)
    scores = np.arange(len(rows), dtype=np.float32)
    write_labels(tmp_path / "labels", tmp_path / "candidates.parquet", rows, scores, "t", {}, scores)
    text_format = StudentFormat.of_checkpoint(make_student(tmp_path / "student"))
    groups = labelled_groups(tmp_path / "candidates.parquet", tmp_path / "labels", text_format, data)
    assert sorted(groups.targets.astype(int)) == np.flatnonzero(~theirs).tolist() and mine not in groups.query_ids
    assert len(confidence_weights(tmp_path / "candidates.parquet", tmp_path / "labels", data)) == len(groups.targets)


def test_labels_of_one_teacher_cannot_be_weighted_nor_can_a_loss_of_ranks(data, teachers):
    with pytest.raises(InputError, match="no column disagreement"):
        confidence_weights(data / "candidates.parquet", teachers[0])
    with pytest.raises(ValueError, match="loss ranknet has none"):
        StudentLossSettings(loss="ranknet", confidence="disagreement")
