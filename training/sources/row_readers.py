"""Rows of text and Parquet files, each with the number that an editor would show, and what happens to a bad one.

A bad row raises DataError with its file, number and reason, or, where rejects are kept, goes to the rejects file and
the reading goes on. A file that breaks off (truncated gzip or Parquet) always raises: nobody knows what its rest said.
"""

from __future__ import annotations

import codecs
import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ranking.errors import DataError
from ranking.limits import MAX_FIELD_BYTES, field_bytes
from ranking.schema import MAX_GRADE, BadRow, Rejects, check_once, reading
from ranking.telemetry import bars_are_read
from ranking.visible import is_visible

Row = tuple[int, dict[str, Any]]
_UTF16 = "this is UTF-16; iconv -f UTF-16 -t UTF-8 converts it"
_NO_UTF8_TEXT = {  # what a file of another kind begins with
    codecs.BOM_UTF16_LE: _UTF16,
    codecs.BOM_UTF16_BE: _UTF16,
    b"\x1f\x8b": "this is gzip: give it a name that ends in .gz",
    b"PK\x03\x04": "this is a zip archive, as Excel's .xlsx is one: unpack it, or save the table as CSV UTF-8",
}


class BadRows:
    """rejects: where refused rows go; None stops at the first, with what to do about it in brackets.

    first: the first refused row and why, where rejects are kept.
    """

    def __init__(self, rejects: Rejects | None = None, remedy: str = ""):
        self.rejects, self.remedy = rejects, remedy
        self.first = ""

    @property
    def count(self) -> int:
        """How many rows were refused so far."""
        return self.rejects.count if self.rejects is not None else 0

    def refuse(self, path: str | Path, row: int, reason: str) -> None:
        """Note a bad row and go on; DataError where rejects are not kept."""
        if self.rejects is None:
            raise DataError(path, f"{reason} ({self.remedy})" if self.remedy else reason, row)
        self.first = self.first or f"{path}, row {row}: {reason}"
        self.rejects.add(path, [BadRow(row, reason)])


def text_lines(path: Path, bad: BadRows, blank: bool = False) -> Iterator[tuple[int, str]]:
    """(line number, text without its line end) of a UTF-8 file, gzip or plain. blank: give blank lines too."""
    if not path.is_file():
        raise DataError(path, "no such file")
    number = 0
    with (
        gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream,
        tqdm(desc=path.name, unit="row", disable=not bars_are_read(), leave=False) as bar,
    ):
        while True:
            try:
                line = stream.readline()
            except (EOFError, gzip.BadGzipFile, zlib.error) as problem:
                hint = "" if number else "; if it is no gzip, take .gz off its name"
                raise DataError(path, f"truncated or damaged gzip: {problem}{hint}", number + 1) from problem
            if not line:
                return
            number += 1
            bar.update()
            if number == 1:
                if told := next((what for mark, what in _NO_UTF8_TEXT.items() if line.startswith(mark)), None):
                    raise DataError(path, told)
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as problem:
                bad.refuse(
                    path,
                    number,
                    f"not valid UTF-8 at byte {problem.start + 1} of the line; "
                    "iconv -f WINDOWS-1252 -t UTF-8 converts most such files of western Europe; "
                    "in Japan they are CP932, in China GB18030",
                )
                continue
            if blank or text.strip():
                yield number, text


def json_rows(path: Path, bad: BadRows) -> Iterator[Row]:
    """One JSON object per line."""
    for number, line in text_lines(path, bad):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as problem:
            bad.refuse(path, number, f"not JSON: {' '.join(str(problem).split())}")
            continue
        if not isinstance(content, dict):
            bad.refuse(path, number, "not a JSON object")
            continue
        yield number, content


def json_columns(path: Path) -> list[str]:
    """The keys of all rows, in the order in which they come: a row may leave out what it has no value for."""
    keys: dict[str, None] = {}
    for _, row in json_rows(path, _NotedLater()):
        keys.update(dict.fromkeys(row))
    return list(keys)


class _NotedLater(BadRows):
    """For a first pass over a file: the second one notes its bad rows."""

    def refuse(self, path: str | Path, row: int, reason: str) -> None:
        """Nothing."""


def parquet_columns(path: Path) -> list[str]:
    """Names of a Parquet file's columns. DataError if it is truncated or no Parquet."""
    with reading(path):
        return list(pq.read_schema(path).names)


def parquet_rows(path: Path, bad: BadRows, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows of a Parquet file, numbered from 1, with these columns only (None: all).

    DataError if the file is truncated or no Parquet, or if one of the columns holds neither text nor numbers.
    """
    with reading(path):
        file = pq.ParquetFile(path)
        batches = file.iter_batches(8192, columns=columns and list(columns))
    check_once(file.schema_arrow, columns or (), path)
    for name in columns or ():
        kind = file.schema_arrow.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_temporal(kind) or pa.types.is_nested(kind):
            raise DataError(path, f"column {name} is {kind}: text or numbers are needed")
    number = 0
    with tqdm(
        total=file.metadata.num_rows, desc=path.name, unit="row", disable=not bars_are_read(), leave=False
    ) as bar:
        while True:
            with reading(path):
                batch = next(batches, None)
            if batch is None:
                return
            for part in _decodable(batch):
                number += len(part) if part else 1
                if part is None:
                    bad.refuse(path, number, "not valid UTF-8")
                else:
                    yield from enumerate(part, number - len(part) + 1)
            bar.update(len(batch))


def _decodable(batch: pa.RecordBatch) -> Iterator[list[dict[str, Any]] | None]:
    """The batch's rows at once, or, where some text is not UTF-8, one by one with None for a row that holds it."""
    try:
        yield batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(len(batch)):
            try:
                yield batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError:
                yield None


def column(row: dict[str, Any], name: str, path: Path) -> Any:
    """A row's value. DataError if the column is missing: that is the whole file's fault, not the row's."""
    if name not in row:
        raise DataError(path, f"no column {name}; there are {', '.join(map(str, row))}")
    return row[name]


def json_field(row: dict[str, Any], name: str) -> Any:
    """A JSON row's value. ValueError if it has none: each row of JSON lines names its own fields."""
    if name not in row:
        raise ValueError(f"no field {name}; there are {', '.join(map(str, row)) or 'none'}")
    return row[name]


def text_field(value: Any, name: str, blank_ok: bool = False) -> str:
    """A field as text; a whole number is taken as its digits (ids are often numbers). ValueError says what is wrong."""
    if isinstance(value, Decimal) and value == value.to_integral_value():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None and blank_ok:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {'null' if value is None else type(value).__name__}, text is needed")
    try:
        size = field_bytes(value)
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half a surrogate pair: not valid Unicode") from None
    if size > MAX_FIELD_BYTES:
        raise ValueError(f"{name} is {size} bytes long, at most {MAX_FIELD_BYTES} are taken")
    if not blank_ok and not is_visible(value):
        raise ValueError(f"{name} is blank")
    return value


def grade_field(value: Any, words: Mapping[str, int] | None = None) -> float:
    """A grade as the source has it: a finite number, or its text ("1,5" too). ValueError says what is wrong.

    words: grades of words in lower case, where the source grades by them; true and false are words.
    """
    if isinstance(value, bool):
        if not words:
            raise ValueError("grade is bool, a number is needed; --grades true=1,false=0 says what it means")
        value = str(value).lower()
    if words and isinstance(value, str) and value.strip().casefold() in words:
        return words[value.strip().casefold()]
    if not isinstance(value, int | float | str | Decimal):
        raise ValueError(f"grade is {'null' if value is None else type(value).__name__}, a number is needed")
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and text.count(",") == 1 and "." not in text:
        text = text.replace(",", ".")  # as spreadsheets of half of Europe write it
    try:
        number = float(text)
    except ValueError:
        if words:
            raise ValueError(f"grade {str(value)[:40]!r} is none of {', '.join(words)}; name it in --grades") from None
        raise ValueError(
            f"grade {str(value)[:40]!r} is not a number; grades that are words are named, as in "
            "--grades Irrelevant=0,Partial=1,Exact=2"
        ) from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("grade is NaN or infinite")
    return number


def on_scale(grade: float) -> bool:
    """Whether a grade can stay as it is: a whole number from 0 to MAX_GRADE."""
    return grade == int(grade) and 0 <= grade <= MAX_GRADE
