"""Counters of a front's caches on Triton's metrics page, as custom metrics of the Python backend.

Every front instance has series of its own, told apart by `process`. Two processes must never hold the same series: the
server keeps one counter for equal labels and frees it when the first holder goes, while the other still writes to it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import triton_python_backend_utils as pb_utils


class CacheMetrics:
    """What a front's caches count, reported to the server where it changed.

    counted: name -> (what it is in words, function that gives its value now). A name that ends in `_total` is a
    counter, others are gauges. labels: of every series, besides `process`.
    """

    def __init__(self, counted: Mapping[str, tuple[str, Callable[[], int]]], labels: Mapping[str, str]):
        self._values = {name: value for name, (_, value) in counted.items()}
        self._reported = dict.fromkeys(counted, 0)
        self._families, self._metrics = {}, {}
        for name, (words, _) in counted.items():
            kind = pb_utils.MetricFamily.COUNTER if name.endswith("_total") else pb_utils.MetricFamily.GAUGE
            self._families[name] = pb_utils.MetricFamily(name=name, description=words, kind=kind)
            self._metrics[name] = self._families[name].Metric(labels={**labels, "process": str(os.getpid())})

    def report(self) -> None:
        """Bring the metrics page up to date."""
        for name, value in self._values.items():
            now, before = value(), self._reported[name]
            if now != before:
                self._metrics[name].increment(now - before)  # of a gauge too: it may go down
                self._reported[name] = now

    def close(self) -> None:
        """Take the series off the page; they must go before their families do."""
        self._metrics.clear()
        self._families.clear()
