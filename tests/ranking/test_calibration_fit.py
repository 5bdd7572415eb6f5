"""Fitted maps from score to probability: monotone, better calibrated on held-out documents, honest about bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ranking.calibration import ece, probability
from ranking.calibration_fit import fit
from ranking.errors import InputError


def judged(n: int, seed: int, slope: float = 2.0, offset: float = 7.0):
    """Scores around `offset` whose relevance follows a logistic curve of that slope."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(offset, 1.5, n)
    return scores, rng.random(n) < 1 / (1 + np.exp(-slope * (scores - offset - 1)))


@pytest.mark.parametrize("kind", ["isotonic", "platt"])
def test_a_fitted_map_is_monotone_and_calibrates_documents_it_has_not_seen(kind):
    found = json.loads(json.dumps(fit(kind, *judged(4000, 1))))
    scores, relevant = judged(4000, 2)
    assert ece(probability(scores, None), relevant) > 0.3
    assert ece(probability(scores, found), relevant) < 0.03
    assert (np.diff(probability(np.linspace(-50, 50, 999), found)) >= 0).all()


def test_platt_recovers_the_curve_the_judgments_came_from():
    found = fit("platt", *judged(20000, 3))
    assert found["slope"] == pytest.approx(2.0, rel=0.05)
    assert -found["intercept"] / found["slope"] == pytest.approx(8.0, abs=0.05)


def test_platt_stays_finite_on_separable_judgments():
    found = fit("platt", [1.0, 2.0, 3.0, 4.0], [False, False, True, True])
    assert np.isfinite([found["slope"], found["intercept"]]).all()
    assert 0.5 < probability([3.5], found)[0] < 1


def test_isotonic_pools_scores_that_are_out_of_order():
    found = fit("isotonic", [1.0, 2.0, 3.0, 4.0], [False, True, False, True])
    assert probability([1.0, 2.0, 3.0, 4.0], found).tolist() == [0.0, 0.5, 0.5, 1.0]


def test_judgments_of_one_kind_and_scores_that_do_not_rank_are_refused():
    with pytest.raises(InputError, match="one kind only"):
        fit("isotonic", [1.0, 2.0], [True, True])
    with pytest.raises(InputError, match="does not rank"):
        fit("platt", [1.0, 2.0, 3.0, 4.0], [True, True, False, False])
    with pytest.raises(ValueError, match="one length"):
        fit("platt", [1.0], [True, False])
