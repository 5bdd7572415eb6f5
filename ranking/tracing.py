"""Spans of this process for an OpenTelemetry collector, in one trace with the caller's and with Triton's.

    with tracing.started("disranker-router"):
        with tracing.span("assign", documents=48):
            ...

Until started() every span is an empty block: nothing of OpenTelemetry is imported then (the extra `tracing` has it).
Spans wait for the collector in a bounded queue that a thread empties; what does not fit, or is not taken, is dropped
and counted, so nobody waits for a collector. No span holds a text of a query or document, nor a user's id.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from ranking.errors import InputError

logger = logging.getLogger("tracing")

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"  # the fields of W3C Trace Context
Kind = Literal["internal", "server", "client"]
_QUEUE, _BATCH, _DELAY_MS = 2048, 512, 5000  # what OpenTelemetry's specification has where OTEL_BSP_* says nothing


class Span(Protocol):
    """A block of work under way."""

    def set(self, **attributes: str | int | float | bool) -> None:
        """Add attributes; their names get `disranker.` before them."""

    def end(self) -> None:
        """End it before its block does; a second end changes nothing."""

    def __enter__(self) -> Span: ...

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class _NoSpan:
    """What every span is while tracing is off, and where the caller asked for no trace."""

    def set(self, **attributes: str | int | float | bool) -> None:
        pass

    def end(self) -> None:
        pass

    def __enter__(self) -> _NoSpan:
        return self

    def __exit__(self, *problem: object) -> None:
        pass


NO_SPAN = _NoSpan()
_active: _Tracer | None = None


def is_on() -> bool:
    """Whether spans of this process are collected."""
    return _active is not None


def span(name: str, kind: Kind = "internal", **attributes: str | int | float | bool) -> Span:
    """A part of what this task is doing, its start and end those of the `with` block."""
    return NO_SPAN if _active is None else _active.span(name, kind, None, attributes)


def continued(
    name: str, carrier: Mapping[str, str], kind: Kind = "internal", **attributes: str | int | float | bool
) -> Span:
    """A span that continues the trace which carrier's `traceparent` names; the first of a new trace if it names none.

    carrier: keys in lower case. What is no W3C trace context is passed over, as the standard asks.
    """
    return NO_SPAN if _active is None else _active.span(name, kind, carrier, attributes)


def past(name: str, seconds: float, **attributes: str | int | float | bool) -> None:
    """A span of what ended just now and took so long, for work that is not one block: a request and its late answer."""
    if _active is not None:
        _active.past(name, seconds, attributes)


def headers() -> dict[str, str]:
    """`traceparent` (and `tracestate`) of the span that this task is in; empty outside of a trace."""
    return {} if _active is None else _active.headers()


def sampled_headers() -> dict[str, str]:
    """As headers(), and empty where the trace is not collected."""
    return {} if _active is None or not _active.sampled() else _active.headers()


def ids() -> dict[str, str]:
    """`trace_id` and `span_id` of the span that this task is in, for its log lines; empty outside of a trace."""
    return {} if _active is None else _active.ids()


def dropped() -> int:
    """Spans that no collector has: the queue was full, or the collector took none."""
    return 0 if _active is None else _active.dropped


@contextmanager
def started(service: str, stop_seconds: float = 2.0) -> Iterator[None]:
    """Collect spans during the block; at its end the collector gets at most stop_seconds to take the last ones.

    service: name of the process among others, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES names it. Where the
    collector is and how spans are sampled is said by OpenTelemetry's own variables. InputError names one that makes no
    sense, and the extra that is missing.
    """
    global _active
    _active = begin(service)
    try:
        yield
    finally:
        tracer, _active = _active, None
        tracer.stop(stop_seconds)


def begin(service: str) -> _Tracer:
    """A tracer that its owner stops. InputError as of started()."""
    endpoint = collector(os.environ)
    queue = _whole_number("OTEL_BSP_MAX_QUEUE_SIZE", _QUEUE)
    batch = min(_whole_number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", _BATCH), queue)
    delay_ms = _whole_number("OTEL_BSP_SCHEDULE_DELAY", _DELAY_MS)
    try:
        return _Tracer(service, endpoint, queue, batch, delay_ms)
    except ModuleNotFoundError as problem:
        raise InputError(f"tracing needs {problem.name}: pip install 'disranker[tracing]'") from problem


def collector(environment: Mapping[str, str]) -> str:
    """The address that spans are sent to, by OpenTelemetry's variables. InputError names one that makes no sense."""
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if environment.get(name, "http/protobuf") != "http/protobuf":
            raise InputError(f"{name} is {environment[name]!r}: http/protobuf is what spans are sent by")
    if environment.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        raise InputError(f"OTEL_TRACES_EXPORTER is {environment['OTEL_TRACES_EXPORTER']!r}: otlp is the one there is")
    name = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    address = environment.get(name, "")
    if not address:
        name = "OTEL_EXPORTER_OTLP_ENDPOINT"
        address = (environment.get(name) or "http://localhost:4318").rstrip("/") + "/v1/traces"
    try:
        parts = urlsplit(address)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise InputError(f"{name} is {environment[name]!r}: an address such as http://localhost:4318 is needed")
    return address


def _whole_number(name: str, default: int) -> int:
    text = os.environ.get(name, "") or str(default)
    if not text.isdecimal() or not int(text):
        raise InputError(f"{name} is {text!r}: a whole number above 0 is needed")
    return int(text)


class _Tracer:
    """OpenTelemetry's SDK as this module uses it."""

    def __init__(self, service: str, endpoint: str, queue: int, batch: int, delay_ms: int):
        from opentelemetry import context, trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        tracer = self
        self.context, self.trace, self.endpoint = context, trace, endpoint
        self._propagator = TraceContextTextMapPropagator()
        # each is written by one thread: the first two by those that end spans, the others by the exporter's
        self.queued = self.overflowed = 0
        self.taken = self.failed = 0
        self._failing = False

        class Exporter(SpanExporter):
            """OTLP over HTTP, with a count of what the collector did not take."""

            def __init__(self) -> None:
                self._inner = OTLPSpanExporter(endpoint)

            def export(self, spans):
                tracer.taken += len(spans)
                result = self._inner.export(spans)
                tracer.note(len(spans), result is not SpanExportResult.SUCCESS)
                return result

            def shutdown(self) -> None:
                self._inner.shutdown()

        class Processor(SpanProcessor):
            """OpenTelemetry's batches, with a count of what found no room in their queue."""

            def __init__(self) -> None:
                self.inner = BatchSpanProcessor(Exporter(), queue, delay_ms, batch)

            def on_end(self, span: ReadableSpan) -> None:
                if tracer.queued - tracer.taken >= queue:
                    tracer.overflowed += 1
                    return
                tracer.queued += 1
                self.inner.on_end(span)

            def shutdown(self) -> None:
                self.inner.shutdown()

        # it has a line for every batch that the collector refuses, retries included; note() has one for all of them
        logging.getLogger("opentelemetry.exporter.otlp.proto.http").setLevel(logging.CRITICAL)
        self._provider = TracerProvider(
            resource=Resource.create({} if _is_named(os.environ) else {SERVICE_NAME: service}),
            shutdown_on_exit=False,
        )
        self._processor = Processor()
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("disranker")
        self._kinds = {
            "internal": trace.SpanKind.INTERNAL, "server": trace.SpanKind.SERVER, "client": trace.SpanKind.CLIENT,
        }  # fmt: skip

    @property
    def dropped(self) -> int:
        return self.overflowed + self.failed

    def note(self, count: int, failed: bool) -> None:
        """Count an answer of the collector; a line when it begins to fail, and one when it works again."""
        if failed:
            self.failed += count
        if failed != self._failing:
            self._failing = failed
            state = "does not take spans: they are dropped and counted" if failed else "takes spans again"
            logger.warning("the collector %s %s", self.endpoint, state)

    def span(self, name: str, kind: Kind, carrier: Mapping[str, str] | None, attributes: Mapping[str, Any]) -> _Span:
        """A span within the one that this task is in, or continuing carrier's trace."""
        parent = None
        if carrier is not None:
            # an empty context, or a carrier without a trace would continue the task's own
            parent = self._propagator.extract(carrier, self.context.Context())
        return _Span(self, name, self._kinds[kind], parent, attributes)

    def start(self, name: str, kind: Any, parent: Any) -> Any:
        return self._tracer.start_span(name, parent, kind, record_exception=False, set_status_on_exception=False)

    def past(self, name: str, seconds: float, attributes: Mapping[str, Any]) -> None:
        start = time.time_ns() - int(seconds * 1e9)
        named = {f"disranker.{key}": value for key, value in attributes.items()}
        self._tracer.start_span(name, attributes=named, start_time=start).end()

    def headers(self) -> dict[str, str]:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return carrier

    def sampled(self) -> bool:
        return self.trace.get_current_span().get_span_context().trace_flags.sampled

    def ids(self) -> dict[str, str]:
        here = self.trace.get_current_span().get_span_context()
        if not here.is_valid:
            return {}
        return {
            "trace_id": self.trace.format_trace_id(here.trace_id),
            "span_id": self.trace.format_span_id(here.span_id),
        }

    def stop(self, seconds: float) -> None:
        """Send what waits, within these seconds."""
        # a collector that is not there is tried again for longer than a stop may take; the thread ends with the process
        flush = threading.Thread(target=self._provider.shutdown, daemon=True)
        flush.start()
        flush.join(seconds)
        lost = self.dropped + (self.queued - self.taken)
        if lost:
            logger.warning("%d spans were dropped: the collector %s did not take them", lost, self.endpoint)


def _is_named(environment: Mapping[str, str]) -> bool:
    return bool(environment.get("OTEL_SERVICE_NAME")) or "service.name=" in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )


class _Span:
    """One span of OpenTelemetry as a `with` block, the current one of its task meanwhile."""

    def __init__(self, tracer: _Tracer, name: str, kind: Any, parent: Any, attributes: Mapping[str, Any]):
        self._tracer, self._name, self._kind, self._parent = tracer, name, kind, parent
        self._attributes, self._ended = attributes, False

    def __enter__(self) -> _Span:
        self._span = self._tracer.start(self._name, self._kind, self._parent)
        self.set(**self._attributes)
        self._token = self._tracer.context.attach(self._tracer.trace.set_span_in_context(self._span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            # the name alone: a reason may quote what the caller sent
            self._span.set_status(self._tracer.trace.StatusCode.ERROR, kind.__name__)
        self._tracer.context.detach(self._token)
        self.end()

    def set(self, **attributes: str | int | float | bool) -> None:
        for name, value in attributes.items():
            self._span.set_attribute(f"disranker.{name}", value)

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            self._span.end()
