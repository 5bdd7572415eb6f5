"""How many pairs one teacher server gets at a time: a fixed number, or one found by trying what still adds speed."""

from __future__ import annotations

import math
from time import monotonic

# Half of the sequences that vLLM works on by default offline; from 16, its batches were too small for the first minute.
START = 128
LARGEST = 4096
GAIN = 1.05  # a doubling that brings less than this has passed the top
MISSES = 2  # doublings without gain before it settles: on a busy machine one epoch is often unlucky
EPOCH_SECONDS = 0.5
SETTLED_SECONDS = 30.0


class Window:
    """The limit of pairs in flight to one endpoint, in requests of one or of several.

    fixed: that many, always. Otherwise the limit doubles from START until two doublings in a row brought no GAIN, then
    settles at twice the smallest limit that reached the top: a server with a few pairs waiting is never idle, and
    one with too few is. It is probed again every SETTLED_SECONDS, since a server's load changes. An overload (queue
    full, deadline passed) halves it. clock: seconds, for tests.
    """

    def __init__(self, fixed: int | None = None, clock=monotonic):
        self.fixed, self._clock = fixed, clock
        self.limit = fixed or START
        self._best_limit, self._best_rate = self.limit, 0.0
        self._climbing = fixed is None
        self._overloaded = -math.inf
        self._misses = 0
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._began, self._done, self._warm = self._clock(), 0, False

    def completed(self, saturated: bool, pairs: int = 1) -> None:
        """Count an answer to pairs. saturated: more were waiting, else the rate says nothing about the limit."""
        if self.fixed is not None:
            return
        if not saturated:
            self._begin_epoch()
            return
        self._done += pairs
        elapsed = self._clock() - self._began
        if not self._warm:  # the first answers after a change still belong to the old limit
            if self._done >= self.limit:
                self._begin_epoch()
                self._warm = True
            return
        if self._climbing and elapsed >= EPOCH_SECONDS and self._done >= 2 * self.limit:
            self._judge(self._done / elapsed)
        elif not self._climbing and elapsed >= SETTLED_SECONDS:
            self._best_rate = self._done / elapsed  # what the settled limit brings now
            self._climb_to(2 * self.limit)

    def _judge(self, rate: float) -> None:
        if rate >= GAIN * self._best_rate:
            self._best_rate, self._best_limit, self._misses = rate, self.limit, 0
        else:
            self._misses += 1
        if self.limit < LARGEST and self._misses < MISSES:
            self._climb_to(2 * self.limit)
            return
        self.limit, self._climbing = min(2 * self._best_limit, LARGEST), False
        self._misses = 0
        self._begin_epoch()

    def _climb_to(self, limit: int) -> None:
        self._climbing, self.limit = True, min(limit, LARGEST)
        self._begin_epoch()

    def overloaded(self) -> None:
        """Halve the limit and climb again from there: the server has refused requests or let their deadline pass.

        Called for each such request; those within one epoch count once.
        """
        if self.fixed is None and self._clock() - self._overloaded >= EPOCH_SECONDS:
            self._overloaded = self._clock()
            self._best_limit, self._best_rate = self.limit, 0.0
            self._climb_to(max(1, self.limit // 2))
