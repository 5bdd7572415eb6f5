"""A day of search traffic on a fleet of student machines, event by event.

Poisson arrivals whose rate follows a cosine over the day, a balancer that gives the next list to a free machine, calls
that take all lists that wait up to a limit, and machines that fail and come back. A day of a large service has 10^9
pages, so every hour is simulated by a window of its own; failures run over the whole day.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

HOURS = 24
_SETTLING = 0.2  # share of a window that is not counted: it begins with an empty queue


@dataclass(frozen=True)
class Fleet:
    """Equal machines and how they work.

    call_seconds, list_seconds: what a call takes, and each list in it. merged_lists: lists that a call takes at most.
    idle_seconds: of a page on an idle machine, its own call included. failure_hours: mean hours between two failures of
    a machine, inf for never. repair_seconds: until it is back.
    """

    machines: int
    call_seconds: float
    list_seconds: float
    merged_lists: int
    idle_seconds: float
    failure_hours: float = math.inf
    repair_seconds: float = 600.0


@dataclass(frozen=True)
class Hour:
    """One hour: its rate, machines up on average, how busy they were, seconds of a page, share of pages too late."""

    hour: int
    requests_per_second: float
    machines_up: float
    busy: float
    p50: float
    p99: float
    mean_wait: float
    late: float


def rate_at(hour: float, peak: float, lowest_share: float, peak_hour: float = 20.0) -> float:
    """Requests a second: `peak` at peak_hour, lowest_share of it twelve hours later, a cosine between."""
    swing = (1 + math.cos(2 * math.pi * (hour - peak_hour) / HOURS)) / 2
    return peak * (lowest_share + (1 - lowest_share) * swing)


def simulate(
    fleet: Fleet, peak: float, lowest_share: float, deadline: float, arrivals: int = 20_000, seed: int = 0
) -> list[Hour]:
    """The 24 hours. peak: requests a second; deadline: seconds; arrivals: pages of each hour's window."""
    random = np.random.default_rng(seed)
    outages = _outages(fleet, random)
    hours = []
    for hour in range(HOURS):
        rate = rate_at(hour + 0.5, peak, lowest_share)
        times = np.cumsum(random.exponential(1 / rate, arrivals))
        hours.append(_window(fleet, hour, rate, times, outages, deadline))
    return hours


def _outages(fleet: Fleet, random: np.random.Generator) -> list[list[tuple[float, float]]]:
    """For each machine the times of the day, in seconds, at which it goes and is back."""
    found = []
    for _ in range(fleet.machines):
        own: list[tuple[float, float]] = []
        now = 0.0
        while math.isfinite(fleet.failure_hours):
            now += random.exponential(fleet.failure_hours * 3600)
            if now > HOURS * 3600:
                break
            own.append((now, now + fleet.repair_seconds))
            now += fleet.repair_seconds
        found.append(own)
    return found


def _window(
    fleet: Fleet,
    hour: int,
    rate: float,
    times: np.ndarray,
    outages: Sequence[Sequence[tuple[float, float]]],
    deadline: float,
) -> Hour:
    """Stretches the hour's outages over the window, which is shorter or longer, and serves its arrivals."""
    length = float(times[-1])
    stretch = length / 3600

    def within(moment: float) -> float:
        return (moment - hour * 3600) * stretch

    own = [
        [(within(down), within(up)) for down, up in each if within(up) > 0 and within(down) < length]
        for each in outages
    ]
    waits, busy, up = _serve(fleet, times, own)
    counted = waits[int(len(waits) * _SETTLING) :]
    pages = counted + fleet.idle_seconds
    return Hour(
        hour=hour,
        requests_per_second=rate,
        machines_up=up / length,
        busy=busy / up if up else 1.0,
        p50=float(np.quantile(pages, 0.5)),
        p99=float(np.quantile(pages, 0.99)),
        mean_wait=float(counted.mean()),
        late=float((pages > deadline).mean()),
    )


def _serve(
    fleet: Fleet, times: np.ndarray, outages: Sequence[Sequence[tuple[float, float]]]
) -> tuple[np.ndarray, float, float]:
    """Seconds beyond an idle machine's that each arrival waits; seconds of work and of being up, of all machines.

    A machine that fails loses its call: those lists go back to the head of the queue, as a balancer asks another
    replica. Free machines are taken by their number, which makes no difference to equal ones.
    """
    end = float(times[-1])
    waits = np.zeros(len(times))
    queue: deque[int] = deque()
    free = list(range(fleet.machines))
    heapq.heapify(free)
    is_up = [True] * fleet.machines
    at_work: list[tuple[int, ...]] = [()] * fleet.machines
    call_of = [0] * fleet.machines  # a call's number, so that the end of one that was lost is not heeded
    started = [0.0] * fleet.machines
    # (time, kind, machine, call): kind 0 the end of a call, 1 goes down, 2 comes back
    events = [(max(down, 0.0), 1, m, 0) for m, own in enumerate(outages) for down, _ in own]
    events += [(up, 2, m, 0) for m, own in enumerate(outages) for _, up in own]
    heapq.heapify(events)
    busy = 0.0
    arrived, last = 0, len(times)

    def give(now: float) -> None:
        while queue and free:
            machine = heapq.heappop(free)
            if not is_up[machine]:
                continue
            lists = tuple(queue.popleft() for _ in range(min(len(queue), fleet.merged_lists)))
            at_work[machine], started[machine] = lists, now
            call_of[machine] += 1
            seconds = fleet.call_seconds + fleet.list_seconds * len(lists)
            heapq.heappush(events, (now + seconds, 0, machine, call_of[machine]))

    while arrived < last or queue or any(at_work):
        if arrived < last and (not events or times[arrived] <= events[0][0]):
            queue.append(arrived)
            give(float(times[arrived]))
            arrived += 1
            continue
        now, kind, machine, call = heapq.heappop(events)
        if kind == 0 and call == call_of[machine] and at_work[machine]:
            seconds = now - started[machine]
            busy += max(0.0, min(now, end) - min(started[machine], end))
            # an idle machine's own time is counted apart, and holds one call of one list
            own = fleet.call_seconds + fleet.list_seconds
            for arrival in at_work[machine]:
                waits[arrival] = started[machine] - times[arrival] + seconds - own
            at_work[machine] = ()
            heapq.heappush(free, machine)
        elif kind == 1:
            is_up[machine] = False
            busy += max(0.0, min(now, end) - min(started[machine], end)) if at_work[machine] else 0.0
            queue.extendleft(reversed(at_work[machine]))
            at_work[machine] = ()
        elif kind == 2:
            is_up[machine] = True
            if machine not in free:
                heapq.heappush(free, machine)
        give(now)
        if not events and arrived == last and queue and not any(at_work):
            break  # every machine is down for good
    up = sum(end - sum(min(u, end) - max(d, 0.0) for d, u in own) for own in outages)
    return waits, busy, up
