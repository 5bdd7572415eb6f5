"""Spans: nothing of OpenTelemetry where they are off, nobody waits for a collector, what is lost is counted."""

from __future__ import annotations

import io
import json
import logging
import socket
import subprocess
import sys
import threading
import time

import pytest

from ranking import telemetry, tracing
from ranking.errors import InputError
from ranking.telemetry import TelemetrySettings
from tests.helpers.collector import arrows, collector

CALLER = {"traceparent": "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")


KEPT = socket.socket()  # bound and never listening: nobody answers there, and nobody else can take the port
KEPT.bind(("127.0.0.1", 0))
NOBODY = f"http://127.0.0.1:{KEPT.getsockname()[1]}"


def test_programs_import_nothing_of_opentelemetry_until_tracing_is_on():
    source = (
        "import sys, clients.ab_router, clients.label_corpus, clients.label_over_http\n"
        "from ranking import tracing\n"
        "with tracing.span('a') as span: span.set(x=1)\n"
        "assert span is tracing.NO_SPAN and tracing.headers() == tracing.ids() == {} and tracing.dropped() == 0\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_spans_nest_continue_a_callers_trace_and_say_what_failed(monkeypatch):
    with collector() as taken:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", taken.url)
        with tracing.started("a-program"):
            with tracing.continued("page", CALLER, "server") as page, tracing.span("infer", documents=3):
                own = tracing.headers()["traceparent"]
                page.set(status=200)
            with pytest.raises(ValueError), tracing.span("alone"):
                raise ValueError("a private text")
            tracing.past("ask", 0.5)
        spans = taken.wait(lambda all_: len(all_) == 4)
    trace = "ab" * 16
    assert arrows(spans, trace) == {("", "page", "a-program"), ("page", "infer", "a-program")}
    page, infer, alone, ask = (next(s for s in spans if s.name == n) for n in ("page", "infer", "alone", "ask"))
    assert own == f"00-{trace}-{infer.span}-01" and page.parent == "cd" * 8
    assert (page.attributes, infer.attributes) == ({"disranker.status": "200"}, {"disranker.documents": "3"})
    assert alone.failed and not page.failed and "private" not in str(spans)
    assert alone.trace not in (trace, ask.trace) and 0.5e9 <= ask.end - ask.start < 30e9


@pytest.mark.parametrize("field", ["", "00-zz-01", "00-" + "0" * 32 + "-" + "cd" * 8 + "-01", "\u00e9" * 9000])
def test_a_traceparent_that_is_none_begins_a_trace_of_its_own(field, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", NOBODY)
    with tracing.started("a-program", 0.1), tracing.continued("page", {"traceparent": field}):
        assert tracing.headers()["traceparent"].split("-")[1] not in ("0" * 32, "ab" * 16)


def test_a_trace_that_its_caller_does_not_collect_is_not_collected_here(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", NOBODY)
    with tracing.started("a-program", 0.1):
        with tracing.continued("page", {"traceparent": CALLER["traceparent"][:-1] + "0"}):
            assert tracing.headers() and tracing.sampled_headers() == {}
        assert tracing.dropped() == 0


@pytest.mark.parametrize("state", ["gone", "refuses", "slow"])
def test_nobody_waits_for_a_collector_and_what_it_did_not_take_is_counted(state, monkeypatch, caplog):
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "50")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
    with collector(400 if state == "refuses" else 200, 60 if state == "slow" else 0) as taken:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", NOBODY if state == "gone" else taken.url)
        with tracing.started("a-program", 0.3):
            longest = 0.0
            for _ in range(3000):
                began = time.thread_time()
                with tracing.span("page"):
                    pass
                longest = max(longest, time.thread_time() - began)
            until = time.monotonic() + 60
            while (lost := tracing.dropped()) < 2000 and time.monotonic() < until:
                time.sleep(0.02)
            stopping = time.monotonic()
        assert time.monotonic() - stopping < 30  # the slow collector takes a minute
    assert lost >= 2000 and longest < 0.25
    assert any("spans were dropped" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://:4318"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:port"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_TRACES_EXPORTER", "console"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
        ("OTEL_BSP_SCHEDULE_DELAY", "0"),
    ],
)
def test_a_variable_that_makes_no_sense_is_named_at_the_start(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"{variable} is '{value}'"), tracing.started("a-program"):
        pass
    assert not tracing.is_on()


def test_without_the_extra_tracing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(InputError, match=r"pip install 'disranker\[tracing\]'"), tracing.started("a-program"):
        pass


def test_a_log_line_is_json_with_the_ids_of_its_request(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", NOBODY)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    logger = logging.getLogger("of-a-test")
    with TelemetrySettings(log_format="json", tracing=True).telemetry("a-program"):
        with tracing.continued("page", CALLER):
            token = telemetry.request_id.set("r\udc9f1")
            logger.warning("it is %d\nlines", 2, extra={"fields": {"arm": "student"}})
            telemetry.request_id.reset(token)
        try:
            raise KeyError("x")
        except KeyError:
            logger.exception("failed")
    first, second = (json.loads(line) for line in sys.stderr.getvalue().splitlines()[:2])
    assert (first["message"], first["level"], first["logger"]) == ("it is 2\nlines", "warning", "of-a-test")
    assert (first["request_id"], first["trace_id"], first["arm"]) == ("r\udc9f1", "ab" * 16, "student")
    assert "KeyError" in second["exception"] and "request_id" not in second and "trace_id" not in second


def test_a_reader_of_the_log_that_stalls_holds_nobody_up_and_loses_are_counted(monkeypatch):
    goes_on = threading.Event()
    written: list[str] = []

    class Stalled(io.StringIO):
        def write(self, text: str) -> int:
            goes_on.wait(30)
            written.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stderr", Stalled())
    monkeypatch.setattr(telemetry, "LINES_WAITING", 10)
    logger = logging.getLogger("of-a-test")
    with telemetry.json_logs():
        for number in range(100):
            logger.warning("%d", number)
        goes_on.set()
        until = time.monotonic() + 20
        while len(written) < 10 and time.monotonic() < until:
            time.sleep(0.01)
        logger.warning("the last")
    lines = [json.loads(line) for line in "".join(written).splitlines()]
    assert lines[-1]["message"] == "the last" and 85 <= lines[-1]["lines_left_out"] <= 90
    assert len(lines) + lines[-1]["lines_left_out"] == 101


def test_a_reader_of_the_log_that_never_goes_on_does_not_keep_the_process(monkeypatch):
    """Seen: the end of the block waited for it without end, or failed where the lines filled the queue."""
    read_on = threading.Event()

    class Stalled(io.StringIO):
        def write(self, text: str) -> int:
            read_on.wait(30)
            return len(text)

    monkeypatch.setattr(sys, "stderr", Stalled())
    monkeypatch.setattr(telemetry, "LINES_WAITING", 10)
    monkeypatch.setattr(telemetry, "STOP_SECONDS", 0.2)
    started = time.monotonic()
    with telemetry.json_logs():
        for number in range(100):
            logging.getLogger("of-a-test").warning("%d", number)
    assert time.monotonic() - started < 25
    read_on.set()
