"""The click models against their own definitions."""

import numpy as np
import pytest

from ranking.click_models import SATISFIED_SECONDS, ClickModel

PAGES = 40_000


def pages_of(grades: list[int]) -> np.ndarray:
    return np.tile(np.array(grades), (PAGES, 1))


def test_pbm_clicks_with_the_product_of_position_and_attractiveness():
    model = ClickModel(examination=(1.0, 0.5, 0.25), attractiveness=(0.1, 0.2, 0.4, 0.6, 0.8))
    visits = model.simulate(pages_of([4, 4, 0, 2]), np.random.default_rng(0))
    np.testing.assert_allclose(visits.clicked.mean(0), [0.8, 0.4, 0.025, 0.1], atol=0.01)
    np.testing.assert_allclose(visits.examined.mean(0), [1, 0.5, 0.25, 0.25], atol=0.01)


def test_satisfaction_and_dwell_follow_the_grade():
    visits = ClickModel().simulate(pages_of([0, 4]), np.random.default_rng(0))
    share = visits.satisfied.sum(0) / visits.clicked.sum(0)
    np.testing.assert_allclose(share, [0.10, 0.90], atol=0.03)
    assert np.median(visits.dwell_seconds[visits.satisfied]) == pytest.approx(95, rel=0.03)
    assert (visits.dwell_seconds[visits.satisfied] >= SATISFIED_SECONDS).mean() > 0.98
    assert (visits.dwell_seconds[visits.clicked & ~visits.satisfied] >= SATISFIED_SECONDS).mean() < 0.02
    assert not visits.dwell_seconds[~visits.clicked].any()


def test_dbn_stops_at_satisfaction_and_goes_on_with_the_continuation():
    model = ClickModel(kind="dbn", attractiveness=(0, 0, 0, 0, 1), satisfaction=(0, 0, 0, 0, 0.5), continuation=0.8)
    visits = model.simulate(pages_of([4, 0, 4]), np.random.default_rng(1))
    np.testing.assert_allclose(visits.examined.mean(0), [1, 0.4, 0.32], atol=0.01)
    assert not visits.examined[visits.satisfied[:, 0], 1:].any()
    skipped = ~visits.examined[:, 1]
    assert not visits.examined[skipped, 2].any()


def test_a_short_page_has_no_events_beyond_its_end():
    visits = ClickModel(attractiveness=(1.0,) * 5, examination=(1.0,)).simulate(
        pages_of([4, -1]), np.random.default_rng(0)
    )
    assert visits.clicked[:, 0].all()
    assert not (visits.clicked[:, 1].any() or visits.examined[:, 1].any() or visits.dwell_seconds[:, 1].any())


def test_the_last_propensity_holds_for_deeper_positions():
    assert ClickModel(examination=(1.0, 0.3)).propensities(4).tolist() == [1.0, 0.3, 0.3, 0.3]
    with pytest.raises(ValueError, match="DBN"):
        ClickModel(kind="dbn").propensities(3)


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"attractiveness": (0.5,)}, "attractiveness"),
        ({"examination": (1.2,)}, "examination"),
        ({"examination": ()}, "examination"),
        ({"continuation": 2.0}, "continuation"),
        ({"kind": "ubm"}, "ubm"),
    ],
)
def test_impossible_settings_are_named(wrong, names):
    with pytest.raises(ValueError, match=names):
        ClickModel(**wrong)
