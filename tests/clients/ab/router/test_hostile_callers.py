"""One caller, one disk or one peer must not take the router down: each test's docstring says what was seen before."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPResponse, IncompleteRead
from pathlib import Path

import grpc
import httpx
import pytest
import uvicorn

from clients.ab.router.body import BodyRefused, ValueCount
from clients.ab.router.http_app import create_app
from clients.ab.router.http_protocol import MOST_WAITING, limited_protocol
from clients.ab_router import Config
from tests.helpers.stub_ranker import EXPERIMENT, StubRanker, TcpProxy

GUARDED = EXPERIMENT + "    guardrails: {min_pages: 5, window_seconds: 60, max_p99_ms: 60000}\n"
PAGE = {"user_id": "tester", "query": "alpha", "documents": [{"doc_id": d, "title": f"t{d}"} for d in "abc"]}


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


class Running:
    """A router on a port of its own. url, service; pauses: processor seconds of each step of its event loop."""

    def __init__(self, config: Config):
        self._app = create_app(config, config, "the router")
        settings = uvicorn.Config(
            self._app, "127.0.0.1", 0, log_config=None, ws="none", loop="asyncio",
            http=limited_protocol(config, lambda: self._app.state.service.metrics),
        )  # fmt: skip
        self._server = uvicorn.Server(settings)
        self.pauses: list[float] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        run, pauses = asyncio.events.Handle._run, self.pauses
        thread = threading.get_ident()

        def timed(handle) -> None:
            started = time.thread_time()  # not the wall's clock: a busy machine is not the router's pause
            run(handle)
            if threading.get_ident() == thread:
                pauses.append(time.thread_time() - started)

        asyncio.events.Handle._run = timed
        try:
            self._server.run()
        finally:
            asyncio.events.Handle._run = run

    def __enter__(self) -> Running:
        self._thread.start()
        until(lambda: self._server.started or not self._thread.is_alive())
        assert self._thread.is_alive()
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        self.service = self._app.state.service
        return self

    def __exit__(self, *problem) -> None:
        self._server.should_exit = True
        self._thread.join(30)

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=20)

    def rank(self, **changes) -> httpx.Response:
        return httpx.post(f"{self.url}/rank", json=PAGE | changes, timeout=30)

    def metric(self, start: str) -> float:
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start))


@pytest.fixture
def ranker() -> Iterator[StubRanker]:
    with StubRanker() as stub:
        yield stub


@contextmanager
def running(folder: Path, url: str, **settings) -> Iterator[Running]:
    (folder / "e.yaml").write_text(GUARDED)
    chosen = {
        "experiment": folder / "e.yaml",
        "url": url,
        "log": folder / "log",
        "reload_seconds": 0.05,
        "raw_ids": True,
        "deadline_ms": 20_000.0,
        "log_wait_ms": 60_000.0,  # however slow the disk is beside other tests
    }
    with Running(Config(**chosen | settings)) as router:
        yield router


def test_a_page_that_the_model_calls_wrong_is_the_callers_fault_alone(tmp_path, ranker):
    """Seen: 24 pages that the front model called INVALID_ARGUMENT opened the breakers of all arms for every user."""
    with running(tmp_path, ranker.url) as router:
        for number in range(60):
            answer = router.rank(query="refuse me", user_id=f"user {number}")
            assert answer.status_code == 422 and "this page is wrong" in answer.json()["detail"]
        good = router.rank().json()
        assert (good["served_by"], good["fallback"], good["ranking"]) == ("student", "", ["c", "b", "a"])
        health = httpx.get(f"{router.url}/health", timeout=30).json()
        assert health["status"] == "ok" and set(health["breakers"].values()) == {"closed"}
        assert not router.service.watch.ramps
        refused = {m: router.metric(f'ab_model_calls_total{{model="{m}",outcome="refused"}}') for m in ranker.asked}
        assert sum(refused.values()) == 60 and min(refused["student"], refused["baseline"]) >= 15
        assert ranker.asked.total() == 61  # no other model was asked about a wrong page
        assert all(0 < timeout <= 20_000_000 for timeout in ranker.timeouts)


def test_the_limit_of_documents_is_the_served_models_own(tmp_path):
    """Seen: the router took 1000 documents, the model fewer, and each such page counted against the model."""
    with StubRanker(max_documents=2) as ranker, running(tmp_path, ranker.url) as router:
        until(lambda: router.rank().status_code == 422)
        asked = ranker.asked.total()
        answer = router.rank()
        assert answer.json()["detail"].startswith("documents: 3 are given, ")
        assert ranker.asked.total() == asked
        assert router.rank(documents=PAGE["documents"][:2]).json()["served_by"] == "student"


BODIES = {
    "zeros": b'{"user_id":"u","query":"q","documents":[' + b"0," * 4_100_000 + b"0]}",
    "a megabyte of zeros": b'{"user_id":"u","query":"q","documents":[' + b"0," * 500_000 + b"0]}",
    "keys": b'{"user_id":"u","query":"q",' + b",".join(b'"k%d":1' % i for i in range(250_000)) + b"}",
    "allowed number of keys": b"{" + b",".join(b'"k%d":1' % i for i in range(4_000)) + b"}",
    "empty texts": b'{"user_id":"u","query":"q","documents":[' + b'"",' * 900_000 + b'""]}',
    "brackets": b"[" * 3_900_000,
    "a number": b'{"documents":' + b"1" * 3_900_000 + b"}",
    "backslashes": b'{"user_id":"' + b"\\\\" * 1_900_000 + b'"}',
    "quotes": b'{"user_id":"' + b'\\"' * 1_900_000 + b'"}',
    "spaces": b'{"user_id":' + b" " * 3_900_000 + b"1}",
    "events": json.dumps({"events": [{"request_id": "r", "doc_id": "d", "type": "click"}] * 1000}).encode(),
    "invisible ids": json.dumps({**PAGE, "query": "\u200b" * 300_000}, ensure_ascii=False).encode(),
    "a large page": json.dumps(
        {**PAGE, "documents": [{"doc_id": str(i), "title": "x" * 100, "summary": "word " * 600} for i in range(1000)]}
    ).encode(),
}


@pytest.mark.parametrize("name", BODIES)
def test_no_body_holds_the_loop_for_50_ms(tmp_path, ranker, name):
    """Seen: 8.4 MB of `0,` blocked the router for 24 s and took 3.8 GB; 1 MB took 2.8 s."""
    with running(tmp_path, ranker.url) as router:
        assert router.rank().status_code == 200
        path = "/events" if name == "events" else "/rank"
        head = {"content-type": "application/json"}
        shortest = []
        for _ in range(3):  # the shortest of three: the collector of garbage may strike once
            router.pauses.clear()
            try:
                answer = httpx.post(router.url + path, content=BODIES[name], headers=head, timeout=60)
                assert answer.status_code == (200 if name in ("events", "a large page") else answer.status_code)
                assert answer.status_code in (200, 400, 413, 422), answer.text
            except httpx.WriteError:  # refused and closed before the whole body was sent
                pass
            shortest.append(max(router.pauses))
        assert min(shortest) < 0.05, shortest


def test_values_are_counted_alike_however_a_body_is_cut():
    """The count is kept over pieces, which may end inside a text or between a backslash and what it escapes."""
    body = json.dumps({"a": ['x,"\\', "{[:", {"b\\": [1, 2, None]}], "": '\\"'}).encode()
    counts = set()
    for size in range(1, len(body) + 1):
        count = ValueCount(100)
        for start in range(0, len(body), size):
            count.feed(body[start : start + size])
        counts.add(count.count)
    assert counts == {12}
    with pytest.raises(BodyRefused, match="too many values"):
        ValueCount(10).feed(b"0," * 11)


def test_slow_uploads_cost_no_coverage_and_open_no_breaker(tmp_path, ranker):
    """Seen: the deadline ran during the upload: 230 slow ones ramped the coverage down and opened the breaker."""
    head = b"POST /rank HTTP/1.1\r\nHost: r\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with running(tmp_path, ranker.url) as router:
        slow = {router.connect(): json.dumps(PAGE | {"user_id": f"user {number}"}).encode() for number in range(60)}
        for connection, body in slow.items():
            connection.sendall(head % len(body) + body[:10])
        time.sleep(1.0)
        answers = []
        for connection, body in slow.items():
            connection.sendall(body[10:])
            response = HTTPResponse(connection)
            response.begin()
            answers.append(json.loads(response.read()))
            connection.close()
        assert {(a["served_by"], a["fallback"]) for a in answers} == {("student", ""), ("baseline", "")}
        assert 19e6 < max(ranker.timeouts) <= 20e6  # microseconds: the second of the upload was not taken off
        assert not router.service.watch.ramps
        breakers = httpx.get(f"{router.url}/health", timeout=30).json()["breakers"]
        assert breakers == {"student": "closed", "baseline": "closed"}


def test_a_body_that_does_not_come_is_refused(tmp_path, ranker):
    """Seen: an upload that stopped half-way was waited for without end."""
    with running(tmp_path, ranker.url, receive_seconds=0.3) as router, router.connect() as connection:
        connection.sendall(
            b"POST /rank HTTP/1.1\r\nHost: r\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408 ")


def test_bodies_that_stall_keep_nobody_elses_out(tmp_path, ranker):
    """Seen: one caller's bodies without their last byte filled the memory for bodies; all others got 503 for 10 s."""
    half = b"POST /rank HTTP/1.1\r\nHost: r\r\nContent-Type: application/json\r\nContent-Length: 400001\r\n\r\n"
    half += b'{"query":"' + b"x" * 399_990
    with running(tmp_path, ranker.url, max_body_mb=1.0, max_buffered_mb=1.0, receive_seconds=60.0) as router:
        slow, page = [router.connect() for _ in range(4)], json.dumps(PAGE).encode()
        for connection in slow:
            connection.sendall(post(page) + page[:9])
        time.sleep(0.2)
        stalled = [router.connect() for _ in range(6)]
        for connection in stalled:
            connection.sendall(half)
        for connection in stalled[:4]:  # those that began first make room
            answer = connection.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 503 ") and b"connection: close" in answer
        for number in range(8):
            large = [{"doc_id": d, "title": d * 60, "summary": d * 60_000} for d in "abcde"]
            assert router.rank(user_id=f"user {number}", documents=large).status_code == 200
        assert router.metric('ab_refused_total{status="503"}') >= 4
        for connection in slow:  # older, but small: it is not they who fill the memory
            connection.sendall(page[9:])
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        for connection in (*slow, *stalled):
            connection.close()


def test_one_users_large_pages_cost_nobody_else_the_model(tmp_path):
    """Seen: pages of 1000 documents, late each time, opened the breaker for all and ramped the experiment down."""

    with LateRanker() as ranker, running(tmp_path, ranker.url) as router:
        for number in range(30):
            late = router.rank(documents=LARGE).json()
            assert (late["arm"], late["fallback"], late["served_by"]) == ("student", "timeout", "incoming")
            other = router.rank(user_id=f"user {number}").json()
            assert (other["served_by"], other["fallback"]) == (other["arm"], "")
        health = httpx.get(f"{router.url}/health", timeout=30).json()
        assert health["status"] == "ok" and set(health["breakers"].values()) == {"closed"}
        texts = {"query": "alpha", "documents": ["t"] * 200}
        for _ in range(12):  # seen: where the caller names no user, each page counted as a user of its own
            assert httpx.post(f"{router.url}/v1/rerank", json=texts, timeout=30).json()["meta"]["fallback"] == "timeout"
        health = httpx.get(f"{router.url}/health", timeout=30).json()
        assert set(health["breakers"].values()) == {"closed"}


def test_pages_whose_model_was_not_asked_count_for_no_guardrail(tmp_path, ranker):
    """Seen: pages without time left counted as failures of an arm whose model was never asked."""
    with running(tmp_path, ranker.url, deadline_ms=0.5) as router:
        answers = [router.rank().json() for _ in range(20)]
        time.sleep(0.3)
        assert {a["fallback"] for a in answers} == {"timeout"} and not ranker.asked
        assert not router.service.watch.ramps and not router.service.watch._windows


def test_a_slow_disk_does_not_hold_the_answers(tmp_path, ranker, monkeypatch):
    """Seen: an fdatasync of 6 s kept answers for 6 to 12 s, with health `ok` and 0.2 s in the log."""
    sync, goes_on = os.fdatasync, threading.Event()
    goes_on.set()

    def stalled(descriptor: int) -> None:
        goes_on.wait(60)
        sync(descriptor)

    monkeypatch.setattr("clients.ab.log.writer.os.fdatasync", stalled)
    with running(tmp_path, ranker.url, log_wait_ms=100.0, log_queue_mb=0.01) as router:
        until(lambda: router.rank().json()["logged"] is True)  # a disk that others use may be slow, too
        failures = router.metric("ab_log_failures_total")
        goes_on.clear()
        answer = router.rank().json()  # the disk stands still until the end of this test
        assert answer["logged"] == "pending" and answer["latency_ms"] >= 100
        health = httpx.get(f"{router.url}/health", timeout=30).json()
        assert health["status"] == "degraded" and "a write takes" in health["log_error"]
        assert router.metric("ab_log_stalled_seconds") > 0.1 and router.metric("ab_log_waiting_records") >= 1
        event = {"events": [{"request_id": "r", "doc_id": "a", "type": "click"}]}
        assert httpx.post(f"{router.url}/events", json=event, timeout=30).status_code == 503
        large = [{"doc_id": d, "summary": d * 9000} for d in "ab"]
        assert router.rank(documents=large).json()["logged"] is False  # the queue is full: known at once
        goes_on.set()
        assert router.metric("ab_log_pending_total") >= 2 and router.metric("ab_log_failures_total") == failures + 1


def test_a_connection_that_went_silent_is_replaced(tmp_path, ranker):
    """Seen: after a peer went silent all pages stayed unranked for 75 s and longer; one connection was ever opened."""
    settings = {"deadline_ms": 300.0, "arm_share": 0.9, "breaker_cooldown_seconds": 0.2}
    with TcpProxy(ranker.url) as proxy, running(tmp_path, proxy.url, **settings) as router:
        until(lambda: router.rank().json()["served_by"] == "student")
        proxy.freeze()
        assert router.rank().json()["fallback"] == "timeout"
        until(lambda: router.rank().json()["served_by"] == "student")
        assert proxy.connections >= 2 and router.metric("ab_connection_renewals_total") >= 1


def test_half_sent_heads_are_closed_and_long_ones_refused(tmp_path, ranker):
    """Seen: 400 of 400 half-sent requests were still open after 20 s; 20 MB of headers were accepted."""
    with running(tmp_path, ranker.url, header_seconds=0.5) as router:
        half = [router.connect() for _ in range(20)]
        for number, connection in enumerate(half):
            connection.sendall((b"", b"P", b"POST /rank HTTP/1.1\r\nHost: r\r\nX-A: b")[number % 3])
        for connection in half:
            assert connection.recv(100) == b""
            connection.close()
        for long in (b"X-A: " + b"a" * 30_000, b"\r\n".join(b"X-%d: y" % i for i in range(4000))):
            with router.connect() as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: r\r\n" + long + b"\r\n\r\n")
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 431 ")
        with router.connect() as connection:
            sent = 0
            with pytest.raises(OSError):
                connection.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
                while sent < 20_000_000:
                    sent += connection.send(b"a" * 65536)
            assert sent < 8_000_000  # what the kernel's buffers took
        assert router.rank().status_code == 200


def test_a_kept_open_connection_serves_many_requests(tmp_path, ranker):
    """The clock of a head must not close a connection whose requests are complete."""
    with running(tmp_path, ranker.url, header_seconds=0.3) as router, httpx.Client(base_url=router.url) as client:
        for _ in range(4):
            assert client.post("/rank", json=PAGE, timeout=30).status_code == 200
            time.sleep(0.2)


def test_after_a_refused_body_the_connection_serves_on(tmp_path, ranker):
    """Found by made-up requests: the rest of a refused body was taken for a head that is too long."""
    body = b'{"user_id":"u","query":"q","documents":[' + b"{}," * 700_000 + b"0]}"
    head = {"content-type": "application/json"}
    with running(tmp_path, ranker.url) as router, httpx.Client(base_url=router.url, timeout=30) as client:
        for _ in range(5):
            assert client.post("/rank", content=body, headers=head).status_code == 422
            assert client.post("/rank", json=PAGE).status_code == 200


def test_too_many_at_once_get_503_and_other_content_415(tmp_path, ranker):
    """Seen: there was no limit; whatever came was worked on at the same time, and any content type was taken."""
    with running(tmp_path, ranker.url, max_in_flight=1) as router:
        assert httpx.post(f"{router.url}/rank", content=json.dumps(PAGE), timeout=30).status_code == 415

        async def both() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=router.url, timeout=30) as client:
                return await asyncio.gather(*(client.post("/rank", json=PAGE) for _ in range(20)))

        answers = asyncio.run(both())
        assert {a.status_code for a in answers} == {200, 503}
        assert all(a.headers["retry-after"] == "1" for a in answers if a.status_code == 503)


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"


def test_a_request_that_offers_another_protocol_is_answered_as_if_it_did_not(tmp_path, ranker, caplog):
    """Seen: each POST of Java's HttpClient and of `curl --http2` was answered 400, since its body was thrown away."""
    body = json.dumps(PAGE).encode()
    head = b"POST /rank HTTP/1.1\r\nHost: r\r\nContent-Type: application/json\r\n" + H2C
    whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    with running(tmp_path, ranker.url) as router, router.connect() as connection:

        def answered() -> dict:
            response = HTTPResponse(connection)
            response.begin()
            assert response.status == 200
            return json.loads(response.read())

        for request in (whole, chunked):
            for size in (1, 7, len(head) + 1, len(request)):  # however it is cut, and all on one connection
                for start in range(0, len(request), size):
                    connection.sendall(request[start : start + size])
                assert answered()["ranking"] == ["c", "b", "a"]
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: r\r\n" + H2C + b"\r\n" + whole)
        both = b""
        while b'"ranking":["c","b","a"]' not in both:
            both += connection.recv(1 << 16)
        assert both.count(b"HTTP/1.1 200 OK") == 2 and b'{"status":"alive"}' in both
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
        long = {"upgrade": "x" * 20_000, "connection": "upgrade", "content-type": "application/json"}
        assert httpx.post(f"{router.url}/rank", content=body, headers=long).status_code == 431
        connection.sendall(b"CONNECT r:443 HTTP/1.1\r\nHost: r:443\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400 ")


def is_large(request) -> bool:
    return next(tensor.shape[0] for tensor in request.inputs if tensor.name == "title") > 100


class SlowRanker(StubRanker):
    """Keeps pages of more than 100 documents until release(). begun: how many such there were."""

    begun = 0

    async def ModelInfer(self, request, context):
        if is_large(request):
            self.begun += 1
            await self._released.wait()
        return await super().ModelInfer(request, context)

    def __enter__(self):
        self._released = asyncio.Event()
        return super().__enter__()

    def release(self) -> None:
        self.loop.call_soon_threadsafe(self._released.set)


class LateRanker(StubRanker):
    """Says of pages of more than 100 documents that their time is over, as a slow server does, and at once."""

    async def ModelInfer(self, request, context):
        if is_large(request):
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "too late")
        return await super().ModelInfer(request, context)


LARGE = [{"doc_id": str(number), "title": "t"} for number in range(200)]


def post(body: bytes) -> bytes:
    head = b"POST /rank HTTP/1.1\r\nHost: r\r\nContent-Type: application/json\r\nContent-Length: "
    return head + b"%d\r\n\r\n" % len(body)


def test_callers_beyond_the_connections_at_work_are_refused_and_counted_but_the_router_is_still_seen(tmp_path):
    """Seen: refusals were in no metric, so no alert could fire, and the probe that restarts a router got 503 too."""
    body = json.dumps(PAGE | {"documents": LARGE}).encode()
    with SlowRanker() as ranker, running(tmp_path, ranker.url, max_connections=3, deadline_ms=120_000.0) as router:
        held = [router.connect() for _ in range(3)]
        for connection in held:
            connection.sendall(post(body) + body)
        until(lambda: ranker.begun == 3)
        for _ in range(2):
            refused = router.rank()
            assert refused.status_code == 503 and "over 3 connections" in refused.json()["detail"]
            assert refused.headers["retry-after"] == "1" and refused.headers["connection"] == "close"
        assert httpx.get(f"{router.url}/health/live", timeout=30).status_code == 200
        assert httpx.get(f"{router.url}/health/ready", timeout=30).status_code == 503
        assert router.metric('ab_refused_total{status="503"}') == 3
        for connection in held:
            connection.close()
        ranker.release()
        until(lambda: router.rank().status_code == 200)


@pytest.mark.parametrize("held_by", ["idle", "silence", "half a head", "half a body"])
def test_connections_whose_callers_send_nothing_make_room_for_others(tmp_path, ranker, held_by):
    """Seen: 2000 idle connections of one caller, asked once a minute, kept everybody else out."""
    body = json.dumps(PAGE).encode()
    live = b"GET /health/live HTTP/1.1\r\nHost: r\r\n\r\n"
    sent = {"idle": live, "silence": b"", "half a head": live[:-2], "half a body": post(body) + body[:-1]}
    with running(tmp_path, ranker.url, max_connections=4, receive_seconds=60.0, header_seconds=60.0) as router:
        held = [router.connect() for _ in range(12)]
        for connection in held:
            connection.sendall(sent[held_by])
        with httpx.Client(base_url=router.url, timeout=30) as client, router.connect() as half_sent:
            half_sent.sendall(post(body) + body[:9])
            for number in range(8):
                assert client.post("/rank", json=PAGE | {"user_id": f"user {number}"}).status_code == 200
            half_sent.sendall(body[9:])  # younger than those, it was not given up
            assert half_sent.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        closed = 0
        for connection in held:
            connection.settimeout(0.2)
            with connection, suppress(TimeoutError):
                with suppress(ConnectionResetError):
                    while connection.recv(1 << 16):
                        pass
                closed += 1
        assert closed >= 9 and router.metric("ab_given_up_connections_total") >= 9
        assert router.metric('ab_refused_total{status="503"}') == 0


def test_requests_one_behind_the_other_are_not_taken_for_waiting(tmp_path):
    """A connection whose first request is being answered keeps its place, whatever else it has sent."""
    body = json.dumps(PAGE | {"documents": LARGE}).encode()
    settings = {"max_connections": 1, "deadline_ms": 120_000.0}
    with SlowRanker() as ranker, running(tmp_path, ranker.url, **settings) as router, router.connect() as busy:
        busy.sendall(post(body) + body + b"GET /health/live HTTP/1.1\r\nHost: r\r\n\r\nGET /hea")
        until(lambda: ranker.begun)
        assert router.rank().status_code == 503
        ranker.release()
        got = b""
        while b'"alive"' not in got:
            got += busy.recv(1 << 16)
        assert got.startswith(b"HTTP/1.1 200 ") and b'"served_by":"student"' in got
        assert router.rank().status_code == 200 and busy.recv(1 << 16) == b""  # it waited for the rest of the third


def test_requests_without_end_one_behind_the_other_are_answered_up_to_a_limit(tmp_path, ranker):
    """Seen: 5 MB of them, which no key needs, took 290 MB, and the loop stood still for 0.4 s."""
    live = b"GET /health/live HTTP/1.1\r\n\r\n"
    with running(tmp_path, ranker.url) as router, router.connect() as connection:
        connection.sendall(live * (MOST_WAITING + 1))  # so many are as if each had waited for its turn
        got = b""
        while got.count(b'"alive"') <= MOST_WAITING:
            got += connection.recv(1 << 16)
        assert b"connection: close" not in got
        connection.sendall(live * 2000)
        got = b""
        while piece := connection.recv(1 << 16):
            got += piece
        assert got.count(b"HTTP/1.1 200 ") == got.count(b'"alive"') == MOST_WAITING + 1
        assert got.count(b"connection: close") == 1 and b"connection: close" in got.rsplit(b"HTTP/1.1", 1)[1]
        assert router.rank().status_code == 200


def test_a_trailer_names_no_user(tmp_path, ranker):
    """Seen: behind a gateway that takes X-User-Id out of heads a caller named any user, in a trailer."""
    page = json.dumps({"query": "alpha", "documents": ["a", "b"]}).encode()
    head = b"POST /v1/rerank HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with running(tmp_path, ranker.url) as router, router.connect() as connection:
        connection.sendall(head + b"%x\r\n" % len(page) + page + b"\r\n0\r\nX-User-Id: tester\r\n\r\n")
        response = HTTPResponse(connection)
        response.begin()
        assert response.status == 200 and json.loads(response.read())["meta"]["arm"] == ""


def test_a_head_that_begins_behind_a_body_is_no_longer_for_it(tmp_path, ranker):
    """Seen: the body counted as a part of the half head behind it, which was refused as too long."""
    body = json.dumps(PAGE | {"query": "alpha " * 8000}).encode()
    with running(tmp_path, ranker.url) as router, router.connect() as connection:
        connection.sendall(post(body) + body + b"GET /health/live HTTP/1.1\r\nX-A: ")
        got = b""
        while b'"logged":true' not in got:
            got += connection.recv(1 << 16)
        connection.sendall(b"b\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_an_answer_that_nobody_reads_ends_its_connection(tmp_path, ranker):
    """Seen: 80 callers that did not read 4 MB answers kept them in memory, and their connections open, for ever."""
    asked = {"query": "q", "return_documents": True, "documents": [letter * 1_000_000 for letter in "abc"]}
    body = json.dumps(asked).encode()
    head = b"POST /v1/rerank HTTP/1.1\r\nHost: r\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(
        body
    )

    def asking(router: Running, last: bytes) -> socket.socket:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        host, port = router.url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        connection.sendall(head + last + body)
        return connection

    with running(tmp_path, ranker.url, receive_seconds=2.0) as router:
        unread = [asking(router, last) for last in (b"\r\n", b"Connection: close\r\n\r\n")]
        with asking(router, b"\r\n") as late:  # who reads at last gets the whole answer
            time.sleep(0.5)
            response = HTTPResponse(late)
            response.begin()
            assert len(json.loads(response.read())["results"]) == 3
        with asking(router, b"\r\n") as slow:  # who reads slowly, but on, gets it too, however long it takes
            response = HTTPResponse(slow)
            response.begin()
            read = b""
            while piece := response.read(200_000):
                read += piece
                time.sleep(0.25)
            assert len(json.loads(read)["results"]) == 3
        deadline = time.monotonic() + 20
        while router.metric("ab_unread_answers_total") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert router.metric("ab_unread_answers_total") == 2
        for connection in unread:
            with connection, pytest.raises((ConnectionResetError, IncompleteRead)):
                response = HTTPResponse(connection)
                response.begin()
                response.read()
        assert router.rank().status_code == 200
