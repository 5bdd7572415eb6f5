"""The end of a demo run: the figures that it computes itself."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from demo.summary import student_lead


def scores(folder, student, queries=40):
    """Ten documents a query with one relevant one, which the baseline puts at a random place."""
    rng = np.random.default_rng(3)
    grades = np.tile([3, *[0] * 9], queries)
    baseline = rng.random(len(grades))
    columns = {
        "query_id": np.repeat([f"q{n}" for n in range(queries)], 10), "grade": grades.astype(np.int8),
        "baseline": baseline, "student": student(grades, baseline),
    }  # fmt: skip
    (folder / "evaluation").mkdir()
    pq.write_table(pa.table(columns), folder / "evaluation" / "scores.parquet")


def test_a_perfect_student_leads_by_what_the_baseline_lacks(tmp_path):
    scores(tmp_path, lambda grades, baseline: grades.astype(float))
    found = student_lead(tmp_path)
    assert found["queries"] == 40 and found["p"] < 0.001
    assert 0.3 < found["low"] < found["lead"] < found["high"] < 1


def test_equal_rankings_have_no_lead(tmp_path):
    scores(tmp_path, lambda grades, baseline: 2 * baseline + 1)
    assert student_lead(tmp_path) == {"lead": 0, "low": 0, "high": 0, "p": pytest.approx(1), "queries": 40}
