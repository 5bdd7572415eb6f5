"""A cascade's final scores: the large model's for the best k, all others below them in the small model's order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ranking.cascade import Cascade
from ranking.prior import PriorBlend

scores = st.integers(1, 30).flatmap(
    lambda n: st.tuples(*(arrays.arrays(np.float32, n, elements=st.floats(-50, 50, width=32)) for _ in range(3)))
)


@given(scores, st.integers(1, 12), st.sampled_from([0.0, 0.3, 1.0]))
def test_the_k_stand_above_the_others_each_in_their_own_models_order(lists, k, weight):
    first, large, prior = lists
    cascade = Cascade(k, 1.0, 2.0, -0.5, 3.0)
    prior = np.where(prior > 30, np.nan, prior)
    prior_blend = PriorBlend(weight, 1.0, 2.0)
    blended = prior_blend.blend(cascade.on_scale(first), prior)
    final = cascade.of_lists(first, large, np.zeros(len(first), int), lambda s, rows: prior_blend.blend(s, prior[rows]))
    if len(first) <= k:
        assert final.tobytes() == prior_blend.blend(large, prior).tobytes()
        return
    top = np.argsort(-blended, kind="stable")[:k]
    rest = np.setdiff1d(np.arange(len(first)), top)
    joined = np.where(np.isin(np.arange(len(first)), top), large, cascade.on_scale(first))
    assert final[top].tobytes() == prior_blend.blend(joined, prior)[top].tobytes()
    assert final[rest].max() < final[top].min()
    order = rest[np.argsort(blended[rest], kind="stable")]
    assert (np.diff(final[order]) >= 0).all()


def test_others_that_do_not_reach_the_k_keep_their_scores_and_those_that_do_are_lowered_alike():
    cascade = Cascade(2, 0.0, 1.0, 10.0, 2.0)
    first = np.float32([14, 12, 8, 6])  # on the large model's scale 2, 1, -1, -2
    groups = np.zeros(4, int)
    assert cascade.of_lists(first, np.float32([0.5, 3, 99, 99]), groups).tolist() == [0.5, 3, -1, -2]
    lowered = cascade.of_lists(first, np.float32([-4, -3, 99, 99]), groups)
    assert lowered[:2].tolist() == [-4, -3] and lowered[2] == np.nextafter(np.float32(-4), np.float32(-9))
    assert lowered[2] - lowered[3] == pytest.approx(1)


def test_lists_are_joined_one_by_one():
    cascade = Cascade(1, 0.0, 1.0, 0.0, 1.0)
    first, large = np.float32([1, 5, 2, 3]), np.float32([7, 8, 9, 10])
    assert cascade.of_lists(first, large, np.array([0, 1, 0, 1])).tolist() == [1, 8, 9, 3]


def test_a_cascade_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="k is 0"):
        Cascade(0, 0, 1, 0, 1)
    with pytest.raises(ValueError, match=r"a spread is 0\.0: a model whose scores differ"):
        Cascade.fit(3, np.float32([1, 2]), np.float32([4, 4]))
