"""Circuit breaker: a model that keeps failing is left alone for a while, so that its users do not wait for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

MEMORY_COOLDOWNS = 30.0  # an outcome counts for so many cooldowns, and an open breaker that nobody meets closes
SILENT_COOLDOWNS = 5.0  # without any success for so long, it does not matter whose calls failed


@dataclass(kw_only=True)
class BreakerSettings:
    """When a model is left alone.

    Args:
        breaker_window: recent calls of a model that its circuit breaker looks at
        breaker_failures: failures among them that open it; from 3 on one user's alone do not
        breaker_cooldown_seconds: pause before an open breaker lets one page try again
    """

    breaker_window: int = 20
    breaker_failures: int = 10
    breaker_cooldown_seconds: float = 2.0

    def __post_init__(self) -> None:
        if self.breaker_window <= 0:
            raise ValueError(f"breaker_window is {self.breaker_window}: it must be above 0")
        if not 1 <= self.breaker_failures <= self.breaker_window:
            raise ValueError("breaker_failures must be from 1 to breaker_window")
        if self.breaker_cooldown_seconds <= 0:
            raise ValueError(f"breaker_cooldown_seconds is {self.breaker_cooldown_seconds}: it must be above 0")

    def new_breaker(self) -> Breaker:
        """A closed breaker for one model."""
        return Breaker(self.breaker_window, self.breaker_failures, self.breaker_cooldown_seconds)


class Breaker:
    """One model's breaker: open after `failures` of its last `window` calls failed, not all of them one user's.

    The window holds a user's last few calls only, fewer than half of `failures` (but one), of the last
    MEMORY_COOLDOWNS: one user's pages, however many and however large, do not take the model from everybody. Where
    nobody at all had a success for SILENT_COOLDOWNS and `window` calls failed since, it opens whoever asked. Open, it
    lets one call through at a time, cooldown_seconds after the last failure; whoever's call failed there leaves others
    as much time again to go first. Where no call is tried for MEMORY_COOLDOWNS (the arm was killed, ramped down, taken
    out) it closes, or it would be told of as open for ever. clock: seconds, for tests.
    """

    def __init__(
        self, window: int, failures: int, cooldown_seconds: float, clock: Callable[[], float] = time.monotonic
    ):
        self.window, self.failures, self.cooldown_seconds, self._clock = window, failures, cooldown_seconds, clock
        self._most_of_a_user = max(1, (failures - 1) // 2)
        self._outcomes: deque[tuple[float, str, bool]] = deque(maxlen=window)  # when, whose, whether it succeeded
        self._failed_since, self._failed_in_a_row = 0.0, 0
        self._open_until: float | None = None
        self._probing = False
        self._failed_prober: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether the model is left alone."""
        until = self._open_until
        if until is not None and not self._probing and self._clock() > until + MEMORY_COOLDOWNS * self.cooldown_seconds:
            self._close()
        return self._open_until is not None

    def admits(self, user: str) -> bool:
        """Whether a call of a user may be made now. While open: one probe at a time, once the cooldown is over."""
        if not self.is_open or self._open_until is None:
            return True
        opens = self._open_until + (self.cooldown_seconds if user == self._failed_prober else 0.0)
        if self._probing or self._clock() < opens:
            return False
        self._probing = True
        return True

    def withdraw(self, probe: bool = False) -> None:
        """A call that was admitted said nothing about the model: it was cancelled, or the page itself was wrong.

        probe: whether the breaker was open when it was admitted.
        """
        if probe:
            self._probing = False

    def report(self, user: str, succeeded: bool, probe: bool = False) -> None:
        """The outcome of a user's call that was admitted. probe: whether the breaker was open then."""
        if self.is_open:
            if not probe:
                return  # a straggler from before it opened says nothing about now
            self._probing = False
            if succeeded:
                self._close()
            else:
                self._open_until, self._failed_prober = self._clock() + self.cooldown_seconds, user
            return
        now = self._clock()
        self._failed_in_a_row = 0 if succeeded else self._failed_in_a_row + 1
        if self._failed_in_a_row <= 1:
            self._failed_since = now
        while self._outcomes and self._outcomes[0][0] < now - MEMORY_COOLDOWNS * self.cooldown_seconds:
            self._outcomes.popleft()
        own = [place for place, (_, of, _) in enumerate(self._outcomes) if of == user]
        if len(own) >= self._most_of_a_user:
            del self._outcomes[own[0]]
        self._outcomes.append((now, user, succeeded))
        silent = now - self._failed_since >= SILENT_COOLDOWNS * self.cooldown_seconds
        if sum(not succeeded for *_, succeeded in self._outcomes) >= self.failures or (
            silent and self._failed_in_a_row >= self.window
        ):
            self._open_until = now + self.cooldown_seconds

    def _close(self) -> None:
        self._open_until, self._failed_prober, self._failed_in_a_row = None, None, 0
        self._outcomes.clear()
