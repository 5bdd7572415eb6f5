"""Latencies in 1% buckets per second and arm: exact enough for p99, small enough to send from worker to master."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field

_GROWTH = math.log(1.01)
_BEGAN = time.time() - time.monotonic()


def clock() -> float:
    """Wall-clock seconds as the clock stood when the process began: setting it makes no request late."""
    return _BEGAN + time.monotonic()


def bucket_of(milliseconds: float) -> int:
    return math.floor(math.log(max(milliseconds, 1e-3)) / _GROWTH)


def milliseconds_of(bucket: int) -> float:
    """The middle of a bucket."""
    return math.exp((bucket + 0.5) * _GROWTH)


@dataclass
class Tally:
    """Requests whose intended start lies in one stretch of time, for one arm."""

    sent: int = 0
    answered: int = 0
    documents: int = 0
    chunks: int = 0
    buckets: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        self.sent += other.sent
        self.answered += other.answered
        self.documents += other.documents
        self.chunks += other.chunks
        self.buckets.update(other.buckets)
        self.errors.update(other.errors)

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    @property
    def outstanding(self) -> int:
        return self.sent - self.answered - self.failed

    def quantile(self, level: float) -> float | None:
        """Milliseconds; failed and outstanding requests count as infinitely slow. None without a request."""
        if not self.sent:
            return None
        rank = math.ceil(level * max(self.sent, self.answered + self.failed))
        for bucket in sorted(self.buckets):
            rank -= self.buckets[bucket]
            if rank <= 0:
                return milliseconds_of(bucket)
        return math.inf


class Recorder:
    """Tallies per (second of the intended start, arm), and how late requests left this generator.

    Wall-clock seconds are shared by workers of one machine; across machines their clocks must agree to a second.
    """

    def __init__(self) -> None:
        self.tallies: dict[tuple[int, str], Tally] = {}
        self.send_lag: Counter[int] = Counter()
        self.late = 0
        self._unsent: dict[tuple[int, str], Tally] = {}
        self._unsent_lag: Counter[int] = Counter()

    def _both(self, second: int, arm: str) -> tuple[Tally, Tally]:
        key = (second, arm)
        return self.tallies.setdefault(key, Tally()), self._unsent.setdefault(key, Tally())

    def sent(self, second: int, arm: str, lag_ms: float) -> None:
        """A request of that intended second has left, lag_ms after it should have."""
        for tally in self._both(second, arm):
            tally.sent += 1
        self.send_lag[bucket_of(lag_ms)] += 1
        self._unsent_lag[bucket_of(lag_ms)] += 1

    def answered(self, second: int, arm: str, latency_ms: float, documents: int, chunks: int) -> None:
        for tally in self._both(second, arm):
            tally.answered += 1
            tally.documents += documents
            tally.chunks += chunks
            tally.buckets[bucket_of(latency_ms)] += 1

    def failed(self, second: int, arm: str, reason: str) -> None:
        for tally in self._both(second, arm):
            tally.errors[reason] += 1

    def withdrawn(self, second: int, arm: str) -> None:
        """The end of the test cut a request off before its answer was due: it says nothing about the server."""
        for tally in self._both(second, arm):
            tally.sent -= 1

    def window(self, arm: str, first: float, last: float) -> Tally:
        """Everything intended in [first, last), wall-clock seconds."""
        total = Tally()
        for (second, name), tally in self.tallies.items():
            if name == arm and first <= second < last:
                total.add(tally)
        return total

    def arms(self) -> list[str]:
        return sorted({arm for _, arm in self.tallies})

    def lag_quantile(self, level: float) -> float:
        rank = math.ceil(level * sum(self.send_lag.values()))
        for bucket in sorted(self.send_lag):
            rank -= self.send_lag[bucket]
            if rank <= 0:
                return milliseconds_of(bucket)
        return 0.0

    def take_unsent(self) -> dict:
        """What was recorded since the last call, as plain types for Locust's messages."""
        unsent, self._unsent = self._unsent, {}
        lag, self._unsent_lag = self._unsent_lag, Counter()
        tallies = [
            [second, arm, t.sent, t.answered, t.documents, t.chunks, dict(t.buckets), dict(t.errors)]
            for (second, arm), t in unsent.items()
        ]
        return {"tallies": tallies, "send_lag": dict(lag)}

    def merge(self, message: dict) -> None:
        """Add a worker's take_unsent()."""
        for second, arm, sent, answered, documents, chunks, buckets, errors in message["tallies"]:
            tally = Tally(sent, answered, documents, chunks, Counter(buckets), Counter(errors))
            self.tallies.setdefault((second, arm), Tally()).add(tally)
        self.send_lag.update(message["send_lag"])

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]
