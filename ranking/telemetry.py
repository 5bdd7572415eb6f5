"""What a long-running program tells about itself: log lines, as text or as JSON, and spans for a collector."""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from typing import Any, Literal

from ranking import tracing

request_id: ContextVar[str] = ContextVar("request_id", default="")  # of the request that this task answers
LINES_WAITING = 10_000  # for a slow reader of standard error; what comes beyond is left out and counted
STOP_SECONDS = 2.0  # at the end that reader has so long to take what waits


@dataclass(kw_only=True)
class TelemetrySettings:
    """How a program tells what it does; their Config inherits them.

    Args:
        log_format: of the lines on standard error; json has the request's id and the trace's in each line of a request,
            and the router then has a line for every page
        tracing: send spans to an OpenTelemetry collector, which the variables OTEL_* name (docs/operations.md)
    """

    log_format: Literal["text", "json"] = "text"
    tracing: bool = False

    @contextmanager
    def telemetry(self, service: str) -> Iterator[None]:
        """Log and trace as set during the block. service: name of the process. InputError as of tracing.started."""
        logs = json_logs() if self.log_format == "json" else nullcontext()
        with logs, tracing.started(service) if self.tracing else nullcontext():
            yield


def writes_json() -> bool:
    """Whether standard error is for JSON lines now: then no progress bar belongs there."""
    return any(isinstance(handler, _Enqueue) for handler in logging.getLogger().handlers)


def bars_are_read() -> bool:
    """Whether somebody sees progress bars: a file would keep each of their states.

    On a terminal, or where whoever started the program says how often bars may move, as the demo does, which shows
    their last state.
    """
    return (sys.stderr.isatty() or "TQDM_MININTERVAL" in os.environ) and not writes_json()


def hide_unread_bars() -> None:
    """Keep transformers from drawing bars of its own (weights read and written) where nobody sees them."""
    if bars_are_read():
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # looked at when it is imported
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


@contextmanager
def json_logs() -> Iterator[None]:
    """Every log line of the process as one JSON object on standard error, written by a thread of its own.

    A reader of standard error that stalls holds up no request: LINES_WAITING lines wait, further ones are left out, and
    every later line says how many were. Nor does it hold up the end of the process for longer than STOP_SECONDS.
    """
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(LINES_WAITING)
    handler = _Enqueue(waiting)
    handler.setFormatter(JsonLines(handler))
    plain = logging.StreamHandler(sys.stderr)
    writer = _Writer(waiting, plain)
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers[:] = [handler]
    writer.start()
    try:
        yield
    finally:
        root.handlers[:] = before
        stopping = threading.Thread(target=writer.stop, daemon=True)
        stopping.start()
        stopping.join(STOP_SECONDS)


class _Writer(QueueListener):
    """The writing thread, which ends behind the lines that wait, also where there is no room for its sign to end."""

    def enqueue_sentinel(self) -> None:
        self.queue.put(None)  # type: ignore[attr-defined]


class _Enqueue(QueueHandler):
    """Hands lines to the writing thread, and counts those for which there is no room."""

    left_out = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.left_out += 1


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, logger, message; request_id, trace_id and span_id where known.

    What a call gives as `extra={"fields": {...}}` stands beside them.
    """

    def __init__(self, source: _Enqueue):
        super().__init__()
        self._source = source

    def format(self, record: logging.LogRecord) -> str:
        """One line; half a surrogate pair of a request is written as its escape."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if current := request_id.get():
            line["request_id"] = current
        line |= tracing.ids()
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if self._source.left_out:
            line["lines_left_out"] = self._source.left_out
        return json.dumps(line, default=str)
