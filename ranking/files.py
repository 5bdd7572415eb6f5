"""Files and folders that others read while they are written: made beside their place, flushed to disk, then renamed.

A reader sees the old content or the whole new one, never a part, also after a crash or a power cut.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ranking.errors import InputError

_ASIDE_SUFFIX = ".part"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file to; on success it replaces `path`, on an exception it is removed.

    OSError names a file also where the disk is full, of which Python says no name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        yield aside
        flush(aside)
        aside.replace(path)
        flush(path.parent)  # the rename itself must survive a power cut
    except OSError as problem:
        if problem.filename is None and problem.errno in (errno.ENOSPC, errno.EDQUOT):
            problem.filename = str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path, aside_in: str | Path | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it is renamed to `path`, on an exception it is removed.

    aside_in: where it is filled, on the same file system, default beside `path`. OSError if `path` holds anything
    already.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(aside_in or path.parent) / _aside(path).name
    shutil.rmtree(aside, ignore_errors=True)  # of a killed run with the same process id
    aside.mkdir()
    try:
        yield aside
        _flush_all(aside)
        aside.rename(path)
        flush(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def replacing_folder(path: str | Path, aside_in: str | Path | None = None) -> Iterator[Path]:
    """As new_folder, but a folder that stands at `path` goes away for the new one.

    For the moment between two renames a reader finds no folder. If the second rename fails, the old folder is put back.
    """
    path = Path(path)
    old = Path(aside_in or path.parent) / f".{path.name}.{os.getpid()}.old"
    try:
        with new_folder(path, aside_in) as aside:
            yield aside
            _flush_all(aside)  # before the old folder goes: a disk takes long, and readers would find none meanwhile
            if path.exists():
                path.rename(old)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def only_holder(lock: Path, refusal: str) -> Iterator[None]:
    """Hold a lock file, which the kernel lets go of however the process ends; in it stands the holder's process id.

    InputError if another process has it: the refusal, with that process's id where it says {process}.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            stream.seek(0)
            raise InputError(refusal.replace("{process}", stream.read().strip())) from problem
        except OSError as problem:
            raise InputError(f"{lock}: cannot be locked: {problem}") from problem
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def check_not_read(out: Path, files: Iterable[Path]) -> None:
    """InputError if a program is about to write over a file that it reads."""
    if any(file.resolve() == out.resolve() for file in files):
        raise InputError(f"{out}: is what is to be read; name another file to write")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file by `replacing`."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any, *, indent: int | None = 2) -> None:
    """Write a JSON file by `replacing`. ValueError for NaN and infinity, TypeError for what JSON cannot hold.

    indent: spaces a level; None for one line.
    """
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_all(folder: Path) -> None:
    for written in [*folder.rglob("*"), folder]:
        flush(written)


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes whenever a file is written or replaced: time of change, size and inode. None: it cannot be read."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{_ASIDE_SUFFIX}")
