"""The blend of a model's score with the first stage's."""

from __future__ import annotations

import numpy as np
import pytest

from ranking.prior import PriorBlend, standardised

SCORES = np.array([0.5, -1.0, 2.0, 0.25], np.float32)
PRIOR = np.array([10.0, 30.0, 20.0, 20.0])


def test_weight_0_is_the_model_and_weight_1_the_prior():
    assert PriorBlend(0.0, 3.0, 2.0).blend(SCORES, PRIOR).tolist() == SCORES.tolist()
    alone = PriorBlend(1.0, 3.0, 2.0).blend(SCORES, PRIOR)
    assert alone.mean() == pytest.approx(3.0) and alone.std() == pytest.approx(2.0)
    assert np.argsort(-alone, kind="stable").tolist() == [1, 2, 3, 0]


def test_between_them_the_blend_is_the_stated_sum():
    z = (PRIOR - 20) / np.sqrt(50)
    np.testing.assert_allclose(PriorBlend(0.3, -1.0, 4.0).blend(SCORES, PRIOR), 0.7 * SCORES + 0.3 * (4 * z - 1), 1e-6)


@pytest.mark.parametrize("change", [lambda p: 1e-30 * p, lambda p: 1e29 * p - 7e28, lambda p: p + 1000])
def test_the_scale_and_offset_of_the_prior_mean_nothing(change):
    blend = PriorBlend(0.5, 0.0, 1.0)
    np.testing.assert_allclose(blend.blend(SCORES, change(PRIOR)), blend.blend(SCORES, PRIOR), atol=1e-6)


def test_a_list_without_any_prior_keeps_its_scores_and_its_neighbour_does_not():
    prior = np.array([np.nan, np.nan, 1.0, 2.0])
    blended = PriorBlend(0.5, 5.0, 1.0).blend(SCORES, prior, np.array([7, 7, 3, 3]))
    assert blended[:2].tolist() == SCORES[:2].tolist()
    np.testing.assert_allclose(blended[2:], [(2.0 + 4) / 2, (0.25 + 6) / 2])


def test_a_document_without_a_prior_stands_at_its_lists_mean():
    z, known = standardised(np.array([1.0, np.nan, 3.0]), np.zeros(3, np.int64))
    assert z.tolist() == [-1.0, 0.0, 1.0] and known.all()


def test_equal_priors_say_nothing_about_the_order():
    blended = PriorBlend(0.5, 0.0, 1.0).blend(SCORES, np.full(4, 7.3))
    assert np.argsort(-blended).tolist() == np.argsort(-SCORES).tolist()


@pytest.mark.parametrize("bad", [{"weight": 1.1}, {"weight": float("nan")}, {"spread": 0.0}, {"mean": float("inf")}])
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        PriorBlend(**bad)
