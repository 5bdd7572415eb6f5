"""The vLLM backend's counters, with Triton's side played by objects that add up and count the calls."""

from __future__ import annotations

import importlib
import sys
import types
from typing import ClassVar

import pytest


class Metric:
    def __init__(self):
        self.value, self.calls = 0, 0

    def increment(self, by):
        self.value += by
        self.calls += 1

    def set(self, value):
        self.value = value


class Family:
    COUNTER, GAUGE = "counter", "gauge"
    made: ClassVar[dict[str, Metric]] = {}

    def __init__(self, name, description, kind):
        self.name = name

    def Metric(self, labels):
        return self.made.setdefault(self.name, Metric())


class Problem(Exception):
    """TritonModelException."""


@pytest.fixture
def meters(monkeypatch):
    """The module, imported with a stand-in for the stub's utilities: those exist inside tritonserver alone."""
    Family.made = {}
    utilities = types.SimpleNamespace(MetricFamily=Family, TritonModelException=Problem)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utilities)
    monkeypatch.delitem(sys.modules, "serving.backends.vllm.meters", raising=False)
    yield importlib.import_module("serving.backends.vllm.meters")
    sys.modules.pop("serving.backends.vllm.meters", None)


def answer(prompt, cached, generated):
    parts = [types.SimpleNamespace(token_ids=[0] * tokens) for tokens in generated]
    return types.SimpleNamespace(prompt_token_ids=[0] * prompt, num_cached_tokens=cached, outputs=parts)


def test_all_that_is_counted_is_reported_once(meters):
    counting = meters.Meters("teacher", "1")
    for reported in (1, 2):
        for _ in range(50):
            counting.count([answer(7, 2, [1])])
        counting.count([answer(5, None, [2, 3])])
        counting.report(open_requests=9)
        counting.report(open_requests=3)  # nothing has come since
        found = {name.removeprefix("vllm:"): metric.value for name, metric in Family.made.items()}
        assert found == {
            "prompt_tokens_total": 355 * reported,
            "prefix_cache_hits_total": 100 * reported,
            "generation_tokens_total": 55 * reported,
            "request_success_total": 51 * reported,
            "num_requests_open": 3,
        }
        assert Family.made["vllm:request_success_total"].calls == reported  # a call to the server each


def test_without_metrics_counting_goes_on(meters, monkeypatch):
    def refused(self, labels):
        raise Problem("metrics not supported")

    monkeypatch.setattr(Family, "Metric", refused)
    counting = meters.Meters("teacher", "1")
    counting.count([answer(7, 2, [1])])
    counting.report(open_requests=1)
    counting.close()


def test_a_call_that_fails_loses_no_count_and_makes_none_twice(meters, monkeypatch):
    counting = meters.Meters("teacher", "1")
    counting.count([answer(7, 2, [1])])
    kept = Metric.increment

    def failing(self, by):
        if self is Family.made["vllm:generation_tokens_total"]:
            raise Problem("no shared memory")
        kept(self, by)

    monkeypatch.setattr(Metric, "increment", failing)
    with pytest.raises(Problem):
        counting.report(open_requests=1)
    monkeypatch.setattr(Metric, "increment", kept)
    counting.report(open_requests=1)
    assert [Family.made[f"vllm:{name}_total"].value for name in ("prompt_tokens", "generation_tokens")] == [7, 1]
