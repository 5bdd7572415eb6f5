"""Requests made up from the OpenAPI page, to a running router; the long run is benchmarks/ab/generated_requests.py."""

from __future__ import annotations

import httpx

from benchmarks.ab.generated_requests import Tally, send_made_up
from tests.clients.ab.router.test_hostile_callers import running
from tests.helpers.stub_ranker import StubRanker


def test_every_answer_is_one_that_the_page_documents_and_no_request_holds_the_loop(tmp_path):
    """Seen: bodies of many values blocked the loop for seconds; statuses beyond 200 stood nowhere in the page."""
    pauses: list[float] = []
    with (
        StubRanker() as ranker,
        running(tmp_path, ranker.url) as router,
        httpx.Client(base_url=router.url, timeout=60, trust_env=False) as client,
    ):

        def after(tally: Tally) -> None:
            pauses.append(max(router.pauses, default=0.0))
            router.pauses.clear()

        router.pauses.clear()
        page = client.get("/openapi.json").json()  # making this page is no reason to hold up others either
        assert max(router.pauses) < 0.05
        router.pauses.clear()
        tally = send_made_up(page, client, 300, after)
        assert client.get("/health/live").status_code == 200
    assert tally.wrong == [] and tally.requests == 300
    assert tally.statuses["200"] > 30 and tally.statuses["422"] > 30 and tally.statuses["400"] > 3
    assert not [status for status in tally.statuses if status.startswith("5") and status != "503"]
    assert sorted(pauses)[-3] < 0.05, sorted(pauses)[-5:]  # the collector of garbage may strike once or twice
