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


class BodyReader:
    """Reads bodies within the limits, all of them together within the memory that they may take."""

    def __init__(self, limits: HttpLimits):
        self._limits = limits
        self._largest, self._most_buffered = (
            int(limits.max_body_mb * (1 << 20)),
            int(limits.max_buffered_mb * (1 << 20)),
        )
        self.buffered = 0  # bytes of bodies that are being received

    async def read(self, pieces: AsyncIterator[bytes], declared: str | None) -> bytes:
        """The whole body. declared: the Content-Length header, if there is one.

        BodyRefused: 413 larger than a body may be, 422 too many values, 408 not there in time, 503 too many bodies.
        """
        too_large = BodyRefused(413, f"the body is larger than {self._largest} bytes")
        if declared is not None and declared.isdecimal() and int(declared[:20]) > self._largest:
            raise too_large
        body, values = bytearray(), ValueCount(self._limits.max_values)
        try:
            async with asyncio.timeout(self._limits.receive_seconds):
                async for piece in pieces:
                    self.buffered += len(piece)
                    body += piece
                    if len(body) > self._largest:
                        raise too_large
                    if self.buffered > self._most_buffered:
                        raise BodyRefused(503, "too many requests are being received; try again in a second")
                    values.feed(piece)
        except TimeoutError as problem:
            raise BodyRefused(408, f"the body was not there in {self._limits.receive_seconds:g} s") from problem
        finally:
            self.buffered -= len(body)
        return bytes(body)
