"""The callers of benchmarks/ab/soak.py: good ones at a steady rate, and bad, slow and huge ones beside them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field

HEAD = "{} {} HTTP/1.1\r\nHost: router\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
PATIENCE_SECONDS = 15.0  # after which a good caller counts its page as unanswered
LOST = (OSError, EOFError, TimeoutError, ValueError, IndexError, KeyError)  # a connection or an answer that is none

# what no front end should send, with the status that the router's page documents for it
BAD_REQUESTS = {
    "not JSON": (b'{"user_id": ', 400),
    "no documents": (b'{"user_id": "u", "query": "q", "documents": []}', 422),
    "blank query": (b'{"user_id": "u", "query": " ", "documents": [{"doc_id": "a"}]}', 422),
    "invisible user": ('{"user_id": "\u200b", "query": "q", "documents": [{"doc_id": "a"}]}'.encode(), 422),
    "half a surrogate": (b'{"user_id": "\\ud800", "query": "q", "documents": [{"doc_id": "a"}]}', 400),
    "twice the same": (b'{"user_id": "u", "query": "q", "documents": [{"doc_id": "a"}, {"doc_id": "a"}]}', 422),
    "brackets": (b"[" * 50_000, 422),
}
HUGE = b'{"user_id": "u", "query": "q", "documents": [' + b"0," * 1_900_000 + b"0]}"


@dataclass
class GoodPages:
    """What became of the good pages. logged, pending: request ids by what the answer said of the log."""

    latencies_ms: list[float] = field(default_factory=list)
    served_by: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)  # by what came instead of an answer
    logged: list[str] = field(default_factory=list)
    pending: int = 0
    unlogged: int = 0

    @property
    def count(self) -> int:
        """Pages sent whose fate is known."""
        return len(self.latencies_ms) + self.unanswered.total()


class Router:
    """A router's address, and connections to it that are kept open and used again."""

    def __init__(self, url: str):
        self.host, port = url.removeprefix("http://").split(":")
        self.port = int(port)
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """(status, body) of an answer. One of LOST if there is none."""
        reader, writer = self._unused() or await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(HEAD.format(method, path, len(body)).encode() + body)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            content = await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        except BaseException:
            writer.close()
            raise
        if b"connection: close" in head:
            writer.close()
        else:
            self._free.append((reader, writer))
        return int(head.split()[1]), content

    def _unused(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """An open connection that the router has not closed meanwhile, as it may after some seconds; None without."""
        while self._free:
            reader, writer = self._free.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return None

    def close(self) -> None:
        """Close what is open and unused."""
        for _, writer in self._free:
            writer.close()


class GoodCallers:
    """Pages of `documents` candidates. The draws are the same at every run."""

    def __init__(self, router: Router, documents: int):
        self.router, self.pages = router, GoodPages()
        self._draw = random.Random(16)
        self._under_way: set[asyncio.Task] = set()
        self._documents = [
            {
                "doc_id": f"d{i}",
                "title": " ".join(f"title{(i * 7 + k) % 90}" for k in range(8)),
                "summary": " ".join(f"word{(i * 11 + k) % 300}" for k in range(40)),
            }
            for i in range(documents)
        ]

    async def closed_loop(self, callers: int, seconds: float) -> float:
        """Pages a second that so many callers get who ask again at once: the router's capacity."""
        started = time.monotonic()

        async def caller() -> None:
            while time.monotonic() < started + seconds:
                await self.page()

        before = self.pages.count
        await asyncio.gather(*(caller() for _ in range(callers)))
        return (self.pages.count - before) / (time.monotonic() - started)

    async def steady(self, rate: float, seconds: float) -> None:
        """Send at a rate whether answers come or not, as users do; ends when all fates are known."""
        started, sent = time.monotonic(), 0
        while (now := time.monotonic()) < started + seconds:
            while sent < (now - started) * rate:
                task = asyncio.create_task(self.page())
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)
                sent += 1
            await asyncio.sleep(1 / rate)
        await asyncio.gather(*self._under_way)

    async def page(self) -> None:
        """One page, and what became of it."""
        user = f"user-{self._draw.randrange(5000)}"
        body = json.dumps({"user_id": user, "query": "title3 word7 word21", "documents": self._documents}).encode()
        started = time.perf_counter()
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                status, content = await self.router.ask("POST", "/rank", body)
            answer = json.loads(content)
            if status != 200 or len(answer["ranking"]) != len(self._documents):
                self.pages.unanswered[f"HTTP {status}"] += 1
                return
        except LOST as problem:
            self.pages.unanswered[type(problem).__name__] += 1
            return
        self.pages.latencies_ms.append((time.perf_counter() - started) * 1000)
        self.pages.served_by[answer["fallback"] or answer["served_by"]] += 1
        if answer["logged"] is True:
            self.pages.logged.append(answer["request_id"])
        elif answer["logged"] == "pending":
            self.pages.pending += 1
        else:
            self.pages.unlogged += 1


class Strangers:
    """Callers that no service wants. statuses: what they got; surprises: what the router's page does not document."""

    def __init__(self, router: Router):
        self.router = router
        self.statuses: Counter[str] = Counter()
        self.surprises: Counter[str] = Counter()

    async def bad(self, pause_seconds: float) -> None:
        """One bad request after the other, until cancelled."""
        while True:
            for name, (body, expected) in BAD_REQUESTS.items():
                await self._send(name, body, {expected, 422, 400})
                await asyncio.sleep(pause_seconds)

    async def huge(self, pause_seconds: float) -> None:
        """Bodies just below the limit of bytes, full of values, until cancelled."""
        while True:
            await self._send("huge", HUGE, {413, 422, 503})
            await asyncio.sleep(pause_seconds)

    async def slow(self) -> None:
        """Half a request, then nothing, until the router hangs up; and again, until cancelled."""
        for half in self._halves():
            try:
                reader, writer = await asyncio.open_connection(self.router.host, self.router.port)
            except OSError:
                await asyncio.sleep(1)
                continue
            try:
                writer.write(half)
                async with asyncio.timeout(60):
                    while await reader.read(4096):
                        pass
                self.statuses["slow: hung up on"] += 1
            except ConnectionError:
                self.statuses["slow: hung up on"] += 1
            except TimeoutError:
                self.surprises["slow: still open after 60 s"] += 1
            finally:
                writer.close()

    @staticmethod
    def _halves():
        while True:
            yield b"POST /rank HTTP/1.1\r\nHost: router\r\n"
            yield HEAD.format("POST", "/rank", 1000).encode() + b'{"user_id": "u", '
            yield b""

    async def _send(self, name: str, body: bytes, expected: set[int]) -> None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                status, _ = await self.router.ask("POST", "/rank", body)
        except (OSError, EOFError):  # refused before it was read: the rest of a huge body meets a closed connection
            self.statuses[f"{name}: closed"] += 1
            return
        except (TimeoutError, ValueError, IndexError) as problem:
            self.surprises[f"{name}: {type(problem).__name__}"] += 1
            return
        self.statuses[f"{name}: {status}"] += 1
        if status not in expected:
            self.surprises[f"{name}: {status}"] += 1
