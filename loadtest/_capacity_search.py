"""Which rates to try on the way to a server's capacity. No Locust here: importing it patches the whole process."""

from __future__ import annotations

import math

PRECISION = 1.08  # the search ends when the failing rate is within 8% of the passing one
GROWTH = 1.5
LOWEST = 0.5  # requests a second; below it nothing is tried


class Search:
    """The rates to try for one arm: up by half until one fails, then halving the gap in proportion.

    unit: requests a second of one user, of which a rate has a whole number; 0 where any rate can be sent.
    """

    def __init__(self, start: float, highest: float, unit: float = 0.0):
        self.passed, self.failed, self.highest, self.unit = 0.0, math.inf, highest, unit
        self.rate = self._sendable(start)

    def _sendable(self, rate: float) -> float:
        if not self.unit:
            return min(rate, self.highest)
        return self.unit * max(1, min(round(rate / self.unit), math.floor(self.highest / self.unit)))

    def judge(self, passed: bool) -> bool:
        """Take a step's verdict; returns whether the search is over."""
        if passed:
            self.passed = self.rate
        else:
            self.failed = self.rate
        if self.passed >= self.highest or (self.failed < math.inf and self.failed <= self.passed * PRECISION):
            return True
        if math.isinf(self.failed):
            wanted = self.rate * GROWTH
        elif self.passed == 0:
            wanted = self.failed / 2
            if wanted < LOWEST:
                return True
        else:
            wanted = math.sqrt(self.passed * self.failed)
        self.rate = self._sendable(wanted)
        return self.rate in (self.passed, self.failed)  # no whole number of users lies in between
