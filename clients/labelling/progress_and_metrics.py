"""Show how a labelling run goes: a progress bar on stderr, and the same counts for Prometheus."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from tqdm import tqdm

from clients.labelling.work_queue import Tally
from ranking.errors import InputError
from ranking.telemetry import bars_are_read

LOGGER = logging.getLogger(__name__)
TICK_SECONDS = 0.5
LINE_SECONDS = 60.0  # between two log lines where no bar is seen


def describe(tally: Tally) -> str:
    """`in flight 256, retries 3, rejects 0, shares 10.0.0.1:8001 52% 10.0.0.2:8001 48%`."""
    answered = sum(tally.by_endpoint.values())
    shares = " ".join(f"{url} {count / answered:.0%}" for url, count in sorted(tally.by_endpoint.items()) if count)
    parts = [f"in flight {sum(tally.in_flight.values())}"] if tally.in_flight else []
    parts += [f"retries {tally.retries}", f"rejects {sum(tally.refused.values())}"]
    if len(tally.by_endpoint) > 1:
        parts.append(f"shares {shares}")
    return ", ".join(parts)


@contextmanager
def progress(tally: Tally) -> Iterator[Callable[[], None]]:
    """A bar of the pairs, finished runs' ones included, and a function that moves it to where the tally stands.

    Where nobody sees a bar, a log line says the same: one every LINE_SECONDS, and one at the end.
    """
    hidden, told = not bars_are_read(), time.monotonic()
    with tqdm(
        total=tally.total, initial=tally.already, unit="pair", smoothing=0.05, dynamic_ncols=True, disable=hidden
    ) as bar:

        def log() -> None:
            LOGGER.info("%d of %d pairs, %s", tally.already + tally.done, tally.total, describe(tally))

        def redraw() -> None:
            nonlocal told
            bar.set_postfix_str(describe(tally), refresh=False)
            bar.update(tally.already + tally.done - bar.n)
            if hidden and time.monotonic() - told >= LINE_SECONDS:
                told = time.monotonic()
                log()

        try:
            yield redraw
        finally:
            told = math.inf  # the last line comes once
            redraw()
            if hidden:
                log()


async def show(tally: Tally) -> None:
    """Show the tally every TICK_SECONDS until cancelled."""
    with progress(tally) as redraw:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            redraw()


class LabelMetrics:
    """A Prometheus collector over a Tally: read when scraped, so that counting costs the run nothing."""

    def __init__(self, tally: Tally):
        self.tally = tally

    def collect(self) -> Iterator[Metric]:
        """The metrics as they stand now."""
        tally = self.tally
        yield GaugeMetricFamily("disranker_label_pairs_total_planned", "pairs of the whole job", value=tally.total)
        yield GaugeMetricFamily("disranker_label_pairs_finished", "pairs finished by this and earlier runs",
                                value=tally.already + tally.done)  # fmt: skip
        yield CounterMetricFamily("disranker_label_retries", "requests sent again", value=tally.retries)
        yield CounterMetricFamily("disranker_label_shards", "shards written by this run", value=tally.shards)
        yield CounterMetricFamily(
            "disranker_label_latency_seconds", "time of answered requests, summed", value=tally.latency_seconds
        )
        refused = CounterMetricFamily("disranker_label_rejects", "pairs that get no score", labels=["cause"])
        for cause, count in dict(tally.refused).items():  # it may grow meanwhile, this is another thread
            refused.add_metric([cause], count)
        yield refused
        for name, text, counts, family in (
            ("scored", "pairs scored", tally.by_endpoint, CounterMetricFamily),
            ("lost", "times the endpoint was lost", tally.lost, CounterMetricFamily),
            ("in_flight", "requests in flight", tally.in_flight, GaugeMetricFamily),
            ("window", "limit of requests in flight", tally.windows, GaugeMetricFamily),
        ):
            metric = family(f"disranker_label_endpoint_{name}", text, labels=["endpoint"])
            for url, count in dict(counts).items():
                metric.add_metric([url], count)
            yield metric


def serve_metrics(tally: Tally, port: int, address: str) -> None:
    """Answer GET /metrics on the address from a daemon thread. InputError if the port is taken or is none."""
    registry = CollectorRegistry()
    registry.register(LabelMetrics(tally))
    try:
        start_http_server(port, addr=address, registry=registry)
    except (OSError, OverflowError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise InputError(f"metrics cannot be served on {address}, port {port}: {reason}") from problem
