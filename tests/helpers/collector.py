"""An OpenTelemetry collector for tests: takes OTLP over HTTP, as JSON (Triton's) or protobuf, and keeps the spans."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class TakenSpan:
    """One span. start, end: nanoseconds since the epoch; parent: "" for the first of a trace."""

    service: str
    name: str
    trace: str
    span: str
    parent: str
    start: int
    end: int
    failed: bool
    attributes: dict[str, Any]
    events: dict[str, int]


@dataclass
class Collector:
    """What came in. url: for OTEL_EXPORTER_OTLP_ENDPOINT."""

    url: str
    spans: list[TakenSpan] = field(default_factory=list)

    def wait(
        self,
        enough: Callable[[list[TakenSpan]], bool],
        seconds: float = 120.0,
        meanwhile: Callable[[], Any] | None = None,
    ) -> list[TakenSpan]:
        """The spans once there are enough of them. meanwhile: called once a second until then."""
        until = time.monotonic() + seconds
        next_call = time.monotonic() + 1
        while not enough(self.spans):
            if meanwhile is not None and time.monotonic() > next_call:
                meanwhile()
                next_call = time.monotonic() + 1
            assert time.monotonic() < until, f"these spans came only: {sorted(one.name for one in self.spans)}"
            time.sleep(0.05)
        return list(self.spans)


@contextmanager
def collector(status: int = 200, delay_seconds: float = 0.0) -> Iterator[Collector]:
    """A collector on a free port. status, delay_seconds: what it answers, and how long it takes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            time.sleep(delay_seconds)
            if status == 200:
                taken.spans.extend(_read(self.headers["content-type"], body))
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    taken = Collector(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        server.shutdown()
        server.server_close()


def _read(content_type: str, body: bytes) -> Iterator[TakenSpan]:
    if "json" in content_type:
        document = json.loads(body)
    else:
        document = MessageToDict(ExportTraceServiceRequest.FromString(body))
    for resource in document.get("resourceSpans", []):
        service = _attributes(resource["resource"]).get("service.name", "")
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                yield TakenSpan(
                    service, span["name"], *(_hex(span.get(key, "")) for key in ("traceId", "spanId", "parentSpanId")),
                    int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"]),
                    span.get("status", {}).get("code") in ("STATUS_CODE_ERROR", 2), _attributes(span),
                    {event["name"]: int(event["timeUnixNano"]) for event in span.get("events", [])},
                )  # fmt: skip


def _hex(value: str) -> str:
    """An id as hexadecimal digits: OTLP's JSON has them so, protobuf's own JSON in base 64."""
    if len(value) in (0, 16, 32) and set(value) <= set("0123456789abcdef"):
        return value
    return base64.b64decode(value).hex()


def _attributes(of: dict[str, Any]) -> dict[str, Any]:
    return {entry["key"]: next(iter(entry["value"].values())) for entry in of.get("attributes", [])}


def arrows(spans: list[TakenSpan], trace: str) -> set[tuple[str, str, str]]:
    """(parent's name, name, service) of every span of a trace."""
    names = {one.span: one.name for one in spans}
    return {(names.get(one.parent, ""), one.name, one.service) for one in spans if one.trace == trace}


def tree(spans: list[TakenSpan], trace: str) -> list[tuple[int, TakenSpan]]:
    """(depth, span) of one trace, children after their parent in the order of their start."""
    inside = sorted((one for one in spans if one.trace == trace), key=lambda one: one.start)
    known = {one.span for one in inside}

    def below(parent: str, depth: int) -> Iterator[tuple[int, TakenSpan]]:
        for one in inside:
            if one.parent == parent or (not parent and one.parent not in known):
                yield depth, one
                yield from below(one.span, depth + 1)

    return list(below("", 0))


def picture(spans: list[TakenSpan], trace: str) -> str:
    """One trace as text: start and length in milliseconds, name, service. Triton's time in a queue has its own line."""
    rows = tree(spans, trace)
    first = rows[0][1].start
    lines = [" start     ms  span"]
    for depth, one in rows:
        name = "  " * depth + one.name
        lines.append(f"{(one.start - first) / 1e6:6.1f} {(one.end - one.start) / 1e6:6.1f}  {name:<38} {one.service}")
        computing = [other.start for _, other in rows if other.parent == one.span and other.name == "compute"]
        if "QUEUE_START" in one.events and computing:
            since, name = one.events["QUEUE_START"], "  " * (depth + 1) + "(queue)"
            lines.append(f"{(since - first) / 1e6:6.1f} {(computing[0] - since) / 1e6:6.1f}  {name:<38} {one.service}")
    return "\n".join(line.rstrip() for line in lines)
