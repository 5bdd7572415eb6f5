"""Which rates to try on the way to a server's capacity. No Locust here: importing it patches the whole process."""

from __future__ import annotations

import math

PRECISION = 1.08  # the search ends when the failing rate is within 8% of the passing one
GROWTH = 1.5


class Search:
    """The rates to try for one arm: up by half until one fails, then halving the gap in proportion."""

    def __init__(self, start: float, highest: float):
        self.passed, self.failed, self.highest = 0.0, math.inf, highest
        self.rate = min(start, highest)

    def judge(self, passed: bool) -> bool:
        """Take a step's verdict; returns whether the search is over."""
        if passed:
            self.passed = self.rate
        else:
            self.failed = self.rate
        if self.passed >= self.highest or (self.failed < math.inf and self.failed <= self.passed * PRECISION):
            return True
        if math.isinf(self.failed):
            self.rate = min(self.rate * GROWTH, self.highest)
        elif self.passed == 0:
            self.rate = self.failed / 2
            return self.rate < 0.5
        else:
            self.rate = math.sqrt(self.passed * self.failed)
        return False
