"""Counters of the vLLM backend on Triton's /metrics, under vLLM's own names. Nothing here if metrics are off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton_python_backend_utils as pb_utils

_COUNTERS = {
    "vllm:prompt_tokens_total": "Prompt tokens of answered requests.",
    "vllm:prefix_cache_hits_total": "Prompt tokens of answered requests that the prefix cache had.",
    "vllm:generation_tokens_total": "Tokens generated for answered requests.",
    "vllm:request_success_total": "Requests answered with an output.",
}


class Meters:
    """Counts in this process and reports now and then: each figure on the page is a call to the server's process.

    model, version: the labels.
    """

    def __init__(self, model: str, version: str):
        labels = {"model": model, "version": version}
        self._families: list[Any] = []  # a metric ends with its family, so the families are kept
        self._metrics: dict[str, Any] = {}
        self._counted = dict.fromkeys(_COUNTERS, 0)  # since the last report
        counter, gauge = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE
        kinds = {**dict.fromkeys(_COUNTERS, counter), "vllm:num_requests_open": gauge}
        try:
            for name, kind in kinds.items():
                description = _COUNTERS.get(name, "Requests waiting or running.")
                self._families.append(pb_utils.MetricFamily(name=name, description=description, kind=kind))
                self._metrics[name] = self._families[-1].Metric(labels=labels)
        except pb_utils.TritonModelException as problem:
            if "metrics not supported" not in str(problem):
                raise
            self._metrics = {}  # the server runs with --allow-metrics=false

    def count(self, outputs: Sequence[Any]) -> None:
        """Count the finished vLLM RequestOutputs of one request to this server; each is a request to vLLM."""
        for output in outputs:
            generated = sum(len(part.token_ids) for part in output.outputs)
            values = (len(output.prompt_token_ids), output.num_cached_tokens or 0, generated, 1)
            for name, value in zip(_COUNTERS, values):
                self._counted[name] += value

    def report(self, open_requests: int) -> None:
        """Put what was counted since the last report, and how many requests wait or run, on the page."""
        if self._metrics:
            for name, value in self._counted.items():
                if value:
                    self._metrics[name].increment(value)
                    self._counted[name] = 0  # at once: should a later call fail, this one is not made again
            self._metrics["vllm:num_requests_open"].set(open_requests)

    def close(self) -> None:
        """Let go of the metrics while the server still listens: the stub crashes if they outlive it."""
        self._metrics.clear()
        self._families.clear()
