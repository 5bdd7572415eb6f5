"""The gate's arithmetic on scores made by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from build.gate import GateLimits, Reference, gate_scores

QUERIES = ["first", "second", "third"]
GROUPS = np.repeat([0, 1, 2], 6)
GRADES = np.tile([0, 1, 2, 0, 0, 1], 3)
REFERENCE = np.random.default_rng(3).normal(size=18).astype(np.float32)


def gate(scores: np.ndarray, precision: str = "bf16", **limits):
    return gate_scores(Reference(REFERENCE, GRADES, GROUPS, QUERIES), scores, precision, GateLimits(**limits))


def test_the_same_scores_pass():
    report = gate(REFERENCE.copy())
    assert report.passed and report.tau == 1 and report.max_error == 0 and report.ndcg5 == report.ndcg5_reference


def test_nan_fails_and_is_counted():
    scores = REFERENCE.copy()
    scores[[7, 8]] = np.nan
    report = gate(scores)
    assert not report.passed and report.not_finite == 2 and report.worst_query == "second"
    assert "2 scores are not finite" in report.objections[0]
    kept = json.loads(json.dumps(report.as_json(), allow_nan=False))  # as a manifest is written
    assert kept["max_error"] is None and kept["mean_error"] is None and kept["tau"] == report.tau


def test_errors_are_in_units_of_the_reference_spread():
    scores = REFERENCE.copy()
    scores[0] += 0.25 * REFERENCE.std()
    report = gate(scores, max_error=0.2, mean_error=1)
    assert report.max_error == pytest.approx(0.25, rel=1e-3)
    assert report.mean_error == pytest.approx(0.25 / 18, rel=1e-3)
    assert any(objection.startswith("max error 0.25") for objection in report.objections)


def test_a_reversed_query_is_named_with_what_to_build_instead():
    scores = REFERENCE.copy()
    scores[GROUPS == 2] *= -1
    report = gate(scores, "int8")
    assert report.tau == pytest.approx((1 + 1 - 1) / 3)
    assert "'third' (tau -1.000)" in report.advice() and "--precision auto" in report.advice()
    assert any("Kendall tau" in objection for objection in report.objections)


def test_a_shift_of_all_scores_moves_no_order_but_fails_on_error():
    report = gate(REFERENCE + np.float32(REFERENCE.std()))
    assert report.tau == 1 and report.ndcg5 == report.ndcg5_reference
    assert [o.split()[0] for o in report.objections] == ["max", "mean"]


def test_a_query_whose_documents_all_tie_has_no_order_to_lose():
    flat = np.zeros(18, np.float32)
    report = gate_scores(Reference(flat, GRADES, GROUPS, QUERIES), flat, "fp32", GateLimits())
    assert report.passed and report.tau == 1
