"""A CSV file that rows are appended to: a row is on disk or absent; what a crash tore is cut off at the next start."""

from __future__ import annotations

import csv
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from ranking.errors import InputError
from ranking.files import flush, only_holder

logger = logging.getLogger("search_page")

# the module's own limit of 128 KiB would refuse a file with a long summary that was itself appended without complaint
csv.field_size_limit(sys.maxsize)


def only_writer(path: Path) -> AbstractContextManager[None]:
    """Hold a file that is appended to.

    InputError if another process has it: each would write what is made of the rows without the other's.
    """
    lock = path.with_name(f".{path.name}.lock")
    return only_holder(lock, f"{path}: another judging page writes to it; name another file")


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a file that append_row wrote; none if it is absent or empty.

    A torn last row (it ends within a quoted cell, without a newline, or has too few cells) moves to PATH.torn, with a
    warning; so does a whole one that another program saved without its newline, since nobody can tell them apart.
    InputError: a file of other columns, or a broken row before the last.
    """
    content = path.read_bytes() if path.is_file() else b""
    header = _encoded([columns])
    if content and header.startswith(content) and content != header:
        _cut_off(path, content, 0, 1)
        return []
    rows: list[dict[str, str]] = []
    whole = 0  # bytes up to the end of the last good row
    broken, number = "", 0  # what is wrong with the row just read: only the last one may be torn
    for number, (end, cells, problem) in enumerate(_rows(content), 1):
        if broken:
            raise InputError(f"{path}: row {number - 1} {broken}; repair it by hand, or name another file")
        if number == 1 and cells != list(columns):
            raise InputError(
                f"{path}: its columns are not {', '.join(columns)}: name another file, or move this one away"
            )
        broken = problem or ("has too few cells" if cells and len(cells) < len(columns) else "")
        if not broken:
            whole = end
            if len(cells) > len(columns):
                raise InputError(f"{path}: row {number} has more cells than columns; repair it by hand")
            if number > 1 and cells:
                rows.append({name: plain_text(cell) for name, cell in zip(columns, cells, strict=True)})
    if broken:
        _cut_off(path, content, whole, number)
    return rows


def append_row(path: Path, columns: Sequence[str], row: dict[str, str]) -> None:
    """Append a row, and the header to a new or empty file; on disk once this returns.

    OSError if the disk refuses: the file is then as long as before, so that no later row joins a torn one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [plain_cell(row[name]) for name in columns]
    with path.open("ab", buffering=0) as stream:
        length = stream.seek(0, os.SEEK_END)
        left = memoryview(_encoded([cells] if length else [columns, cells]))
        try:
            while left:
                left = left[stream.write(left) :]
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(length)
            raise
    if not length:
        flush(path.parent)  # without it a power cut may forget the file itself


def _encoded(rows: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8")


def _rows(content: bytes) -> Iterator[tuple[int, list[str], str]]:
    """(where the row ends in bytes, its cells, what is wrong with it) of each row."""
    end = 0

    def lines() -> Iterator[str]:
        nonlocal end
        for line in io.BytesIO(content):
            end += len(line)
            yield line.decode("utf-8", "surrogateescape")

    reader = csv.reader(lines(), strict=True)
    while True:
        try:
            cells = next(reader)
            "".join(cells).encode("utf-8")
        except StopIteration:
            return
        except csv.Error as problem:
            yield end, [], f"cannot be read ({problem})"
        except UnicodeEncodeError:
            yield end, [], "is not UTF-8"
        else:
            yield end, cells, "" if end < len(content) or content.endswith(b"\n") else "has no newline at its end"


def _cut_off(path: Path, content: bytes, whole: int, number: int) -> None:
    tail = content[whole:]
    aside = path.with_name(f"{path.name}.torn")
    with aside.open("ab") as stream:
        stream.write(tail + b"\n")
    flush(aside)
    os.truncate(path, whole)
    flush(path)
    told = tail[:200].decode("utf-8", "replace")
    logger.warning(
        "%s: row %d has no proper end (a crash, or a program that saved the file without a last newline): it is set "
        "aside in %s and does not count: %r",
        path,
        number,
        aside,
        told,
    )


def plain_cell(text: str) -> str:
    """The text for a CSV that a spreadsheet opens: what it would run as a formula gets an apostrophe before it."""
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) or text[:1] in ("\t", "\r") else text


def plain_text(cell: str) -> str:
    """The text that plain_cell wrote."""
    return cell[1:] if cell[:1] == "'" and plain_cell(cell[1:]) == cell else cell
