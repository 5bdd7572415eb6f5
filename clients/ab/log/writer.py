"""Write the raw log: an appended record is on disk before its answer leaves (docs/ab-log.md has the format).

    log = ExposureLog("runs/ab/log")
    await log.append("exposure", {...})      # True once it is on disk; log.write(...) for callers without a loop

Group commit: one thread writes whatever waits with one write and one fdatasync, so the price of the disk is shared by
all requests in flight and the event loop never waits for it.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clients.ab.log.lines import DAY_MICROSECONDS, SUFFIX, encode
from ranking.errors import InputError
from ranking.files import flush

logger = logging.getLogger("ab_log")

RETRY_SECONDS = 1.0  # after a failed write, the next attempt waits this long; a full disk is not hammered


def now_microseconds() -> int:
    """Microseconds since 1970, now."""
    return time.time_ns() // 1000


class ExposureLog:
    """Appends records to files of one UTC day each; an append is done when it is on disk.

    folder: made if absent; rotate_bytes, rotate_seconds: when a new file is begun; queue_bytes: records that may wait
    for a slow disk, beyond which a record counts as one that could not be written; clock: microseconds since 1970, for
    simulated days. InputError if the folder is not writable.
    """

    def __init__(
        self,
        folder: str | Path,
        rotate_bytes: int = 64 << 20,
        rotate_seconds: float = 3600.0,
        queue_bytes: int = 64 << 20,
        clock: Callable[[], int] = now_microseconds,
    ):
        self.folder, self.queue_bytes, self._clock = Path(folder), queue_bytes, clock
        self.waiting_records = self.waiting_bytes = 0  # queued and not yet on disk
        self._lock = threading.Lock()  # around these two and `failures`
        self._writing_since: float | None = None
        self.rotate_bytes, self.rotate_seconds = rotate_bytes, rotate_seconds
        self.failures = 0  # records that could not be written
        self.failing = ""  # why the last write failed, empty once one succeeds again
        self._queue: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._file: _File | None = None
        self._count = 0
        self._retry_at = 0.0
        try:
            self.folder.mkdir(mode=0o750, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as problem:
            raise InputError(f"{self.folder}: cannot write the log there: {problem}") from problem
        self._thread = threading.Thread(target=self._run, name="ab-log", daemon=True)
        self._thread.start()

    async def append(self, kind: str, record: dict[str, Any]) -> bool:
        """Log a record; True once it is on disk, False if it could not be written (counted, and the reason logged).

        Whoever gives up waiting may cancel this: the record stays in the queue.
        """
        return await self.append_all(kind, [record])

    async def append_all(self, kind: str, records: list[dict[str, Any]]) -> bool:
        """append for several records, which are written together or not at all."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        if not self._submit(kind, records, _Pending(b"", 0, len(records), future=future, loop=loop)):
            return False
        return await future

    def write(self, kind: str, record: dict[str, Any]) -> bool:
        """append for callers without an event loop."""
        done: queue.SimpleQueue[bool] = queue.SimpleQueue()
        return self._submit(kind, [record], _Pending(b"", 0, 1, done=done.put)) and done.get()

    @property
    def stalled_seconds(self) -> float:
        """How long the write under way has been waiting for the disk; 0 if none is."""
        since = self._writing_since
        return 0.0 if since is None else time.monotonic() - since

    def close(self) -> None:
        """Write what waits and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _submit(self, kind: str, records: list[dict[str, Any]], pending: _Pending) -> bool:
        # the time is taken where the order of the queue is made, so that a file holds one day and never goes back
        logged = self._clock()
        pending.lines = b"".join(encode({"type": kind, "logged": logged, **record}) for record in records)
        pending.day = logged // DAY_MICROSECONDS
        with self._lock:
            if self.waiting_bytes + len(pending.lines) > self.queue_bytes:
                self.failures += pending.records
                return False
            self.waiting_records += pending.records
            self.waiting_bytes += len(pending.lines)
        self._queue.put(pending)
        return True

    def _run(self) -> None:
        while True:
            batch = [self._next()]
            while not self._queue.empty():
                batch.append(self._queue.get_nowait())
            records = [p for p in batch if p is not None]
            self._writing_since = time.monotonic()
            start = 0
            while start < len(records):  # one write per day, nearly always one
                end = start + 1
                while end < len(records) and records[end].day == records[start].day:
                    end += 1
                self._commit(records[start:end])
                start = end
            self._writing_since = None
            if len(records) < len(batch):
                if self._file:
                    self._file.close()
                return

    def _next(self) -> _Pending | None:
        """What is to be written next, once it is there; a file that gets too old meanwhile is closed.

        A router without traffic would else hold it for ever, and ab_erase.py waits for its end.
        """
        file = self._file
        if file is not None:
            try:
                return self._queue.get(timeout=max(0.0, file.opened + self.rotate_seconds - time.monotonic()))
            except queue.Empty:
                self._file = None
                file.close()
        return self._queue.get()

    def _commit(self, records: list[_Pending]) -> None:
        try:
            if self.failing and time.monotonic() < self._retry_at:
                raise OSError(self.failing)
            self._write(records)
            written, self.failing = True, ""
        except OSError as problem:
            written = False
            if not self.failing:
                logger.error("the log cannot be written: %s; answers go on unlogged and are counted", problem)
            if not self.failing or time.monotonic() >= self._retry_at:
                self.failing, self._retry_at = str(problem), time.monotonic() + RETRY_SECONDS
            with self._lock:
                self.failures += sum(record.records for record in records)
            if self._file:  # what a failed write left behind is cut off; the next write begins a new file
                self._file.abandon()
                self._file = None
        with self._lock:
            self.waiting_records -= sum(record.records for record in records)
            self.waiting_bytes -= sum(len(record.lines) for record in records)
        _tell(records, written)

    def _write(self, records: list[_Pending]) -> None:
        block, count = b"".join(record.lines for record in records), sum(record.records for record in records)
        file = self._open_for(records[0].day)
        if file.append(block, count):
            return
        lost = file.records - count
        logger.error("%s: removed while the log was written to it: %d records on it are lost", file.path, lost)
        with self._lock:
            self.failures += lost  # they were answered as logged; these last ones go to a new file
        self._file = None
        file.close()
        file = self._open_for(records[0].day)
        if not file.append(block, count):
            raise OSError(f"{file.path}: removed while the log was written to it")

    def _open_for(self, day: int) -> _File:
        file = self._file
        if file and (
            file.day != day or file.size >= self.rotate_bytes or time.monotonic() - file.opened >= self.rotate_seconds
        ):
            self._file = None
            file.close()
            file = None
        if file is None:
            self._count += 1
            now = self._clock()
            stamp = datetime.fromtimestamp(now / 1e6, UTC)
            if now // DAY_MICROSECONDS != day:  # midnight passed while the record waited
                stamp = datetime.fromtimestamp(((day + 1) * DAY_MICROSECONDS - 1) / 1e6, UTC)
            name = f"{stamp:%Y-%m-%dT%H%M%S.%f}-{os.getpid()}-{self._count}{SUFFIX}"
            self._file = file = _File(self.folder / name, day)
        return file


@dataclass
class _Pending:
    lines: bytes
    day: int
    records: int
    future: asyncio.Future[bool] | None = None
    loop: asyncio.AbstractEventLoop | None = None
    done: Callable[[bool], None] | None = None


def _tell(records: list[_Pending], written: bool) -> None:
    """Wake whoever waits: one call per event loop, not one per record."""
    futures: dict[asyncio.AbstractEventLoop, list[asyncio.Future[bool]]] = {}
    for record in records:
        if record.done:
            record.done(written)
        elif record.loop and record.future:
            futures.setdefault(record.loop, []).append(record.future)
    for loop, waiting in futures.items():
        try:
            loop.call_soon_threadsafe(_resolve, waiting, written)
        except RuntimeError:  # the loop is closed: nobody waits any more
            logger.warning("%d records were written after their event loop had ended", len(waiting))


def _resolve(futures: list[asyncio.Future[bool]], written: bool) -> None:
    for future in futures:
        if not future.done():  # a client that went away has cancelled its own
            future.set_result(written)


class _File:
    """One open log file."""

    def __init__(self, path: Path, day: int):
        self.path, self.day, self.opened = path, day, time.monotonic()
        self.size = self.records = 0  # bytes and records on disk
        self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o640)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)  # ab_erase.py rewrites no file that somebody still appends to
            flush(path.parent)  # without it a power cut may forget the file itself
        except OSError:
            self.abandon()  # each retry would leave an open descriptor and an empty file behind
            raise

    def append(self, block: bytes, records: int) -> bool:
        """Write and sync a block of records; False if the file has been removed meanwhile, so that nobody will see it.

        OSError: the disk refuses.
        """
        view = memoryview(block)
        while view:
            view = view[os.write(self._descriptor, view) :]
        os.fdatasync(self._descriptor)
        self.size += len(block)
        self.records += records
        return os.fstat(self._descriptor).st_nlink > 0

    def close(self) -> None:
        os.close(self._descriptor)

    def abandon(self) -> None:
        """Cut back to the last whole write and close; an empty file is removed."""
        try:
            try:
                if self.size:
                    os.ftruncate(self._descriptor, self.size)
                else:
                    self.path.unlink(missing_ok=True)
            finally:
                os.close(self._descriptor)
        except OSError as problem:
            logger.error("%s: a torn tail stays behind: %s", self.path, problem)
