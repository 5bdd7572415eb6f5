"""The connection to one HTTP reranking service: pairs of a query in a request, within its rate and the budget."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from time import monotonic

import httpx
import numpy as np

from clients.labelling.http_costs import Budget, tokens_of
from clients.labelling.http_dialects import BadAnswer
from clients.labelling.http_teacher import AnswerLog, HttpTeacher, identify
from clients.labelling.request_window import Window
from clients.labelling.teacher_endpoint import FIRST_WAIT, LONGEST_WAIT, Patience
from clients.labelling.work_queue import Pair, Tally, WorkQueue
from ranking import tracing
from ranking.errors import InputError

logger = logging.getLogger("labels")

ALONE_AFTER = 2  # failures of a pair before it is sent alone: one bad document must not hold up its neighbours
REFUSED_FOR_GOOD = {401, 402, 403, 404}  # key, account, address: no pair is to blame and no waiting helps
TOO_MANY = {429, 503}
GONE = {502, 503, 504}  # it may be started anew, with another model
ANOTHER_TIME = {408, 409, 425}  # says nothing of the texts, like a 5xx
LONGEST_ANSWER = 16 << 20
LONGEST_PAUSE = 3600.0


class HttpEndpoint:
    """Draws pairs of one query at a time from the queue and asks one service for their scores, until cancelled.

    in_flight: requests at a time; documents: pairs of one request at most.
    """

    def __init__(
        self,
        url: str,
        teacher: HttpTeacher,
        work: WorkQueue,
        tally: Tally,
        patience: Patience,
        budget: Budget,
        answers: AnswerLog,
        authorised: Mapping[str, str],
        in_flight: int,
        documents: int,
    ):
        self.url, self.teacher, self.work, self.tally = url, teacher, work, tally
        self.patience, self.budget, self.answers, self.authorised = patience, budget, answers, authorised
        self.in_flight, self.documents = in_flight, documents
        self.window = Window(fixed=in_flight * documents)  # pairs, as the queue counts them
        self._open_at = 0.0  # no request is sent before this time
        self._wait = FIRST_WAIT
        self._was_gone = False  # since it was last asked what it serves

    async def run(self) -> None:
        """Ask until cancelled. InputError if the service refuses the key or the address, or the budget is spent."""
        timeout = httpx.Timeout(self.patience.deadline_ms / 1000)
        limits = httpx.Limits(max_connections=self.in_flight)
        async with (
            httpx.AsyncClient(headers=dict(self.authorised), timeout=timeout, limits=limits) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(self.in_flight):
                group.create_task(self._work(client))

    async def _work(self, client: httpx.AsyncClient) -> None:
        while True:
            pairs = await self._draw()
            self.tally.in_flight[self.url] += len(pairs)
            try:
                await self._ask(client, pairs)
            finally:
                self.tally.in_flight[self.url] -= len(pairs)

    async def _draw(self) -> list[Pair]:
        """The next pairs, once the service takes requests: what it held until then would be kept from the others."""
        while True:
            while (closed := self._open_at - monotonic()) > 0:
                await asyncio.sleep(closed)
            pairs = await self.work.get(self.documents, alone_after=ALONE_AFTER)
            if self._open_at <= monotonic():
                return pairs
            for pair in reversed(pairs):
                self.work.hand_back(pair)

    async def _ask(self, client: httpx.AsyncClient, pairs: list[Pair]) -> None:
        if self._was_gone and not await self._is_the_same(client, pairs):
            return
        texts = [pair.texts for pair in pairs]
        async with self.budget.request(tokens_of(texts)):
            sent = monotonic()
            seconds = self.patience.deadline_ms / 1000
            try:
                # around the whole: httpx's own limit is for each piece, and a server may send one byte at a time
                async with asyncio.timeout(seconds):
                    answer = await _post(client, self.url + self.teacher.dialect.path, self.teacher.body(texts))
            except (httpx.TimeoutException, TimeoutError):
                self._failed(pairs, f"no answer within {seconds:g} s")
            except httpx.TransportError as problem:
                self._was_gone = True
                self._lost(pairs, str(problem) or type(problem).__name__)
            except (httpx.RequestError, BadAnswer) as problem:  # the first: it cannot be unpacked, it leads elsewhere
                self._failed(pairs, f"unusable answer: {problem}")
            else:
                tracing.past(
                    "ask", monotonic() - sent, endpoint=self.url, documents=len(pairs), status=answer.status_code
                )
                self._take(pairs, answer, monotonic() - sent)

    async def _is_the_same(self, client: httpx.AsyncClient, pairs: list[Pair]) -> bool:
        """Whether a server that was gone is back. InputError if it serves another model now."""
        if self.teacher.dialect.identity_path:
            found = await identify(client, self.url, self.teacher.dialect)
            if isinstance(found, Exception):
                self._lost(pairs, f"it does not say what it serves: {found}")
                return False
            if found != self.teacher.described:
                raise InputError(
                    f"{self.url} came back with {found} in place of {self.teacher.described}: two teachers' scores do "
                    "not mix; label into another --out with it"
                )
        self._was_gone = False
        return True

    def _take(self, pairs: list[Pair], answer: httpx.Response, seconds: float) -> None:
        if answer.status_code in REFUSED_FOR_GOOD:
            raise InputError(f"{self.url} refuses requests: {_reason(answer)}; check key, model and address")
        if 300 <= answer.status_code < 400:
            place = answer.headers.get("location", "another address")
            raise InputError(
                f"{self.url} sends requests on to {place} (HTTP {answer.status_code}), where no key is sent: give the "
                "address that answers as --url"
            )
        self._was_gone |= answer.status_code in GONE
        if answer.status_code in TOO_MANY:
            self._lost(pairs, _reason(answer), _retry_after(answer))
        elif answer.status_code >= 500 or answer.status_code in ANOTHER_TIME:
            self._failed(pairs, _reason(answer))
        elif answer.status_code >= 400:
            self._rejected(pairs, _reason(answer))
        else:
            self._read(pairs, answer, seconds)

    def _read(self, pairs: list[Pair], answer: httpx.Response, seconds: float) -> None:
        try:
            found = self.teacher.scores(answer.json(), len(pairs))
        except (BadAnswer, ValueError, RecursionError) as problem:  # the last: brackets nested without end
            self._failed(pairs, f"unusable answer: {problem}")
            return
        scores = {index: float(np.float32(score)) for index, score in found.items()}
        for shard in {pairs[index].shard.covered.index for index in scores}:
            inside = {i: s for i, s in scores.items() if pairs[i].shard.covered.index == shard}
            self.answers.add(shard, {pairs[index].position: score for index, score in inside.items()})
        for index, score in scores.items():
            pairs[index].shard.score(pairs[index].position, score)
        self._wait = FIRST_WAIT
        self.tally.scored += len(scores)
        self.tally.by_endpoint[self.url] += len(scores)
        self.tally.last_answer = monotonic()
        self.tally.latency_seconds += seconds
        if len(scores) < len(pairs):
            left = [pair for index, pair in enumerate(pairs) if index not in scores]
            self._failed(left, f"the answer lacks {len(left)} of {len(pairs)} documents")

    def _failed(self, pairs: list[Pair], reason: str) -> None:
        """Failures of the pairs' own: asked again after a while, refused if they have failed too often."""
        for pair in pairs:
            pair.failures += 1
            if pair.failures > self.patience.retries:
                self._refuse(pair, reason)
            else:
                self._again(pair, min(5.0, 0.05 * 2**pair.failures))
        self.tally.last_problem = f"{self.url}: {reason}"

    def _rejected(self, pairs: list[Pair], reason: str) -> None:
        """The service will not take this text: among several the culprit is found by sending each alone."""
        self.tally.last_problem = f"{self.url}: {reason}"
        if len(pairs) == 1:
            self._refuse(pairs[0], reason)
            return
        for pair in pairs:
            pair.failures = max(pair.failures, ALONE_AFTER)
            self._again(pair, 0.0)

    def _lost(self, pairs: list[Pair], reason: str, wait: float | None = None) -> None:
        """The service takes nothing now: all wait, for as long as it says or longer each time; no pair is to blame."""
        now = monotonic()
        if now >= self._open_at:  # else this request was under way when the service closed: one loss for all that were
            if self._wait > FIRST_WAIT:  # not a busy service's single 429, but again and with no answer in between
                logger.warning("%s takes nothing: %s", self.url, reason)
            own = self._wait * random.uniform(0.75, 1.25)
            wait = own if wait is None else wait if self._wait == FIRST_WAIT else max(wait, own)
            self._wait = min(2 * self._wait, LONGEST_WAIT)
        self._open_at = max(self._open_at, now + (wait or 0.0))
        self.tally.lost[self.url] += 1
        self.tally.last_problem = f"{self.url}: {reason}"
        for pair in reversed(pairs):
            self._again(pair, 0.0)

    def _again(self, pair: Pair, delay: float) -> None:
        self.tally.retries += 1
        if delay:
            asyncio.get_running_loop().call_later(delay, self.work.hand_back, pair)
        else:
            self.work.hand_back(pair)

    def _refuse(self, pair: Pair, reason: str) -> None:
        pair.shard.refuse(pair.position, reason[:300])
        self.tally.refused["teacher"] += 1


async def _post(client: httpx.AsyncClient, url: str, body: object) -> httpx.Response:
    """The whole answer. BadAnswer if it is longer than any answer has to be: memory is not the server's to fill."""
    async with client.stream("POST", url, json=body) as answer:
        content = bytearray()
        async for piece in answer.aiter_bytes():
            content += piece
            if len(content) > LONGEST_ANSWER:
                raise BadAnswer(f"it is longer than {LONGEST_ANSWER >> 20} MiB")
        wanted = ("content-type", "retry-after", "location")
        kept = {name: answer.headers[name] for name in wanted if name in answer.headers}
        return httpx.Response(answer.status_code, headers=kept, content=bytes(content))


def _reason(answer: httpx.Response) -> str:
    return f"HTTP {answer.status_code} {' '.join(answer.text.split())[:200]}".strip()


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds that the service asks to wait, LONGEST_PAUSE at most; None where it does not say so in seconds."""
    try:
        return min(max(0.0, float(answer.headers["retry-after"])), LONGEST_PAUSE)
    except (KeyError, ValueError):
        return None
