"""The connection to one teacher server: streams prompts to it, reads scores, survives its restarts and refusals."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import re
from dataclasses import dataclass, replace
from time import monotonic
from typing import Literal

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from clients.labelling.request_window import Window
from clients.labelling.score_precision import PrecisionCheck
from clients.labelling.served_ranker import ServedRanker
from clients.labelling.served_teacher import ServedTeacher, describe_grpc_error
from clients.labelling.work_queue import Pair, Tally, WorkQueue
from clients.triton.connection import Credentials, TritonConnection
from ranking import tracing
from ranking.errors import InputError

logger = logging.getLogger("labels")

FIRST_WAIT, LONGEST_WAIT = 0.25, 30.0
CONNECT_SECONDS = 10.0
MOST_STREAMS_LOST = 30  # a pair under which this many streams broke is taken for the cause
# what the server says of this one text, however often it is asked
FINAL = re.compile(r"maximum model length|max_model_len|maximum context length|longer than the maximum", re.IGNORECASE)
# what it says when the model behind it is gone, not the pair
GONE = re.compile(
    r"unknown model|not ready|unavailable|engine ?(core|dead)|engine.*died|stub process|shutting down", re.IGNORECASE
)
OVERLOAD = re.compile(r"maximum queue size|resource.?exhausted|too many requests|queue is full", re.IGNORECASE)


TeacherKind = Literal["decoder", "ranker"]
AnyTeacher = ServedTeacher | ServedRanker
KINDS: dict[TeacherKind, type[ServedTeacher] | type[ServedRanker]] = {"decoder": ServedTeacher, "ranker": ServedRanker}


def kind_of(teacher: AnyTeacher) -> TeacherKind:
    """The kind that a served teacher is of."""
    return "ranker" if isinstance(teacher, ServedRanker) else "decoder"


class EndpointLost(Exception):
    """The server or the way to it is gone; the text says how."""


@dataclass(frozen=True)
class Patience:
    """How long and how often a request is tried.

    deadline_ms: time for one request; retries: a pair's own failures before it is refused.
    """

    deadline_ms: float = 60_000.0
    retries: int = 5


async def identify(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, model: str, connection: TritonConnection, kind: TeacherKind
) -> AnyTeacher:
    """The teacher of that kind that a server has ready, with the version that its requests name.

    EndpointLost if it has none now; InputError if it will never have one.
    """
    metadata = connection.metadata()
    try:
        ready = await stub.ModelReady(pb.ModelReadyRequest(name=model), timeout=CONNECT_SECONDS, metadata=metadata)
        if not ready.ready:
            raise EndpointLost(f"model {model!r} is not ready")
        described = await stub.ModelMetadata(
            pb.ModelMetadataRequest(name=model), timeout=CONNECT_SECONDS, metadata=metadata
        )
        version = max(described.versions, key=int, default="")  # the one that requests without a version get
        of_version = pb.ModelConfigRequest(name=model, version=version)
        config = await stub.ModelConfig(of_version, timeout=CONNECT_SECONDS, metadata=metadata)
    except grpc.RpcError as problem:
        raise EndpointLost(describe_grpc_error(problem)) from problem
    return replace(KINDS[kind].of_config(model, config, str(connection)), version=version)


class TeacherEndpoint:
    """Draws pairs from the queue, keeps a window of them in flight, and hands back every one that it cannot score."""

    def __init__(
        self,
        url: str,
        credentials: Credentials,
        teacher: AnyTeacher,
        work: WorkQueue,
        tally: Tally,
        patience: Patience,
        window: Window,
    ):
        self.url, self.connection = url, TritonConnection(url, credentials)
        self.teacher, self.work, self.tally = teacher, work, tally
        self.patience, self.window = patience, window
        self._in_flight: dict[str, tuple[list[Pair], float]] = {}
        self._pairs_in_flight = 0
        self._held: list[Pair] = []  # the next request's, until there is room for it
        self._room = asyncio.Event()
        self._number = 0
        self._opened = self._heard = 0.0  # when this session began, when its last answer came
        # a ranker's scores have the precision of its engine, which its gate has judged
        self._precision = PrecisionCheck(teacher.head_dtype, url) if isinstance(teacher, ServedTeacher) else None

    async def run(self) -> None:
        """Serve until cancelled: connect, work, and after a loss wait (longer each time, with jitter) and connect
        again."""
        wait = FIRST_WAIT
        while True:
            answered = self.tally.by_endpoint[self.url]
            try:
                await self._session()
            except EndpointLost as problem:
                self.tally.lost[self.url] += 1
                self.tally.last_problem = f"{self.url}: {problem}"
                logger.warning("%s lost: %s; trying again in %.1f s", self.url, problem, wait)
            finally:
                self._hand_back_all()
            if self.tally.by_endpoint[self.url] > answered:
                wait = FIRST_WAIT
            await asyncio.sleep(wait * random.uniform(0.75, 1.25))
            wait = min(2 * wait, LONGEST_WAIT)

    async def _session(self) -> None:
        """One connection's life. Always ends in EndpointLost or cancellation."""
        async with self.connection.stream_channel() as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            try:
                found = await identify(stub, self.teacher.model, self.connection, kind_of(self.teacher))
            except InputError as problem:
                raise EndpointLost(str(problem)) from problem
            if found.teacher_id != self.teacher.teacher_id:
                raise EndpointLost(f"it serves teacher {found.teacher_id}, this run is of {self.teacher.teacher_id}")
            self.teacher = found  # how many documents a request may carry is each server's own
            stream = stub.ModelStreamInfer(metadata=self.connection.metadata())
            self._opened = self._heard = monotonic()
            parts = [asyncio.ensure_future(part) for part in (self._send(stream), self._receive(stream), self._watch())]
            try:
                done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
                for part in done:
                    part.result()
            except grpc.RpcError as problem:
                raise EndpointLost(describe_grpc_error(problem)) from problem
            except asyncio.InvalidStateError as problem:  # grpc.aio, when a write meets a stream that has just ended
                raise EndpointLost("the stream has ended") from problem
            finally:
                for part in parts:
                    part.cancel()
                await asyncio.gather(*parts, return_exceptions=True)
                stream.cancel()

    async def _send(self, stream) -> None:
        while True:
            most = min(self._limit, self.teacher.documents_per_request)
            self._held = await self.work.get(most, one_query=self.teacher.one_query_a_request)
            # a request waits for room for all its pairs: had it only as many as fit, those would leave as little room
            # when they are answered, and requests would stay small
            while self._pairs_in_flight and self._limit - self._pairs_in_flight < len(self._held):
                self._room.clear()
                await self._room.wait()
            pairs, self._held = self._held, []
            self._number += 1
            name = str(self._number)
            self._in_flight[name] = (pairs, monotonic())
            self._count_in_flight(len(pairs))
            request = self.teacher.request([pair.texts for pair in pairs])
            request.id = name
            await stream.write(request)

    @property
    def _limit(self) -> int:
        """One pair until the server has answered once: a server that kills its streams gets no windowful each time."""
        return self.window.limit if self._heard > self._opened else 1

    async def _receive(self, stream) -> None:
        while True:
            answer = await stream.read()
            if answer is grpc.aio.EOF:
                code, details = await stream.code(), await stream.details()
                raise EndpointLost(f"stream ended: {code.name} {details or ''}".strip())
            name = answer.infer_response.id
            if not name and answer.error_message:  # about the stream, not about one request
                raise EndpointLost(answer.error_message[:300])
            self._heard = monotonic()
            pairs, sent = self._in_flight.pop(name, (None, 0.0))
            if pairs is None:
                continue  # answered after its deadline: it has been handed back, the other answer counts
            self._count_in_flight(-len(pairs))
            self._room.set()
            refused = bool(answer.error_message)
            tracing.past("ask", self._heard - sent, endpoint=self.url, documents=len(pairs), refused=refused)
            if refused:
                self._failed(pairs, answer.error_message)
                continue
            for pair, value in zip(pairs, self.teacher.scores(answer.infer_response, len(pairs))):
                self._scored(pair, value)
            self.window.completed(saturated=len(self.work) > 0, pairs=len(pairs))
            self.tally.windows[self.url] = self.window.limit
            self.tally.last_answer = monotonic()
            self.tally.latency_seconds += (self.tally.last_answer - sent) * len(pairs)

    def _scored(self, pair: Pair, value: float | None) -> None:
        if value is None or not math.isfinite(value):
            self._failed([pair], f"the teacher's score is {'missing' if value is None else value}")
            return
        if self._precision is not None:
            self._precision.see(value)
        pair.shard.score(pair.position, value)
        self.tally.scored += 1
        self.tally.by_endpoint[self.url] += 1

    async def _watch(self) -> None:
        """Hand back what has passed its deadline. A server that answers nothing for that long is lost."""
        limit = self.patience.deadline_ms / 1000
        while True:
            await asyncio.sleep(min(1.0, limit / 4))
            now = monotonic()
            late = [name for name, (_, sent) in self._in_flight.items() if now - sent > limit]
            if not late:
                continue
            if now - self._heard > limit:
                raise EndpointLost(f"no answer for {limit:g} s")
            self.window.overloaded()
            self._room.set()
            for name in late:
                pairs, _ = self._in_flight.pop(name)
                self._count_in_flight(-len(pairs))
                self._failed(pairs, f"no answer within {limit:g} s")

    def _failed(self, pairs: list[Pair], reason: str) -> None:
        """A failure of one request: its pairs are handed back after a while, or refused if it is final or too often.

        A failure that several pairs share is none of theirs: each is asked for alone then, and the one at fault found.
        """
        reason = " ".join(reason.split())[:300]
        if GONE.search(reason):
            for pair in reversed(pairs):
                self._lose(pair)
            raise EndpointLost(reason)
        if OVERLOAD.search(reason):
            self.window.overloaded()
        for pair in pairs:
            if len(pairs) > 1:
                pair.suspect = True
            else:
                pair.failures += 1
            if pair.failures > self.patience.retries or (FINAL.search(reason) and len(pairs) == 1):
                self._refuse(pair, reason)
                continue
            self.tally.retries += 1
            self.tally.last_problem = f"{self.url}: {reason}"
            delay = min(5.0, 0.05 * 2**pair.failures) * random.uniform(0.75, 1.25)
            asyncio.get_running_loop().call_later(delay, self.work.hand_back, pair)

    def _refuse(self, pair: Pair, reason: str) -> None:
        pair.shard.refuse(pair.position, reason)
        self.tally.refused["teacher"] += 1
        self.tally.last_problem = f"{self.url}: {reason}"

    def _lose(self, pair: Pair) -> None:
        pair.streams_lost += 1
        if pair.streams_lost >= MOST_STREAMS_LOST:
            self._refuse(pair, f"{pair.streams_lost} streams broke while this pair was in flight")
        else:
            self.tally.retries += 1
            self.work.hand_back(pair)

    def _hand_back_all(self) -> None:
        for pair in reversed(self._held):
            self.work.hand_back(pair)
        self._held = []
        for pairs, _ in reversed(self._in_flight.values()):
            for pair in reversed(pairs):
                self._lose(pair)
        self._in_flight.clear()
        self._count_in_flight(-self._pairs_in_flight)

    def _count_in_flight(self, more: int) -> None:
        self._pairs_in_flight += more
        self.tally.in_flight[self.url] = self._pairs_in_flight
