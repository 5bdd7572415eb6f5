"""uvicorn's HTTP protocol with an end to what a client can hold up: heads without end, answers that nobody reads.

uvicorn itself waits for ever for the end of the headers, takes any number of them and of requests one behind the other,
keeps an answer for ever that is not read, and throws away the body of a request that offers another protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import httptools
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from clients.ab.router.http_limits import HttpLimits
from clients.ab.router.http_requests import as_json
from clients.ab.router.metrics import Metrics
from clients.ab.router.rerank_api import error_content

PIECE = 64 << 10  # bytes of an answer that are handed to the transport at a time
LEAST_READ = 64 << 10  # bytes of an answer within receive_seconds: the slowest line is faster, but not a trickle
ALWAYS_ANSWERED = (b"/health/live", b"/metrics")  # however many connections are open: a full router must be seen
# requests of one connection behind the one that is being answered; each takes a hundred times its 25 bytes
MOST_WAITING = 16


class _HeadTooLong(Exception):
    """Ends the parser's work on a head."""


class _TooManyWaiting(Exception):
    """Ends the parser's work on a connection."""


class _UpgradeIgnored:
    """httptools' parser for one connection, which reads on where a request offers another protocol.

    httptools takes such an offer (`Upgrade: h2c`, as Java's HttpClient and `curl --http2` make with each request) for
    accepted and drops the body. RFC 9110, section 7.8: a server that does not take it up answers as if it had not been
    made. So a new parser gets the head once more, without the offer, and then the body.
    """

    def __init__(self, protocol: LimitedProtocol):
        self._protocol = protocol
        self._parser = self._new()

    def feed_data(self, data: bytes) -> None:
        """Parse bytes and call the protocol. httptools.HttpParserError for what is no request, CONNECT among it."""
        rest = memoryview(data)
        while True:
            try:
                self._parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as offer:
                rest = rest[offer.args[0] :]
            if self.get_method() == b"CONNECT":
                raise httptools.HttpParserError("CONNECT: this is no proxy")
            head = self._head()
            self._parser = self._new()
            self._parser.feed_data(head)

    def get_http_version(self) -> str:
        """Of the request that is being read."""
        return self._parser.get_http_version()

    def get_method(self) -> bytes:
        """Of the request that is being read."""
        return self._parser.get_method()

    def should_keep_alive(self) -> bool:
        """Whether the connection stays open after the answer."""
        return self._parser.should_keep_alive()

    def should_upgrade(self) -> bool:
        """Whether another protocol is offered: never in a head that is read for the second time."""
        return self._parser.should_upgrade()

    def _head(self) -> bytes:
        version = self.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.get_method(), self._protocol.url, version)]
        lines += [b"%s: %s" % header for header in self._protocol.headers if header[0] != b"upgrade"]
        return b"\r\n".join((*lines, b"", b""))

    def _new(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self._protocol)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets it
        return parser


class LimitedProtocol(HttpToolsProtocol):
    """One connection. limits, metrics, awaited: set by limited_protocol, since uvicorn makes the instances.

    awaited: connections whose caller is to send something next, the longest waited for first: where there are too many
    connections it makes room for the others.
    """

    limits: HttpLimits
    metrics: Callable[[], Metrics]
    awaited: dict[LimitedProtocol, None]
    _head_clock: asyncio.TimerHandle | None = None
    _answer_clock: asyncio.TimerHandle | None = None  # runs while an answer cannot be written
    _waiting = 0  # bytes of answers that the transport held when it began
    _in_head = False  # else what comes is a body, or the rest of one that was refused
    _head_began = False  # in the bytes that are being parsed
    _deaf = False  # nothing more is read: the caller sends requests without end
    _head_bytes = 0  # received of a head that is not complete
    _head_size = 0  # of the parts of the head that the parser told of

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.parser = _UpgradeIgnored(self)  # type: ignore[assignment]
        self._served_app = partial(_in_pieces, self.app)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected: its first head is awaited."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.transport.set_write_buffer_limits(high=PIECE)  # under TLS it would be eight times as much
        self._make_room()
        self._await_caller()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.awaited.pop(self, None)
        self._stop_head_clock()
        self._stop_answer_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of heads and bodies."""
        if self._deaf:
            return
        if self._head_bytes > self._most_head_bytes:
            self.send_400_response("Invalid HTTP request received.")
            return
        self._head_began = False
        super().data_received(data)
        if self._in_head and not self._head_began:
            # the parser tells of a header only once it is whole, so that what it holds back is counted here
            self._head_bytes += len(data)
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._head_clock is None and self.timeout_keep_alive_task is None:
            # bytes that begin no request, such as the rest of a refused body, ended uvicorn's own clock for idle ones
            self._await_head()

    def on_message_begin(self) -> None:
        """A head begins."""
        if len(self.pipeline) >= MOST_WAITING:
            self._deaf = True
            raise _TooManyWaiting
        super().on_message_begin()
        self._head_size, self._in_head, self._head_began = 0, True, True
        if self in self.awaited:  # else a request before this one is still being answered
            self._await_caller()
        self._await_head()

    def on_url(self, url: bytes) -> None:
        """A part of the address."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A whole header, or a trailer behind a body in chunks."""
        self._count(len(name) + len(value))
        if self._in_head:  # what stands before the router checks or sets headers, and trailers are none of them
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there; the body has a clock of its own."""
        if self.parser.should_upgrade():  # the same head comes once more, without the offer of another protocol
            return
        self._in_head = False
        self._stop_head_clock()
        self._make_room()
        full = len(self.connections) > self.limits.max_connections
        self.app = self._refuse if full and self.url.partition(b"?")[0] not in ALWAYS_ANSWERED else self._served_app
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is there."""
        if self.parser.should_upgrade():
            return
        if not self.cycle.response_complete:  # a refused body is answered before it is there
            self.awaited.pop(self, None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer was handed to the transport; one after which the connection closes may still wait in there."""
        super().on_response_complete()
        if self.timeout_keep_alive_task is not None:
            self._await_caller()
        self._await_reader_of_last_answer()

    def pause_writing(self) -> None:
        """The client does not read as fast as is answered: from now on it has receive_seconds to catch up."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """The client caught up."""
        super().resume_writing()
        self._stop_answer_clock()
        self._await_reader_of_last_answer()

    def timeout_keep_alive_handler(self) -> None:
        """No request followed an answer: close."""
        super().timeout_keep_alive_handler()
        self._await_reader_of_last_answer()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, or one whose head is too long, and close."""
        if self._deaf:  # those that wait are answered, the last one with `connection: close`: the caller may ask again
            self.pipeline[0][0].keep_alive = False
            return
        if max(self._head_size, self._head_bytes) <= self._most_head_bytes:
            super().send_400_response(msg)
            self._await_reader_of_last_answer()
            return
        reason = f"the head is longer than {self._most_head_bytes} bytes".encode()
        head = b"content-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(reason)
        self.transport.write(STATUS_LINE[431] + head + reason)
        self.transport.close()
        self._await_reader_of_last_answer()

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers in place of the app while too many connections are open."""
        self.metrics().refused.labels(503).inc()
        reason = f"over {self.limits.max_connections} connections are open; try again in a second"
        content = as_json(error_content(scope["path"], 503, reason))
        headers = {"connection": "close", "retry-after": "1"}
        await Response(content, 503, headers, media_type="application/json")(scope, receive, send)

    def _await_caller(self) -> None:
        self.awaited.pop(self, None)
        self.awaited[self] = None  # behind the others

    def _make_room(self) -> None:
        """Close those connections that were longest waited for until there are not too many."""
        while len(self.connections) > self.limits.max_connections:
            longest = next((waiting for waiting in self.awaited if waiting is not self), None)
            if longest is None:
                return
            del self.awaited[longest]
            longest.transport.close()
            longest._await_reader_of_last_answer()
            if not longest.transport.get_write_buffer_size():  # else it counts until that is read, or cut off
                self.connections.discard(longest)
            self.metrics().given_up.inc()

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
        if not self.transport.is_closing():
            self.transport.close()
        self._await_reader_of_last_answer()

    def _await_reader(self) -> None:
        if self._answer_clock is None:
            self._waiting = self.transport.get_write_buffer_size()
            self._answer_clock = self.loop.call_later(self.limits.receive_seconds, self._answer_unread)

    def _await_reader_of_last_answer(self) -> None:
        # a transport that is to close waits without end until the client has read what is left
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._await_reader()

    def _stop_answer_clock(self) -> None:
        if self._answer_clock is not None:
            self._answer_clock.cancel()
            self._answer_clock = None

    def _answer_unread(self) -> None:
        self._answer_clock = None
        left = self.transport.get_write_buffer_size()
        if left > max(0, self._waiting - LEAST_READ):
            self.metrics().unread.inc()
            self.transport.abort()  # close() would go on waiting
        elif left:
            self._await_reader()


async def _in_pieces(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers as the app does, a large answer piece by piece, each once the caller has taken enough of those before.

    Under TLS what is written at once leaves the buffer by which a caller is seen not to read.
    """

    async def sent(message: Message) -> None:
        body = message.get("body", b"")
        if len(body) <= PIECE:
            await send(message)
            return
        more = message.get("more_body", False)
        for start in range(0, len(body), PIECE):
            end = start + PIECE
            await send({**message, "body": body[start:end], "more_body": more or end < len(body)})

    await app(scope, receive, sent)


def limited_protocol(limits: HttpLimits, metrics: Callable[[], Metrics]) -> type[LimitedProtocol]:
    """The protocol class with these limits, for uvicorn's setting `http`.

    metrics: the router's; a function, since the service has them once it started.
    """
    own = {"limits": limits, "metrics": staticmethod(metrics), "awaited": {}}
    return type("LimitedProtocol", (LimitedProtocol,), own)
