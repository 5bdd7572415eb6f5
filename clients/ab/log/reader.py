"""Read the raw log: every whole record in order; torn and damaged lines are counted and named, never raised."""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients.ab.log.lines import SUFFIX, decode
from ranking.errors import InputError

logger = logging.getLogger("ab_log")


@dataclass
class ReadCounts:
    """What a read met. torn: cut-off last lines; damaged: "file:line" of lines with a wrong checksum elsewhere."""

    files: int = 0
    records: int = 0
    torn: int = 0
    damaged: list[str] = field(default_factory=list)


def log_files(folder: str | Path) -> list[Path]:
    """The raw files of a log folder, oldest first. InputError if there is no such folder.

    A link, a folder or a pipe of that name is left out and named: the router makes none, and reading a pipe would never
    end.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such log folder")
    files = []
    for path in sorted(Path(folder).glob(f"*{SUFFIX}")):
        try:
            ordinary = stat.S_ISREG(path.lstat().st_mode)
        except FileNotFoundError:  # retention was faster: as if it had been gone before
            continue
        if ordinary:
            files.append(path)
        else:
            logger.warning("%s: left out, because it is no ordinary file", path)
    return files


def read_lines(path: Path, counts: ReadCounts) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(1-based number of its line, bytes of the line, record) of every whole record of one file, in order.

    Torn and damaged lines are counted, never raised. InputError: the file is gone.
    """
    bad = 0
    with still_there(path):
        stream = path.open("rb")
    with stream:
        counts.files += 1
        for number, line in enumerate(stream, 1):
            if bad:  # the bad line was not the last one: damage
                counts.damaged.append(f"{path}:{bad}")
                bad = 0
            record = decode(line[:-1]) if line.endswith(b"\n") else None
            if record is None:
                bad = number
                continue
            counts.records += 1
            yield number, len(line), record
    counts.torn += bool(bad)


@contextmanager
def still_there(path: Path) -> Iterator[None]:
    """A listed file that is gone when the block needs it is an InputError.

    Left out, its day would be written anew from the files that are left.
    """
    try:
        yield
    except FileNotFoundError as problem:
        cause = "perhaps by another ab_compact.py --retain-days"
        raise InputError(f"{path}: removed while the log was being read, {cause}; run this again") from problem


def read_file(path: Path, counts: ReadCounts) -> Iterator[dict[str, Any]]:
    """Every whole record of one file, in order."""
    return (record for _, _, record in read_lines(path, counts))


def read_folder(folder: str | Path, counts: ReadCounts) -> Iterator[dict[str, Any]]:
    """Every whole record of a log folder, file by file."""
    for path in log_files(folder):
        yield from read_file(path, counts)
