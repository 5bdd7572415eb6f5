"""Keeps programs that rewrite a folder of compacted days apart, and removes the scratch data that a killed one left."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ranking.errors import InputError
from ranking.files import flush

logger = logging.getLogger("ab_log")

LOCK = ".compact.lock"  # in the folder of days; names the scratch folder in use, which --temp-folder may put anywhere
SCRATCH = ".compact-"
# what a kill leaves in the folder of days: scratch folders (an earlier release noted none) and files half written
LEFTOVERS = (
    f"{SCRATCH}*",
    ".rejects.jsonl.*.part",
    ".experiments.json.*.part",
    *(f"{table}/.*.part" for table in ("exposures", "events", "shadows")),
)


class DaysLock:
    """Held: no other compaction, erasure or retention is at work on the folder of days."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    @contextmanager
    def scratch(self, parent: Path) -> Iterator[Path]:
        """A scratch folder in `parent`, gone when the block ends; after a kill, the lock's next holder removes it."""
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent)).absolute()
        try:
            self._note(str(folder))
            yield folder
        finally:
            _remove(folder)
            self._note("")

    def noted(self) -> list[Path]:
        """The scratch folder that the last holder was killed over, if it is still there."""
        folder = Path(os.fsdecode(os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)))
        return [folder] if folder.name.startswith(SCRATCH) and folder.is_dir() else []

    def _note(self, text: str) -> None:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, os.fsencode(text), 0)
        os.fsync(self._descriptor)


@contextmanager
def days_lock(days: Path) -> Iterator[DaysLock]:
    """Hold the lock of a folder of compacted days; waits for another holder, and says so.

    What a killed compaction left holds users' names and queries: it is removed first, and named. InputError if it
    cannot be, or the folder cannot be locked.
    """
    descriptor = _locked(days / LOCK)
    try:
        lock = DaysLock(descriptor)
        left = {path for pattern in LEFTOVERS for path in days.absolute().glob(pattern)} | set(lock.noted())
        for path in sorted(left):
            _remove(path)
            logger.warning("%s: removed; a program that was killed had left it", path)
        yield lock
        (days / LOCK).unlink()  # after an error it stays, with its note; whoever waits for it looks whether it is gone
    finally:
        os.close(descriptor)


def _locked(path: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o640)
        except OSError as problem:
            raise InputError(f"{path}: cannot be written: {problem}") from problem
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("%s: waiting for another ab_compact or ab_erase to end", path)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except OSError as problem:
            os.close(descriptor)
            raise InputError(f"{path}: cannot be locked: {problem}") from problem
        os.close(descriptor)  # the holder that was waited for has removed it, and a third may hold a new one


def _remove(path: Path) -> None:
    while path.exists():
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            flush(path.parent)
        except FileNotFoundError:  # somebody else who cleans up was faster, perhaps with a part of it only
            continue
        except OSError as problem:
            raise InputError(f"{path}: holds users' data and cannot be removed: {problem}") from problem
