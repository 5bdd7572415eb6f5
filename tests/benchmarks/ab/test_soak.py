"""What the soak counts: lost exposures, a growing memory, pages without an answer, callers that surprise it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from benchmarks.ab.soak import Samples, loop_pauses, lost_exposures
from benchmarks.ab.soak_callers import BAD_REQUESTS, GoodCallers, Router, Strangers
from clients.ab.log.lines import encode

ANSWER = b'{"request_id": "r%d", "ranking": ["d0", "d1"], "served_by": "student", "fallback": "", "logged": true}'


@asynccontextmanager
async def stub(answers: list[bytes | None]):
    """A router that gives these bodies in turn, on connections that it closes where a body is None."""
    given = iter(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
                if (body := next(given)) is None:
                    break
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        except (asyncio.IncompleteReadError, StopIteration):
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield Router(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    finally:
        server.close()


def test_a_page_without_an_answer_is_counted_and_what_the_answer_says_of_the_log_is_kept():
    async def pages() -> GoodCallers:
        answers = [
            ANSWER % 1,
            None,
            b"{}",
            ANSWER.replace(b"true", b'"pending"') % 2,
            ANSWER.replace(b"true", b"false") % 3,
        ]
        async with stub(answers) as router:
            callers = GoodCallers(router, documents=2)
            for _ in answers:
                await callers.page()
            router.close()
            return callers

    kept = asyncio.run(pages()).pages
    assert kept.unanswered == {"IncompleteReadError": 1, "KeyError": 1} and kept.count == 5
    assert (kept.logged, kept.pending, kept.unlogged) == (["r1"], 1, 1)


def test_a_router_that_takes_a_bad_request_is_a_surprise():
    async def bad() -> Strangers:
        async with stub([ANSWER % 0] * len(BAD_REQUESTS)) as router:
            strangers = Strangers(router)
            sending = asyncio.create_task(strangers.bad(0.0))
            async with asyncio.timeout(60):
                while not set(strangers.surprises) >= expected:
                    await asyncio.sleep(0.01)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            router.close()
            return strangers

    expected = {f"{name}: 200" for name in BAD_REQUESTS}
    assert set(asyncio.run(bad()).surprises) >= expected


def test_exposures_that_the_log_lacks_or_has_twice_are_counted(tmp_path):
    def line(request_id: str) -> bytes:
        return encode({"type": "exposure", "logged": 1, "request_id": request_id})

    (tmp_path / "a.ablog").write_bytes(line("a") + line("b") + b"broken\n" + line("b"))
    assert lost_exposures(tmp_path, ["a", "b", "c"]) == {"lost": 1, "twice": 1, "damaged_lines": 1}


def test_the_slope_of_the_memory_leaves_the_warm_up_out():
    warming = [(float(second), second * 100, 50.0 + second) for second in range(25)]
    steady = [(float(second), second * 100, 100.0 + second / 36) for second in range(25, 101)]
    figures = Samples(warming + steady).figures()
    assert figures["slope_mib_an_hour"] == pytest.approx(100, rel=0.01)  # 1/36 MiB a second
    assert figures["slope_mib_per_100000_pages"] == pytest.approx(100_000 / 100 / 36, rel=0.01)
    assert (figures["first_mib"], figures["largest_mib"]) == (50.0, pytest.approx(100 + 100 / 36))


def test_pauses_are_read_from_the_routers_own_page():
    page = (
        "ab_loop_pause_longest_seconds 0.07\n"
        'ab_loop_pause_seconds_bucket{le="0.05"} 98.0\nab_loop_pause_seconds_bucket{le="+Inf"} 100.0\n'
    )
    assert loop_pauses(page) == {"longest_seconds": 0.07, "over_50_ms": 2.0}
