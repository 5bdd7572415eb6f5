"""Finding capacity: the highest rate with p99 under the target and no failed request, per arm, in steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from locust import LoadTestShape

from loadtest._capacity_search import Search
from loadtest._recorder import Recorder, clock
from loadtest._results import LATE_MS, summary

RAMP_S = 2.0  # the first seconds of a step are left out: users start, queues fill
SHORTEST_STEP_S = 2  # one whole second at least lies within, whenever it begins


@dataclass
class CapacitySettings:
    """arms: searched one after the other; start_rate, max_rate: requests a second; p99_ms: the target; step_s: seconds
    a step is
    measured; settle_s: seconds to wait for late answers (and for workers' reports) before a step is judged."""

    arms: list[str]
    start_rate: float
    max_rate: float
    p99_ms: float
    step_s: float
    settle_s: float
    rate_per_user: float


class CapacityShape(LoadTestShape):
    """Locust asks tick() once a second for the number of users; every user is `rate_per_user` requests a second."""

    abstract = True  # made by the locustfile when --find-capacity is given, never picked up from a folder

    def __init__(self, recorder: Recorder, settings: CapacitySettings, announce: Callable[[str], None]):
        super().__init__()
        self.recorder, self.settings, self._announce = recorder, settings, announce
        self.found: dict[str, dict[str, Any]] = {}
        self._waiting = list(settings.arms)
        self._arm = ""
        self._search = Search(0, 0)
        self._steps: list[dict[str, Any]] = []
        self._step_began = self._step_ends = self._judge_at = 0.0
        self._next_arm()

    def _next_arm(self) -> bool:
        if not self._waiting:
            return False
        self._arm = self._waiting.pop(0)
        self._search = Search(self.settings.start_rate, self.settings.max_rate, self.settings.rate_per_user)
        self._steps = []
        self._begin_step()
        return True

    def _begin_step(self) -> None:
        self._announce(self._arm)
        self._step_began = clock() + RAMP_S
        self._step_ends = self._step_began + self.settings.step_s
        self._judge_at = self._step_ends + self.settings.settle_s

    def users(self) -> int:
        return max(1, round(self._search.rate / self.settings.rate_per_user))

    def tick(self) -> tuple[int, float] | None:
        if not self.recorder.tallies:  # workers may still read their requests: no step without any
            self._begin_step()
        now = clock()
        if now >= self._judge_at:
            over = self._search.judge(self._judge())
            if over:
                self._finish_arm()
                if not self._next_arm():
                    return None
            else:
                self._begin_step()
        if self._step_ends <= now < self._judge_at:
            return 1, 10_000.0  # let the queue drain, so that one overload does not spoil the next step
        return self.users(), 10_000.0

    def _judge(self) -> bool:
        first, last = math.ceil(self._step_began), math.floor(self._step_ends)
        tally = self.recorder.window(self._arm, first, last)
        row = summary(tally, last - first)
        quantile = tally.quantile(0.99)
        row["rate"] = self.users() * self.settings.rate_per_user
        row["passed"] = bool(quantile is not None and quantile <= self.settings.p99_ms and not tally.failed)
        row["generator_lag_p99_ms"] = round(self.recorder.lag_quantile(0.99), 3)
        self._steps.append(row)
        p99 = "failed" if row["p99_ms"] is None else f"{row['p99_ms']:.1f} ms"
        print(
            f"{self._arm} at {row['rate']:.1f}/s: p99 {p99}, {row['failed']} failed -> "
            f"{'held' if row['passed'] else 'not held'}",
            flush=True,
        )
        # each step has its own lag: an overloaded one must not accuse the next
        self.recorder.send_lag.clear()
        return row["passed"]

    def _finish_arm(self) -> None:
        failing = [row for row in self._steps if not row["passed"]]
        last_lag = min((row["generator_lag_p99_ms"] for row in failing), default=0.0)
        reason = "the search's highest rate" if not failing else "the generator" if last_lag > LATE_MS else "the server"
        self.found[self._arm] = {
            "rate": self._search.passed,
            "p99_target_ms": self.settings.p99_ms,
            "limited_by": reason,
            "steps": self._steps,
        }
