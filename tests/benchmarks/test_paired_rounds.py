"""Interleaved rounds: their order, and a ratio that a busy neighbour does not move."""

from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks.paired_rounds import interleaved, ratio_of_medians, timed


def test_every_variant_runs_once_a_round_and_each_second_round_runs_backwards():
    order: list[str] = []

    def variant(name: str):
        return lambda: order.append(name) or len(order)

    found = interleaved({name: variant(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abccbaabc"
    assert found == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}


def test_a_load_that_slows_whole_rounds_leaves_the_ratio_and_its_interval_alone():
    load = np.array([1.0, 3.0, 1.2, 9.0, 1.1])
    ratio = ratio_of_medians(list(2 * load), list(load))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))


def test_the_interval_covers_what_rounds_disagree_about():
    ratio = ratio_of_medians([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
    assert (ratio.value, ratio.low, ratio.high) == (3, 2, 4)


def test_rounds_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="3 and 2 rounds"):
        ratio_of_medians([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="rounds is 0"):
        interleaved({}, rounds=0)


def test_processor_time_is_told_apart_from_waiting():
    busy = timed(lambda: sum(i * i for i in range(300_000)))
    assert busy.result > 0 and busy.wall_seconds > 0 and busy.processor_seconds > 0
    assert timed(lambda: time.sleep(0.2)).processor_seconds < 0.1
