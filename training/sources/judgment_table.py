"""The user's own judgments in one table: Parquet, JSONL, CSV or TSV, with a map from our column names to theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ranking.errors import DataError, InputError
from ranking.text import normalise
from training.sources.judged_collections import UNSPLIT, JudgedSource, Pair, Text
from training.sources.query_splits import SPLITS, split_name
from training.sources.row_readers import BadRows, Row, grade_field, json_rows, parquet_rows, separated_rows, text_field

REQUIRED = ("query", "title", "grade")
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

    Without query_id the normalised query is the id; without doc_id a hash of title and summary is. A document may have
    another text under another query. grades: of words in lower case. An empty grade makes the pair a candidate to be
    labelled. DataError: a required or mapped column is missing, or a row is bad.
    """
    source = JudgedSource(licence="the user's own")
    names: dict[str, str] | None = None
    seen: set[Pair] = set()
    for number, row in _rows(path, bad):
        if names is None:
            names = _resolve(path, columns, row)
        try:
            values = {ours: row.get(theirs) for ours, theirs in names.items()}
            query_id, doc_id, query, text = _ids_and_texts(source, values)
            split = _split(values)
            pair = (query_id, doc_id)
            if pair in seen:
                raise ValueError(f"duplicate key (query {query_id!r}, document {doc_id!r})")
            grade = values["grade"]
            if grade is None or (isinstance(grade, str) and not grade.strip()):
                source.unlabelled.add(pair)
            else:
                source.judge(split, pair, grade_field(grade, grades), path, number)
            seen.add(pair)
            source.queries.setdefault(query_id, query)
            source.add_text(pair, text)
        except ValueError as problem:
            bad.refuse(path, number, str(problem))
    if names is None:
        raise DataError(path, "no usable query: the table has no row")
    source.corpus_size = len(source.documents)
    return source


def _rows(path: Path, bad: BadRows) -> Iterator[Row]:
    name = path.name.removesuffix(".gz")
    if not path.is_file():
        raise DataError(path, "no such file")
    if name.endswith(".parquet"):
        return parquet_rows(path, bad)
    if name.endswith((".jsonl", ".ndjson")):
        return json_rows(path, bad)
    if name.endswith((".csv", ".tsv")):
        return separated_rows(path, bad)
    raise InputError(f"{path}: .parquet, .jsonl, .csv or .tsv is expected (the last three may be gzipped)")


def _resolve(path: Path, columns: dict[str, str], row: dict[str, Any]) -> dict[str, str]:
    """Our name -> the file's column, for the columns that are there; "Query" is found as query."""
    alike = {str(name).strip().lower(): name for name in reversed(row)}
    names = {ours: columns.get(ours, ours if ours in row else alike.get(ours, ours)) for ours in REQUIRED + OPTIONAL}
    missing = [f"{ours} ({theirs})" if ours != theirs else ours for ours, theirs in names.items()
               if theirs not in row and (ours in REQUIRED or ours in columns)]  # fmt: skip
    if missing:
        raise DataError(
            path,
            f"no column {', '.join(missing)}; there are {', '.join(map(str, row))}; map them with --columns "
            + ",".join(f"{ours}=THEIRS" for ours, theirs in names.items() if theirs not in row and ours in REQUIRED),
        )
    return {ours: theirs for ours, theirs in names.items() if theirs in row}


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
