"""Label row ranges of the candidate file over several teacher servers: the main loop, in this process or a Ray
worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import pyarrow as pa
from tritonclient.grpc import service_pb2_grpc

from clients.labelling.candidate_file import CandidateFile, RowRange
from clients.labelling.label_shards import Origin, write_shard
from clients.labelling.request_window import Window
from clients.labelling.teacher_endpoint import (
    AnyTeacher,
    EndpointLost,
    Patience,
    TeacherEndpoint,
    TeacherKind,
    identify,
)
from clients.labelling.work_queue import Pair, ShardInHand, Tally, WorkQueue
from clients.triton.connection import Credentials, TritonConnection
from ranking import tracing
from ranking.errors import InputError

logger = logging.getLogger("labels")

BLOCK = 256  # pairs formatted at a time
SHARDS_IN_HAND = 3  # one being written, one being finished, one being begun: the windows never run dry
TextsOf = Callable[[list[str], list[str], list[str]], list[tuple[bytes, ...]]]  # of queries, titles, summaries
FEW_REFUSALS = 100  # before the share of refusals is held against max_refused


class Endpoint(Protocol):
    """One server or service that draws pairs from the queue it was made with, until it is cancelled."""

    window: Window

    async def run(self) -> None:
        """Serve until cancelled; whatever it cannot score goes back into the queue."""


class AskedTeacher(Protocol):
    """A teacher and how it is asked; travels to Ray workers as it is."""

    def endpoints(self, work: WorkQueue, tally: Tally) -> Sequence[Endpoint]:
        """The servers or services of the teacher, each drawing from `work` and counting in `tally`."""

    def texts_of(self) -> TextsOf:
        """How queries, titles and summaries become what endpoints send of each pair."""

    def earlier_answers(self, folder: Path, shard: int) -> Mapping[int, float]:
        """{position: score} that a run which was killed had been given for a shard and that need not be asked again."""

    def forget_answers(self, folder: Path, shard: int) -> None:
        """The shard is finished."""

    @property
    def patience(self) -> Patience:
        """How long and how often a request is tried."""


@dataclass(frozen=True)
class StreamedTeacher:
    """A teacher behind Triton, asked over gRPC streams.

    folder: a decoder's checkpoint, for its text format; in_flight: pairs at a time and server, None to find the
    number.
    """

    teacher: AnyTeacher
    folder: Path
    urls: tuple[str, ...]
    credentials: Credentials
    in_flight: int | None
    patience: Patience

    def endpoints(self, work: WorkQueue, tally: Tally) -> list[TeacherEndpoint]:
        """One endpoint per url."""
        return [
            TeacherEndpoint(url, self.credentials, self.teacher, work, tally, self.patience, Window(self.in_flight))
            for url in self.urls
        ]

    def texts_of(self) -> TextsOf:
        """The teacher's own texts of each pair. InputError if the folder is another teacher's."""
        return self.teacher.texts(self.folder)

    def earlier_answers(self, folder: Path, shard: int) -> dict[int, float]:
        """None: a shard costs a minute of a server, and the servers are ours."""
        return {}

    def forget_answers(self, folder: Path, shard: int) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class Job:
    """What a labelling process needs to know; travels to Ray workers as it is.

    give_up_seconds: time without any answer from any endpoint; max_refused: share of pairs that the teacher may fail
    on.
    """

    candidates: CandidateFile
    folder: Path
    origin: Origin
    asked: AskedTeacher
    give_up_seconds: float
    max_refused: float


async def find_teacher(
    urls: Sequence[str], credentials: Credentials, model: str, kind: TeacherKind, wait_seconds: float
) -> AnyTeacher:
    """The one teacher behind all urls that answer within wait_seconds. InputError: none answers, or two differ."""
    until = monotonic() + wait_seconds
    while True:
        found = await asyncio.gather(*(_ask(url, credentials, model, kind) for url in urls))
        teachers = {url: teacher for url, teacher in zip(urls, found) if not isinstance(teacher, EndpointLost)}
        if teachers or monotonic() > until:
            break
        await asyncio.sleep(1.0)
    for url, answer in zip(urls, found):
        if isinstance(answer, EndpointLost):
            logger.warning("%s does not answer: %s", url, answer)
    if not teachers:
        raise InputError(
            f"no endpoint has model {model!r} ready: {'; '.join(f'{u}: {p}' for u, p in zip(urls, found))}"
        )
    if len({teacher.teacher_id for teacher in teachers.values()}) > 1:
        served = ", ".join(f"{url} serves {teacher.teacher_id}" for url, teacher in teachers.items())
        raise InputError(f"the endpoints serve different teachers: {served}")
    return next(iter(teachers.values()))


async def _ask(url: str, credentials: Credentials, model: str, kind: TeacherKind) -> AnyTeacher | EndpointLost:
    connection = TritonConnection(url, credentials)
    async with connection.stream_channel() as channel:
        try:
            return await identify(service_pb2_grpc.GRPCInferenceServiceStub(channel), model, connection, kind)
        except EndpointLost as problem:
            return problem


async def label_ranges(
    job: Job,
    ranges: Sequence[RowRange],
    tally: Tally,
    on_shard: Callable[[dict[str, Any]], None],
    stopping: Callable[[], bool],
) -> None:
    """Label the ranges and write their shards; on_shard gets each record. Once stopping() is true no new shard is
    begun, and those in hand are left where no endpoint has answered for a request's deadline.

    InputError: no endpoint answered for job.give_up_seconds seconds, or the teacher fails on too many pairs. OSError:
    disk full.
    """
    work = WorkQueue()
    texts_of = job.asked.texts_of()
    tally.last_answer = monotonic()
    endpoints = job.asked.endpoints(work, tally)

    def check_refusals() -> None:
        failed, answered = tally.refused["teacher"], tally.scored
        if failed >= FEW_REFUSALS and failed > job.max_refused * (failed + answered):
            raise InputError(f"the teacher fails on {failed} of {failed + answered} pairs; last: {tally.last_problem}")

    async def save(shard: ShardInHand) -> None:
        with tracing.span("shard", number=shard.covered.index, rows=shard.covered.rows) as span:
            with tracing.span("score"):
                await shard.done.wait()
            # a fast failure fills whole shards between two looks of the guard: they must not count as finished
            check_refusals()
            with tracing.span("write"):
                record = await asyncio.to_thread(
                    write_shard, job.folder, job.origin, shard.covered, shard.rows, shard.scores, shard.refusals
                )
            job.asked.forget_answers(job.folder, shard.covered.index)
            window = sum(endpoint.window.limit for endpoint in endpoints)
            span.set(labels=record["labels"], rejects=len(record["rejects"]), window=window)
        tally.shards += 1
        on_shard(record)

    async def feed() -> None:
        slots = asyncio.Semaphore(SHARDS_IN_HAND)
        read = job.candidates.read(ranges)
        async with asyncio.TaskGroup() as saving:
            while True:
                await slots.acquire()
                if stopping() or (loaded := await asyncio.to_thread(next, read, None)) is None:
                    return
                shard = ShardInHand(*loaded)
                tally.refused["input"] += len(shard.refusals)
                for position, score in job.asked.earlier_answers(job.folder, shard.covered.index).items():
                    shard.score(position, score)
                    tally.already += 1
                saving.create_task(save(shard)).add_done_callback(lambda _: slots.release())
                await _send_shard(shard, work, texts_of, endpoints)

    async def guard() -> None:
        while True:
            await asyncio.sleep(1.0)
            silent = monotonic() - tally.last_answer
            if silent > job.give_up_seconds:
                raise InputError(
                    f"no endpoint has answered for {silent:.0f} s; last: {tally.last_problem or 'nothing'}"
                )
            # what is under way is past its deadline: nobody will finish the shards in hand
            if stopping() and silent > job.asked.patience.deadline_ms / 1000:
                return
            check_refusals()

    await _first_to_end(feed(), guard(), *(endpoint.run() for endpoint in endpoints))


async def _first_to_end(*parts: Awaitable[None]) -> None:
    """Run all parts until one ends or fails, then cancel the rest. The failure is raised as itself, not in a group."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException) and not isinstance(end, asyncio.CancelledError):
            raise _innermost(end)


def _innermost(problem: BaseException) -> BaseException:
    while isinstance(problem, BaseExceptionGroup):
        problem = problem.exceptions[0]
    return problem


async def _send_shard(shard: ShardInHand, work: WorkQueue, texts_of: TextsOf, endpoints: Sequence[Endpoint]) -> None:
    """Format the shard's pairs a block at a time and queue them, never far ahead of what the endpoints take."""
    for positions in _blocks(shard.sending_order()):
        texts = await asyncio.to_thread(_block_texts, shard.rows, positions, texts_of)
        ahead = max(BLOCK, sum(endpoint.window.limit for endpoint in endpoints))
        await work.put([Pair(shard, position, of_pair) for position, of_pair in zip(positions, texts)], room=ahead)


def _blocks(positions: list[int]) -> Iterator[list[int]]:
    return (positions[start : start + BLOCK] for start in range(0, len(positions), BLOCK))


def _block_texts(rows: pa.Table, positions: list[int], texts_of: TextsOf) -> list[tuple[bytes, ...]]:
    block = rows.take(positions)
    return texts_of(*(block.column(name).to_pylist() for name in ("query", "title", "summary")))
