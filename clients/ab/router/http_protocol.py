"""uvicorn's HTTP protocol with an end to a request's head: how long it may be, and how long it may take to arrive.

uvicorn itself waits for ever for the end of the headers, and takes any number of them.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from clients.ab.router.http_limits import HttpLimits


class _HeadTooLong(Exception):
    """Ends the parser's work on a head."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection. limits: set by limited_protocol, since uvicorn makes the instances."""

    limits = HttpLimits()
    _head_clock: asyncio.TimerHandle | None = None
    _in_head = False  # else what comes is a body, or the rest of one that was refused
    _head_bytes = 0  # received of a head that is not complete
    _head_size = 0  # of the parts of the head that the parser told of

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected: its first head is awaited."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_head_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of heads and bodies."""
        if self._head_bytes > self._most_head_bytes:
            self.send_400_response("Invalid HTTP request received.")
            return
        super().data_received(data)
        if self._in_head:
            # the parser tells of a header only once it is whole, so that what it holds back is counted here
            self._head_bytes += len(data)
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._head_clock is None and self.timeout_keep_alive_task is None:
            # bytes that begin no request, such as the rest of a refused body, ended uvicorn's own clock for idle ones
            self._await_head()

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._head_size, self._in_head = 0, True
        self._await_head()

    def on_url(self, url: bytes) -> None:
        """A part of the address."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A whole header."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there; the body has a clock of its own."""
        self._in_head = False
        self._stop_head_clock()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, or one whose head is too long, and close."""
        if max(self._head_size, self._head_bytes) <= self._most_head_bytes:
            super().send_400_response(msg)
            return
        reason = f"the head is longer than {self._most_head_bytes} bytes".encode()
        head = b"content-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(reason)
        self.transport.write(STATUS_LINE[431] + head + reason)
        self.transport.close()

    @property
    def _most_head_bytes(self) -> int:
        return int(self.limits.max_header_kb * 1024)

    def _count(self, size: int) -> None:
        self._head_size += size
        if self._head_size > self._most_head_bytes:
            raise _HeadTooLong

    def _await_head(self) -> None:
        self._stop_head_clock()
        if not self.transport.is_closing():
            self._head_clock = self.loop.call_later(self.limits.header_seconds, self._head_late)

    def _stop_head_clock(self) -> None:
        self._head_bytes = 0
        if self._head_clock is not None:
            self._head_clock.cancel()
            self._head_clock = None

    def _head_late(self) -> None:
        self._head_clock = None
        self.transport.close()


def limited_protocol(limits: HttpLimits) -> type[LimitedProtocol]:
    """The protocol class with these limits, for uvicorn's setting `http`."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})
