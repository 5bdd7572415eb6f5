"""Who may ask the router: keys by caller, stored as hashes, each with a rate of its own.

A line of the keys file is a caller's name, the SHA-256 of its key in hex, and how many requests a second it may send:

    shop-front  9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08  200

A key is 32 random bytes (`openssl rand -hex 32`), so that its hash needs neither a salt nor many rounds.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ranking.errors import DataError, InputError
from ranking.files import stamp

logger = logging.getLogger("ab_router")

_BURST_SECONDS = 2.0  # a caller that was quiet may send so many seconds' worth at once


class NotAuthorised(Exception):
    """No key, or one that is not in the file."""


class TooManyRequests(Exception):
    """The caller's rate is used up. retry_after: seconds until its next request is taken."""

    def __init__(self, name: str, retry_after: float):
        super().__init__(f"{name} sends more requests than its rate allows; try again in {retry_after:.2f} s")
        self.retry_after = retry_after


@dataclass
class _Caller:
    name: str
    rate: float
    left: float
    refilled: float


class ApiKeys:
    """The keys of a file, read again when it changes. InputError at construction if the file is bad.

    clock: monotonic seconds, for tests.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic):
        self._path, self._clock = path, clock
        self._seen = self._changing = stamp(self._path)
        self._callers = self._read()
        self.error = ""

    def admit(self, authorization: str | None) -> str:
        """The name of the caller whose key the header `Authorization: Bearer KEY` shows; one request of its rate is
        used. NotAuthorised, TooManyRequests."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise NotAuthorised("a key is needed: Authorization: Bearer KEY")
        caller = self._callers.get(hashlib.sha256(key.strip().encode("utf-8", "replace")).hexdigest())
        if caller is None:
            raise NotAuthorised("the key is not known")
        now = self._clock()
        caller.left = min(caller.rate * _BURST_SECONDS, caller.left + (now - caller.refilled) * caller.rate)
        caller.refilled = now
        if caller.left < 1:
            raise TooManyRequests(caller.name, (1 - caller.left) / caller.rate)
        caller.left -= 1
        return caller.name

    def reload(self) -> None:
        """Take up the file if it changed. A bad edit leaves the keys as they were, with the reason in `error`.

        A change is taken up at the second look that finds it the same: the first may have met a half-written file.
        """
        found = stamp(self._path)
        if found == self._seen:
            return
        if found != self._changing:
            self._changing = found
            return
        self._seen = found
        try:
            self._callers, self.error = self._read(), ""
            logger.info("%s: taken up, %d keys", self._path, len(self._callers))
        except InputError as problem:
            self.error = str(problem)
            logger.error("%s; the keys stay as they were", problem)

    def _read(self) -> dict[str, _Caller]:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise InputError(f"{self._path}: the keys cannot be read: {problem}") from problem
        callers: dict[str, _Caller] = {}
        for row, line in enumerate(lines, start=1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) != 3 or len(words[1]) != 64 or not set(words[1].lower()) <= set("0123456789abcdef"):
                raise DataError(self._path, "a name, the SHA-256 of a key in hex and a rate are needed", row)
            try:
                rate = float(words[2])
            except ValueError:
                rate = 0.0
            if not 0.5 <= rate <= 1e6:
                raise DataError(self._path, f"{words[2]} requests a second: 0.5 to 1000000 are meant", row)
            if words[1].lower() in callers:
                raise DataError(self._path, f"{words[0]} has the key of {callers[words[1].lower()].name}", row)
            callers[words[1].lower()] = _Caller(words[0], rate, rate * _BURST_SECONDS, self._clock())
        if not callers:
            raise InputError(f"{self._path}: no keys; nobody could ask the router")
        return callers
