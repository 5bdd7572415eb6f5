"""The count of encoder calls: hand-made lists whose calls and padding are known."""

from __future__ import annotations

import pytest

from benchmarks.serving.encoder_calls import count_calls
from build.triton_config import ServingLimits

LISTS = [[10] * 47 + [90], [30] * 48]  # 2,000 tokens


def test_fewer_calls_cost_padding_and_packing_costs_neither():
    calls, padding = "calls a list", "encoded tokens over real"
    eager = count_calls(LISTS, ServingLimits(call_tokens=128), longest=120)
    assert eager[calls] == 1.5 and eager[padding] == pytest.approx((47 * 32 + 96 + 48 * 32) / 2000)
    dear = count_calls(LISTS, ServingLimits(call_tokens=10_000), longest=120)
    assert dear[calls] == 1 and dear[padding] == pytest.approx((48 * 96 + 48 * 32) / 2000)
    assert count_calls(LISTS, ServingLimits(graph="packed"), longest=120) == {calls: 1, padding: 1}


def test_a_long_list_takes_as_many_packed_calls_as_the_limits_say():
    limits = ServingLimits(graph="packed", max_batch=20, batch_tokens=300)
    assert count_calls([[10] * 48, [100] * 6], limits, longest=120)["calls a list"] == (3 + 2) / 2
