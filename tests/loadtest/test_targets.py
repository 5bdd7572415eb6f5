"""What a load test makes of answers that are none: a failed request each, and never the end of a simulated caller."""

from __future__ import annotations

import pytest

from loadtest._request_pool import RankRequest
from loadtest._server_metrics import difference, scrape
from loadtest._targets import GrpcTarget, HttpTarget, RequestFailed, RouterTarget
from tests.helpers.broken_http import BROKEN_ANSWERS, answering

REQUEST = RankRequest(number=0, query="q", doc_ids=["a", "b"], titles=["t", "u"], summaries=["", ""])


@pytest.mark.parametrize("name", BROKEN_ANSWERS)
def test_a_broken_answer_is_a_failed_request(name):
    """Seen: most of these ended the simulated caller, who then sent no more: the rest of the run was too easy."""
    with answering(BROKEN_ANSWERS[name]) as address:
        for target in (HttpTarget(address, 3000), RouterTarget(address, 3000, users=10), GrpcTarget(address, 3000)):
            with pytest.raises(RequestFailed):
                target.send("student", REQUEST)


@pytest.mark.parametrize("name", BROKEN_ANSWERS)
def test_a_broken_metrics_page_is_said_in_the_result(name):
    with answering(BROKEN_ANSWERS[name]) as address:
        found = scrape(address)
    assert found.counters == {} and difference(found, found) in ({}, {"unavailable": found.reason})


def test_counters_that_are_no_numbers_are_passed_over():
    lines = b"".join(b'nv_inference_count{model="m"} %s\n' % value for value in (b"1e999", b"1-2", b"+", b"7", b"1e1"))
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(lines), lines)) as address:
        assert scrape(address).counters == {"m": {"nv_inference_count": 17.0}}
