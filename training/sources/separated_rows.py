"""Rows of CSV and TSV files, and what a stray quote does to them."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from ranking.errors import DataError
from training.sources.row_readers import BadRows, Row, text_lines

MAX_RECORD_LINES = 100_000  # of a CSV row: no text has so many, an unclosed quote need not be read to the end
HOW_TO_QUOTE = 'a text with a quote in it is quoted, the quote doubled: "24"" lamp"'


def separated_rows(path: Path, bad: BadRows) -> Iterator[Row]:
    """Rows under a header line: tabs without quoting where the name says .tsv, else CSV with quoting.

    A CSV is separated by what its header has most of outside quotes, commas, semicolons, tabs or bars: spreadsheets
    write semicolons where the comma is the decimal point. A line "sep=;" before the header says so as well.
    A row of several lines has the number of its first one. DataError, whatever the caller does with bad rows: a quote
    that is never closed, or that has swallowed other rows.
    """
    tabs = path.name.lower().removesuffix(".gz").endswith(".tsv")
    header: list[str] | None = None
    for number, row in _tab_rows(path, bad) if tabs else _CsvRows(path, bad):
        if header is None:
            header = [name.strip() for name in row]
            named = [name for name in header if name]
            if len(set(named)) < len(named):
                raise DataError(path, "a column name occurs twice in the header")
            beyond = len(header) - next((i for i, name in enumerate(reversed(header)) if name), len(header))
        elif any(row[beyond:]) and len(row) == len(header):
            # a spreadsheet's empty columns; with a value, the row's cells stand in the wrong columns
            bad.refuse(path, number, "a value behind the last column that has a name")
        else:
            yield number, {name: value for name, value in zip(header, row) if name}
    if header is None:
        raise DataError(path, "empty: a header line is needed")


def _tab_rows(path: Path, bad: BadRows) -> Iterator[tuple[int, list[str]]]:
    width = 0
    for number, line in text_lines(path, bad):
        row = line.split("\t")
        if not width:
            _check_line_ends(path, line)
        width = width or len(row)
        if len(row) == width:
            yield number, row
        else:
            bad.refuse(path, number, _wrong_width(row, width))


def _check_line_ends(path: Path, header: str) -> None:
    """DataError for a file of carriage returns alone: its header is all of it."""
    if "\r" in header:
        raise DataError(
            path, "its lines end in carriage returns alone, as Excel for Macs may write them; "
            "tr '\\r' '\\n' < OLD > NEW converts it"
        )  # fmt: skip


def _wrong_width(row: list[str], width: int) -> str:
    return f"{len(row)} fields, the header has {width}"


class _CsvRows:
    """Rows of a CSV file, the header first, each with the number of its first line.

    A stray quote makes a row of all lines up to the next quote: they are refused one by one, so that none is lost
    uncounted, or, where the end of the file is reached or the row can pass for a good one, the file is.
    """

    def __init__(self, path: Path, bad: BadRows):
        self.path, self.bad = path, bad
        self.record: list[tuple[int, str]] = []  # lines of the row that is being read, with their numbers
        self.ended = False
        self.separator = ","

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        csv.field_size_limit(1 << 30)  # an over-long field is refused later, by name, like in every other format
        source = text_lines(self.path, self.bad, blank=True)  # within a quoted text a blank line is a part of it
        first = next((line for line in source if line[1].strip()), None)
        if first is not None and (told := re.fullmatch(r'"?sep=(.)"?', first[1], re.IGNORECASE)):
            first = next((line for line in source if line[1].strip()), None)  # that one was Excel's for the separator
            self.separator = told[1]
        elif first is not None:
            unquoted = re.sub(r'"[^"]*"', "", first[1])
            self.separator = max(",;\t|", key=unquoted.count)
        if first is None:
            return
        _check_line_ends(self.path, first[1])
        rows = csv.reader(self._lines(first, source), delimiter=self.separator, strict=True)
        width = 0
        while True:
            self.record = []
            try:
                row = next(rows, None)
            except csv.Error as problem:
                if self.ended:
                    raise DataError(
                        self.path, f"a quote opens here and is never closed; {HOW_TO_QUOTE}", self._quote_row()
                    ) from problem
                self._refuse(f"not CSV: {problem}")
                continue
            if row is None:
                return
            if width and len(self.record) == 1 and not self.record[0][1].replace(self.separator, "").strip():
                continue  # a blank line, or a spreadsheet's empty row
            width = width or len(row)
            if len(row) != width:
                self._refuse(_wrong_width(row, width))
            elif self._swallowed(row):
                raise DataError(
                    self.path,
                    f"a quote opens here and closes in row {self.record[-1][0]}, behind what look like rows of the "
                    f"table; {HOW_TO_QUOTE}. If they are one text, give it without these line breaks, or as JSONL",
                    self._quote_row(),
                )
            else:
                yield self.record[0][0], row

    def _lines(self, first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[str]:
        for line in chain([first], rest):
            self.record.append(line)
            if len(self.record) > MAX_RECORD_LINES:
                raise DataError(
                    self.path,
                    f"a quote opens here and is not closed within {MAX_RECORD_LINES} lines; {HOW_TO_QUOTE}",
                    self._quote_row(),
                )
            yield line[1] + "\n"
        self.ended = True

    def _refuse(self, reason: str) -> None:
        """Every line of the row is a bad one."""
        (start, _), (end, _) = self.record[0], self.record[-1]
        if end > start:
            reason += f" (a quoted field makes rows {start} to {end} one)"
        for number, _ in self.record:
            self.bad.refuse(self.path, number, reason)

    def _quote_row(self) -> int:
        """The line in which the quote opens that goes on into the row's last line, or to the end of the file."""
        opened, quoted = self.record[0][0], False
        for number, line in self.record if self.ended else self.record[:-1]:
            before = self.separator
            for mark in line:
                if mark == '"' and quoted:
                    quoted = False  # a doubled quote opens again at once: see below
                elif mark == '"' and (before == self.separator or before == '""'):
                    quoted, opened = True, opened if before == '""' else number
                before = '""' if mark == '"' and not quoted else mark
        return opened

    def _swallowed(self, row: list[str]) -> bool:
        """Whether most lines of the row, its first or last one too, look like rows by themselves.

        That is, they are as wide and have numbers where the row has some. A text that holds such a table may look so as
        well; it is refused with the way out, since rows that vanish in a text are worse.
        """
        numeric = [i for i, value in enumerate(row) if _is_number(value)]
        if len(self.record) < (2 if numeric else 10):  # without numbers, a text of a few lines may have as many commas
            return False
        cells = [line.split(self.separator) for _, line in self.record]
        alike = [len(line) == len(row) and all(_is_number(line[i]) for i in numeric) for line in cells]
        return (alike[0] or alike[-1]) and 2 * sum(alike) > len(alike)


def _is_number(text: str) -> bool:
    try:
        float(text.strip().strip('"').replace(",", "."))
    except ValueError:
        return False
    return True
