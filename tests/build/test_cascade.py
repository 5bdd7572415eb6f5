"""What a cascade may lose against its large model alone before it is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from build.cascade import measure_cost
from build.gate import Reference
from ranking.cascade import Cascade
from ranking.errors import InputError, Refused
from ranking.prior import PriorBlend

GRADES = np.tile([2, 1, 0, 0, 0, 0, 0, 0], 4)
GROUPS = np.repeat(np.arange(4), 8)
GOOD = GRADES + np.linspace(0, 0.1, 32)
LARGE = Reference(GOOD.astype(np.float32), GRADES, GROUPS, ["a", "b", "c", "d"])


def joined(k: int, first: np.ndarray) -> tuple[Cascade, Reference]:
    cascade = Cascade.fit(k, LARGE.scores, first.astype(np.float32))
    parts = (cascade, first.astype(np.float32), LARGE.scores)
    return cascade, replace(LARGE, scores=cascade.of_lists(*parts[1:], GROUPS), cascade=parts)


def test_a_small_model_that_finds_the_best_costs_nothing():
    cost = measure_cost(*joined(3, GOOD)[:1], LARGE, joined(3, GOOD)[1], 0.0)
    assert cost.against_large.difference == 0 and cost.queries_beyond_k == 4


def test_one_that_hides_the_best_is_refused_unless_the_loss_is_allowed():
    cascade, reference = joined(3, -GOOD)
    with pytest.raises(Refused, match=r"the cascade is not published: NDCG@5 0\.\d+, the large model alone 1\.000"):
        measure_cost(cascade, LARGE, reference, 0.002)
    cost = measure_cost(cascade, LARGE, reference, 1.0)
    assert cost.against_large.difference < -0.3


def test_lists_within_k_say_nothing_of_a_cascade():
    cascade, reference = joined(8, GOOD)
    with pytest.raises(InputError, match=r"cascade_k is 8: no judged query has more documents \(at most 8\)"):
        measure_cost(cascade, LARGE, reference, 0.002)


def test_a_prior_is_blended_before_the_k_are_chosen():
    """A prior that knows the best document brings it to the large model, which the small model alone would not."""
    _, reference = joined(1, -GOOD)
    prior = np.where(GRADES == 2, 100.0, 0.0).astype(np.float32)
    blended = reference.with_prior(PriorBlend(0.9, *(float(v) for v in (GOOD.mean(), GOOD.std()))), prior)
    assert [int(blended[group == GROUPS].argmax()) for group in range(4)] == [0, 0, 0, 0]
    assert [int(reference.scores[group == GROUPS].argmax()) for group in range(4)] != [0, 0, 0, 0]
