"""Raw score to probability, and how far the probabilities can be believed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranking.calibration import ece, probability, reliability
from ranking.errors import InputError

ISOTONIC = {"kind": "isotonic", "scores": [-1.0, 0.0, 2.0], "probabilities": [0.1, 0.4, 0.8]}


def test_without_a_calibration_the_logistic_function_is_taken_and_never_overflows():
    np.testing.assert_allclose(probability([0.0, 1000.0, -1000.0, 1.0], None), [0.5, 1, 0, 1 / (1 + np.exp(-1))])


def test_both_maps_give_the_values_worked_by_hand():
    platt = {"kind": "platt", "slope": 2.0, "intercept": -1.0}
    np.testing.assert_allclose(probability([1.0], platt), [1 / (1 + np.exp(-1))])
    np.testing.assert_allclose(probability([-9, -0.5, 1, 9], ISOTONIC), [0.1, 0.25, 0.6, 0.8])


@given(st.lists(st.floats(-50, 50), min_size=2))
def test_every_map_is_monotone(scores):
    for calibration in (None, ISOTONIC, {"kind": "platt", "slope": 0.3, "intercept": 4}):
        assert (np.diff(probability(np.sort(scores), calibration)) >= 0).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "spline"},
        {"slope": 1},
        {"kind": "platt", "slope": -1.0, "intercept": 0.0},
        {"kind": "isotonic", "scores": [0, 1], "probabilities": [0.9, 0.1]},
        {"kind": "isotonic", "scores": [0, 1], "probabilities": [0.9]},
        {"kind": "isotonic", "scores": [0, 1]},
    ],
)
def test_a_map_that_is_not_one_is_refused(bad):
    with pytest.raises(InputError, match="calibration"):
        probability([0.0], bad)


def test_reliability_worked_by_hand():
    # bin [0, .5): predictions .2 .4, one of two relevant; bin [.5, 1]: .5 .9 1.0, all relevant
    found = reliability([0.2, 0.4, 0.5, 0.9, 1.0], [0, 1, 1, 1, 1], bins=2)
    assert found.counts.tolist() == [2, 3]
    np.testing.assert_allclose(found.predicted, [0.3, 0.8])
    np.testing.assert_allclose(found.observed, [0.5, 1.0])
    assert found.ece == pytest.approx((2 * 0.2 + 3 * 0.2) / 5)


def test_honest_probabilities_have_a_small_error_and_boastful_ones_a_large_one():
    rng = np.random.default_rng(0)
    p = rng.random(20000)
    relevant = rng.random(20000) < p
    assert ece(p, relevant) < 0.015
    assert ece(np.clip(p * 3 - 1, 0, 1), relevant) > 0.1


def test_empty_bins_and_no_rows_are_no_numbers():
    assert np.isnan(reliability([0.9], [1], bins=4).observed[:3]).all()
    assert np.isnan(ece([], []))
    with pytest.raises(ValueError, match="outside"):
        ece([1.2], [1])
