"""Closed-loop measuring: each client sends its next request when the last one is answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil

from benchmarks.serving.rerank_lists import RerankList

Ask = Callable[[RerankList], np.ndarray]  # one request -> scores


@dataclass
class Round:
    """What one round measured: pairs answered, seconds it took, CPU seconds it used, latency of each request in ms."""

    pairs: int
    seconds: float
    cpu_seconds: float
    latencies_ms: list[float] = field(repr=False)

    @property
    def pairs_per_second(self) -> float:
        """Throughput of all clients together."""
        return self.pairs / self.seconds

    @property
    def cpu_ms_per_pair(self) -> float:
        """CPU time of server and clients per pair: what it costs, however busy the machine is with other work."""
        return 1e3 * self.cpu_seconds / self.pairs


def cpu_seconds(server: psutil.Process | None) -> float:
    """CPU time so far of this process and of the server with all its children."""
    own = psutil.Process()
    found = [own] if server is None else [own, server, *server.children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in found)


def measure(
    make_ask: Callable[[], Ask],
    lists: Sequence[RerankList],
    clients: int,
    seconds: float,
    server: psutil.Process | None = None,
) -> Round:
    """Run `clients` threads for `seconds`; every client finishes at least one request.

    make_ask: called once per client; server: the process whose CPU time counts beside this one's.
    """
    asks = [make_ask() for _ in range(clients)]
    latencies: list[list[float]] = [[] for _ in asks]
    counts, errors = [0] * clients, []
    begin = threading.Barrier(clients + 1)

    def client(number: int) -> None:
        begin.wait()
        end = time.perf_counter() + seconds
        turn = number * 7
        try:
            while not latencies[number] or time.perf_counter() < end:
                request = lists[turn % len(lists)]
                start = time.perf_counter()
                asks[number](request)
                latencies[number].append((time.perf_counter() - start) * 1e3)
                counts[number] += len(request.titles)
                turn += 1
        except Exception as problem:  # reported by the caller: a failed request spoils the round
            errors.append(problem)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    used = cpu_seconds(server)
    begin.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return Round(
        sum(counts), time.perf_counter() - start, cpu_seconds(server) - used, [ms for each in latencies for ms in each]
    )
