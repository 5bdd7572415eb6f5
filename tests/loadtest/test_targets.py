"""What a load test makes of answers that are none: a failed request each, and never the end of a simulated caller."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from clients.triton.connection import TritonConnection
from loadtest._request_pool import RankRequest
from loadtest._server_metrics import ServerMetrics, difference, scrape, settled
from loadtest._targets import RequestFailed, RouterTarget, TritonTarget
from tests.helpers.broken_http import BROKEN_ANSWERS, answering

REQUEST = RankRequest(number=0, query="q", doc_ids=["a", "b"], titles=["t", "u"], summaries=["", ""])


@pytest.mark.parametrize("name", BROKEN_ANSWERS)
def test_a_broken_answer_is_a_failed_request(name):
    """Seen: most of these ended the simulated caller, who then sent no more: the rest of the run was too easy."""
    with answering(BROKEN_ANSWERS[name]) as address:
        triton = [TritonTarget(TritonConnection(f"{scheme}://{address}"), 3000) for scheme in ("http", "grpc")]
        for target in (*triton, RouterTarget(address, 3000, users=10)):
            with pytest.raises(RequestFailed):
                target.send("student", REQUEST)


@pytest.mark.parametrize("name", BROKEN_ANSWERS)
def test_a_broken_metrics_page_is_said_in_the_result(name):
    with answering(BROKEN_ANSWERS[name]) as address:
        found = scrape(address)
    assert found.counters == {} and difference(found, found) in ({}, {"unavailable": found.reason})


def test_a_request_that_the_server_counts_after_its_answer_is_waited_for(monkeypatch):
    looks = iter([7, 8, 9, 9])
    counted = lambda url: ServerMetrics({"m": {"nv_inference_count": next(looks)}})  # noqa: E731
    monkeypatch.setattr("loadtest._server_metrics.scrape", counted)
    assert settled("a page that is slow").counters == {"m": {"nv_inference_count": 9}}


def test_counters_that_are_no_numbers_are_passed_over():
    lines = b"".join(b'nv_inference_count{model="m"} %s\n' % value for value in (b"1e999", b"1-2", b"+", b"7", b"1e1"))
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(lines), lines)) as address:
        assert scrape(address).counters == {"m": {"nv_inference_count": 17.0}}


def test_a_grpc_server_that_comes_back_is_noticed_within_a_second():
    """Seen: gRPC tried a server that was starting anew after 1, 1.6, 2.6 s and so on to two minutes, and whatever was
    sent until then had failed: three times in four seconds here."""
    tried = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            while True:
                try:
                    caller, _ = listener.accept()
                except OSError:  # the test is over
                    return
                caller.close()
                tried.append(time.monotonic())

        threading.Thread(target=hang_up, daemon=True).start()
        target = TritonTarget(TritonConnection(f"127.0.0.1:{listener.getsockname()[1]}"), 3000)
        deadline = time.monotonic() + 4
        while len(tried) < 5 and time.monotonic() < deadline:
            with pytest.raises(RequestFailed):
                target.send("student", REQUEST)
            time.sleep(0.02)
        listener.shutdown(socket.SHUT_RDWR)
    assert len(tried) >= 5
