"""Which shapes of call are tried before a version may keep scores; an engine whose scores move is found out."""

from __future__ import annotations

import numpy as np
import pytest

from build.batch_invariance import call_shapes, shapes_that_move_scores
from build.triton_config import ServingLimits, bucket_lengths, row_steps
from ranking.text import EncodedPair, EncodedPairs
from serving.front.buckets import cut

LIMITS = ServingLimits(score_cache_mb=1, max_batch=20, batch_tokens=512, call_tokens=16).for_target("openvino")
LENGTHS = bucket_lengths(LIMITS, "openvino", 62)
PAIRS = EncodedPairs.of([EncodedPair(list(range(10, 10 + n)), 2) for n in range(4, 63)])


def a_sum(feed):
    """Each row's own sum: an engine in which pairs do not meet."""
    return (feed["input_ids"] * feed["attention_mask"]).sum(1).astype(np.float32)


def test_an_engine_of_rows_that_do_not_meet_moves_nothing():
    assert shapes_that_move_scores(a_sum, PAIRS, 0, LIMITS, LENGTHS) == []


@pytest.mark.parametrize("shape", [(16, 32), (1, 48), (8, 62), (12, 48)])
def test_one_shape_whose_kernel_rounds_otherwise_is_found(shape):
    def engine(feed):
        return np.nextafter(a_sum(feed), np.float32(0)) if feed["input_ids"].shape == shape else a_sum(feed)

    moved = shapes_that_move_scores(engine, PAIRS, 0, LIMITS, LENGTHS)
    # alone a pair has one row of its own length: a kernel of that shape that rounds otherwise moves all others
    assert shape in moved or (shape[0] == 1 and len(moved) > 3)


def test_a_row_that_feels_its_neighbour_is_found():
    def engine(feed):
        own = a_sum(feed)
        return own + np.float32(1e-3) * np.roll(own, 1)

    assert len(shapes_that_move_scores(engine, PAIRS, 0, LIMITS, LENGTHS)) > 10


def test_every_call_that_a_front_makes_has_a_shape_that_was_tried():
    tried, steps = set(call_shapes(LIMITS, LENGTHS)), row_steps(LIMITS, "openvino")
    rng = np.random.default_rng(1)
    for _ in range(300):
        lengths = rng.integers(4, 63, rng.integers(1, 80)).tolist()
        for bucket in cut(lengths, LENGTHS, LIMITS.max_batch, LIMITS.batch_tokens, LIMITS.call_tokens):
            rows = next(step for step in steps if step >= len(bucket.rows))
            assert (rows, bucket.length) in tried
    assert row_steps(ServingLimits(max_batch=64, score_cache_mb=1), "openvino")[-3:] == (32, 48, 64)
    assert row_steps(ServingLimits(max_batch=64), "openvino") == ()
