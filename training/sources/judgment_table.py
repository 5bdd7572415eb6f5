"""The user's own judgments in one table: Parquet, JSONL, CSV or TSV, with a map from our column names to theirs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ranking.errors import DataError, InputError
from ranking.text import normalise
from training.sources.judged_collections import UNSPLIT, JudgedSource, Pair, Text
from training.sources.query_splits import SPLITS, split_name
from training.sources.row_readers import (
    BadRows,
    Row,
    grade_field,
    json_columns,
    json_rows,
    parquet_columns,
    parquet_rows,
    text_field,
)
from training.sources.separated_rows import separated_rows

REQUIRED = ("query", "title", "grade")
_PART = re.compile(r"-\d+-of-\d+$")  # of a file's name, as Hugging Face's hub numbers the parts of a split
OPTIONAL = ("query_id", "doc_id", "summary", "split")


def parse_columns(pairs: list[str]) -> dict[str, str]:
    """["query=search_term", ...] -> {"query": "search_term"}. InputError names a pair that is no such thing."""
    columns: dict[str, str] = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not equals or not theirs or ours not in REQUIRED + OPTIONAL:
            raise InputError(f"--columns {pair}: write OURS=THEIRS, OURS being one of {', '.join(REQUIRED + OPTIONAL)}")
        columns[ours] = theirs
    return columns


def read_table_source(
    path: Path, columns: dict[str, str], bad: BadRows, grades: Mapping[str, int] | None = None
) -> JudgedSource:
    """One row per judged pair: query, title, grade, and query_id, doc_id, summary, split where there are such columns.

    The files of a folder that are named for train, dev and test have these splits. Without query_id the normalised
    query is the id; without doc_id a hash of title and summary is. A document may have another text under another
    query. grades: of words in lower case. An empty grade makes the pair a candidate to be labelled. DataError: a
    required or mapped column is missing, or a row is bad.
    """
    source = JudgedSource(licence="the user's own")
    seen: set[tuple[str, Pair]] = set()
    number = 0
    files = _files(path)
    splits = _splits_of_names(path, files, columns)
    for file in files:
        names, rows = _open(file, columns, bad, _partition(path, file) | splits.get(file, {}))
        for number, row in rows:
            try:
                values = {ours: row.get(theirs) for ours, theirs in names.items()}
                query_id, doc_id, query, text = _ids_and_texts(source, values)
                split = _split(values)
                pair = (query_id, doc_id)
                # a row without a split can end up in any: it must not meet a second grade of its pair there
                if any((other, pair) in seen for other in ({split, UNSPLIT} if split else {UNSPLIT, *SPLITS})):
                    raise ValueError(f"duplicate key (query {query_id!r}, document {doc_id!r})")
                grade = values["grade"]
                if grade is None or (isinstance(grade, str) and not grade.strip()):
                    source.unlabelled.add(pair)
                else:
                    source.judge(split, pair, grade_field(grade, grades), file, number)
                seen.add((split, pair))
                source.queries.setdefault(query_id, query)
                source.add_text(pair, text)
            except ValueError as problem:
                bad.refuse(file, number, str(problem))
    if not number and not bad.count:
        raise DataError(path, "no usable query: the table has no row")
    source.corpus_size = len(source.documents)
    return source


def _files(path: Path) -> list[Path]:
    """The file, or the Parquet files of a folder as Spark writes it, in folders like split=train below it too.

    DataError if they have other columns, InputError if a folder below is of another kind.
    """
    if not path.is_dir():
        return [path]
    files = sorted(
        file for file in path.rglob("*.parquet")
        if file.is_file() and not any(part.startswith(("_", ".")) for part in file.relative_to(path).parts)
    )  # fmt: skip
    if not files:
        raise InputError(f"{path}: a folder without .parquet files; one file, or a folder of Parquet files, is read")
    columns: set[str] = set()
    for file in files:
        if odd := next((part for part in file.relative_to(path).parts[:-1] if "=" not in part), ""):
            raise InputError(f"{file}: the folder {odd} is not named like split=train; give each folder by itself")
        there = _columns(path, file)
        columns = columns or there
        if there != columns:
            raise DataError(file, f"its columns are not those of {files[0].relative_to(path)}")
    return files


def _partition(path: Path, file: Path) -> dict[str, str | None]:
    """Column -> value from the names of the folders between a table's folder and a file of it, as Hive writes them."""
    pairs = [part.partition("=") for part in file.relative_to(path).parts[:-1]]
    return {unquote(n): None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value) for n, _, value in pairs}


def _splits_of_names(path: Path, files: list[Path], columns: Mapping[str, str]) -> dict[Path, dict[str, str | None]]:
    """File -> column split, where a folder's files are named train.parquet, or train-00000-of-00002.parquet, and so on.

    {} where none is named so, or a column says the split. InputError if other files lie beside them.
    """
    if not path.is_dir() or "split" in columns or "split" in map(str.lower, _columns(path, files[0])):
        return {}
    splits = {file: split_name(_PART.sub("", file.name.split(".")[0])) for file in files}
    if not any(splits.values()):
        return {}
    if odd := next((file for file, split in splits.items() if split is None), None):
        named = next(file for file, split in splits.items() if split)
        raise InputError(
            f"{odd}: {named.name} beside it is named for its split, this file is not: name each for train, dev or "
            "test, or give them a column split"
        )
    return {file: {"split": split} for file, split in splits.items()}


def _columns(path: Path, file: Path) -> set[str]:
    """The columns of a Parquet file in a table's folder, those that the names of folders give among them."""
    return {*parquet_columns(file), *_partition(path, file)}


def _open(
    path: Path, columns: dict[str, str], bad: BadRows, partition: dict[str, str | None]
) -> tuple[dict[str, str], Iterator[Row]]:
    """Our name -> the file's column, and the rows. partition: columns that the names of folders give."""
    name = path.name.lower().removesuffix(".gz")
    if not path.is_file():
        raise DataError(path, "no such file")
    if name.endswith(".parquet"):
        there = parquet_columns(path)
        names = _resolve(path, columns, [*there, *partition])
        rows = parquet_rows(path, bad, [name for name in names.values() if name in there])
        return names, ((number, partition | row) for number, row in rows)
    lines = name.endswith((".jsonl", ".ndjson"))
    if not lines and not name.endswith((".csv", ".tsv")):
        raise InputError(f"{path}: .parquet, .jsonl, .csv or .tsv is expected (the last three may be gzipped)")
    rows = json_rows(path, bad) if lines else separated_rows(path, bad)
    first = next(rows, None)
    if first is None:
        return {}, rows
    return _resolve(path, columns, json_columns(path) if lines else first[1]), chain([first], rows)


def _resolve(path: Path, columns: dict[str, str], there: Iterable[str]) -> dict[str, str]:
    """Our name -> the file's column, for the columns that are there; "Query" is found as query."""
    there = list(there)
    alike = {str(name).strip().lower(): name for name in reversed(there)}
    names = {ours: columns.get(ours, ours if ours in there else alike.get(ours, ours)) for ours in REQUIRED + OPTIONAL}
    missing = [f"{ours} ({theirs})" if ours != theirs else ours for ours, theirs in names.items()
               if theirs not in there and (ours in REQUIRED or ours in columns)]  # fmt: skip
    if missing:
        raise DataError(
            path,
            f"no column {', '.join(missing)}; there are {', '.join(map(str, there))}; map them with --columns "
            + ",".join(f"{ours}=THEIRS" for ours, theirs in names.items() if theirs not in there and ours in REQUIRED),
        )
    return {ours: theirs for ours, theirs in names.items() if theirs in there}


def _ids_and_texts(source: JudgedSource, values: dict[str, Any]) -> tuple[str, str, str, Text]:
    """Query id, document id, query and the document's text of a row. ValueError if the query id had another query."""
    query = text_field(values["query"], "query")
    title = text_field(values["title"], "title", blank_ok=True)
    summary = text_field(values.get("summary"), "summary", blank_ok=True)
    spelled = normalise(query).casefold()
    query_id = text_field(values["query_id"], "query_id") if "query_id" in values else spelled
    if "doc_id" in values:
        doc_id = text_field(values["doc_id"], "doc_id")
    else:
        doc_id = hashlib.sha256(f"{title}\t{summary}".encode()).hexdigest()[:16]
    known = source.queries.get(query_id)
    if known not in (None, query) and normalise(known or "").casefold() != spelled:
        raise ValueError(f"query {query_id!r} has another text in an earlier row")
    return query_id, doc_id, query, (title, summary)


def _split(values: dict[str, Any]) -> str:
    given = values.get("split")
    if given is None or given == "":
        return UNSPLIT
    split = split_name(text_field(given, "split"))
    if split is None:
        raise ValueError(f"split {given!r}: one of {', '.join(SPLITS)} is expected")
    return split
