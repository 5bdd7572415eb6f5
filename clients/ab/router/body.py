"""Reads a request's body piece by piece, and stops as soon as it is too large, too slow or made of too many values.

The values are counted before anything is parsed: a few megabytes of `0,` are millions of values, and a parser that is
asked about each of them stands still for seconds. Counting costs well under a millisecond for a piece of 64 KiB.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from clients.ab.router.http_limits import HttpLimits

_LONGEST_VALUE = 64  # bytes of a number or literal outside of texts, with room for white space


class BodyRefused(Exception):
    """The body is not read any further. status: of HTTP; the text says why."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class ValueCount:
    """Counts what separates JSON values (commas, colons, opening brackets) outside of texts, over pieces of a body."""

    def __init__(self, most: int):
        self.most, self.count = most, 0
        self._strings = self._outside = 0
        self._in_text = self._escaped = False

    def feed(self, piece: bytes) -> None:
        """Count a piece. BodyRefused as soon as there are more than `most`."""
        if self._escaped and piece:  # the piece before ended between a backslash and what it escapes
            piece, self._escaped = piece[1:], False
        piece = piece.replace(b"\\\\", b"")
        if piece.endswith(b"\\"):
            piece, self._escaped = piece[:-1], True
        piece = piece.replace(b'\\"', b"")
        quotes = piece.count(b'"')
        self._strings += quotes
        if self._strings <= 4 * self.most:  # else the list of parts itself would be too long
            outside = b"".join(piece.split(b'"')[self._in_text :: 2])
            self._in_text ^= bool(quotes & 1)
            self._outside += len(outside.translate(None, b" \t\r\n"))
            self.count += sum(map(outside.count, (b",", b":", b"[", b"{")))
        if self._strings > 4 * self.most or self.count > self.most or self._outside > _LONGEST_VALUE * self.most:
            raise BodyRefused(422, f"the body holds too many values: about {self.most} are read")


class _Arriving:
    """A body that is being received. size: bytes that are there; given_up: it was, to make room for others."""

    def __init__(self) -> None:
        self.size, self.given_up = 0, False
        self.clock: asyncio.Timeout | None = None


class BodyReader:
    """Reads bodies within the limits, all of them together within the memory that they may take.

    Where they would take more, those that began first are given up, of those that hold more than an equal share of it:
    a body from a caller who sends it is there within moments, so that the oldest are of those who do not.
    """

    def __init__(self, limits: HttpLimits):
        self._limits = limits
        self._largest, self._most_buffered = (
            int(limits.max_body_mb * (1 << 20)),
            int(limits.max_buffered_mb * (1 << 20)),
        )
        self.buffered = 0  # bytes of bodies that are being received
        self._arriving: dict[_Arriving, None] = {}  # oldest first

    async def read(self, pieces: AsyncIterator[bytes], declared: str | None) -> bytes:
        """The whole body. declared: the Content-Length header, if there is one.

        BodyRefused: 413 larger than a body may be, 422 too many values, 408 not there in time, 503 too many bodies.
        """
        too_large = BodyRefused(413, f"the body is larger than {self._largest} bytes")
        if declared is not None and declared.isdecimal() and int(declared[:20]) > self._largest:
            raise too_large
        body, values, this = bytearray(), ValueCount(self._limits.max_values), _Arriving()
        self._arriving[this] = None
        try:
            async with asyncio.timeout(self._limits.receive_seconds) as this.clock:
                async for piece in pieces:
                    if this.given_up:
                        break
                    this.size += len(piece)
                    self.buffered += len(piece)
                    body += piece
                    if len(body) > self._largest:
                        raise too_large
                    self._make_room()
                    values.feed(piece)
        except TimeoutError as problem:
            if not this.given_up:
                raise BodyRefused(408, f"the body was not there in {self._limits.receive_seconds:g} s") from problem
        finally:
            self._forget(this)
        if this.given_up:
            raise BodyRefused(503, "too many requests are being received; try again in a second")
        return bytes(body)

    def _make_room(self) -> None:
        """Give up bodies until the others fit."""
        while self.buffered > self._most_buffered:
            share = self._most_buffered / len(self._arriving)
            oldest = next(body for body in self._arriving if body.size > share)
            oldest.given_up = True
            self._forget(oldest)
            if oldest.clock is not None and not oldest.clock.expired():
                oldest.clock.reschedule(asyncio.get_running_loop().time())  # it may wait for a piece that never comes

    def _forget(self, body: _Arriving) -> None:
        if body in self._arriving:
            del self._arriving[body]
            self.buffered -= body.size
