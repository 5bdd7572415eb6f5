"""The learning curve: points from score cards, the table's figures, the plot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ranking.card import ScoreCard
from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.schema import TABLES
from training.evaluation.comparison import Judgments, compare
from training.evaluation.learning_curve import CurvePoint, curve_points, curve_table, plot_curve


def card(folder: Path, role: str, judged_queries: int | None) -> Path:
    folder.mkdir(parents=True)
    limits = FieldLimits(8, 8, 8)
    ScoreCard(role, "f", 1, limits, "linear", "cls", judged_queries=judged_queries).save(folder)
    return folder


@pytest.fixture
def results():
    rng = np.random.default_rng(0)
    grades = rng.integers(0, 3, 200).astype(np.int8)
    columns = {name: [f"{name}{i}" for i in range(200)] for name in ("doc_id", "query", "title", "summary")}
    columns |= {"query_id": [f"q{i // 10}" for i in range(200)], "grade": grades}
    rows = pa.table({name: columns[name] for name in TABLES["judgments"].schema.names}, TABLES["judgments"].schema)
    noise = {"bm25": 3.0, "b-120": 0.5, "b-30": 2.0, "s-0": 0.7}
    scores = {name: grades + spread * rng.normal(size=200) for name, spread in noise.items()}
    return compare(scores, Judgments.of_table(rows), resamples=100, permutations=100)


def test_points_are_ordered_by_role_and_judged_queries(tmp_path):
    folders = {
        "b-120": card(tmp_path / "b120", "baseline", 120),
        "b-30": card(tmp_path / "b30", "baseline", 30),
        "s-0": card(tmp_path / "s0", "student", 0),
        "foreign": tmp_path,
    }
    assert curve_points(folders) == [
        CurvePoint("b-30", "baseline", 30),
        CurvePoint("b-120", "baseline", 120),
        CurvePoint("s-0", "student", 0),
    ]


def test_the_table_has_every_point_with_its_interval_and_other_systems_last(results, tmp_path):
    points = [CurvePoint("b-30", "baseline", 30), CurvePoint("b-120", "baseline", 120), CurvePoint("s-0", "student", 0)]
    lines = curve_table(points, results).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["baseline", "baseline", "student", "bm25"]
    low, high = results["b-120"].intervals["pnr"]
    assert f"{results['b-120'].values['ndcg@5']:.4f} [" in lines[3] and f"[{low:.2f}, {high:.2f}]" in lines[3]
    pytest.importorskip("matplotlib")
    plot_curve(points, results, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_card_that_does_not_count_its_judged_queries_is_named(tmp_path):
    folders = {"old": card(tmp_path / "old", "baseline", None), "new": card(tmp_path / "new", "baseline", 3)}
    with pytest.raises(InputError, match=r"old: its card does not say"):
        curve_points(folders)


def test_one_point_is_no_curve(tmp_path):
    with pytest.raises(InputError, match="two checkpoints at least"):
        curve_points({"b": card(tmp_path / "b", "baseline", 3)})
