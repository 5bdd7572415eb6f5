"""Scores that exist already, joined to candidates by query_id and doc_id: Parquet, JSON lines, CSV, TSV, TREC run."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa

from clients.labelling.candidate_file import CandidateFile
from clients.labelling.label_store import BATCH_ROWS, DUCKDB, stream
from ranking.database import literal, querying
from ranking.errors import DataError, InputError

TABULAR = {".csv": ",;\t|", ".tsv": "\t"}  # what may separate the columns
JSON_LINES = (".jsonl", ".ndjson", ".json")
TREC_RUNS = (".trec", ".run")
LONGEST_HEADER = 1 << 20  # bytes


@dataclass(frozen=True)
class ScoreColumns:
    """Where a score file has its keys and scores; a TREC run needs none.

    Args:
        query_id: column of the query's id
        doc_id: column of the document's id
        score: column of the score
    """

    query_id: str = "query_id"
    doc_id: str = "doc_id"
    score: str = "score"


@dataclass(frozen=True)
class JoinCounts:
    """What joined and what did not. unmatched: scores whose key no candidate has; example: one of these keys."""

    scores: int
    candidates: int
    joined: int
    unmatched: int
    example: str

    def __str__(self) -> str:
        lines = [
            f"{self.joined} of {self.candidates} candidates have a score",
            f"{self.unmatched} of {self.scores} scores belong to no candidate",
        ]
        return "; ".join(lines) + (f", e.g. {self.example}" if self.unmatched else "")


class ScoreFile:
    """A score file beside a candidate file, both opened in a DuckDB that spills into `scratch`; a context manager.

    InputError: unknown ending, or no such column. DataError: unreadable, a score that is no finite number, or two
    different scores for one key; it names the row or the key.
    """

    def __init__(self, path: Path, columns: ScoreColumns, candidates: CandidateFile, scratch: Path):
        self.path, self.candidates = path, candidates
        if not path.is_file():
            raise DataError(path, "no such file")
        self._columns, self._scratch = columns, scratch

    def __enter__(self) -> ScoreFile:
        self._connection = DUCKDB.open_database(self._scratch / ".spill")
        try:
            self._load()
        except duckdb.Error as problem:
            self._connection.close()
            raise DataError(self.path, f"cannot be read: {' '.join(str(problem).split())[:300]}") from problem
        except InputError:
            self._connection.close()
            raise
        return self

    def __exit__(self, *raised) -> None:
        self._connection.close()

    def counts(self) -> JoinCounts:
        """How many rows of either side found the other."""
        lone = "FROM scores ANTI JOIN asked USING (query_id, doc_id)"
        with querying(self.path):
            (scores,) = self._row("SELECT count(*) FROM scores")
            unmatched, example = self._row(f"SELECT count(*), min((query_id, doc_id)) {lone}")
            (joined,) = self._row("SELECT count(*) FROM asked SEMI JOIN scores USING (query_id, doc_id)")
        named = f"query_id {example[0]!r}, doc_id {example[1]!r}" if unmatched else ""
        return JoinCounts(scores, self.candidates.rows, joined, unmatched, named)

    def scores(self) -> Iterator[pa.RecordBatch]:
        """(row, score) of every candidate that has one, by rising 0-based row."""
        with querying(self.path):
            yield from stream(
                self._connection, "SELECT row, score FROM asked JOIN scores USING (query_id, doc_id) ORDER BY row"
            )

    def _row(self, query: str) -> tuple:
        """The first row, () if there is none. All are fetched: an unfinished result would block the connection."""
        rows = self._connection.execute(query).fetchall()
        return rows[0] if rows else ()

    def _load(self) -> None:
        run = self._connection.execute
        run(f"CREATE TEMP VIEW given AS {self._given()}")
        bad = self._row(
            "SELECT query_id, doc_id, raw FROM given WHERE query_id IS NULL OR doc_id IS NULL "
            "OR NOT coalesce(isfinite(try_cast(raw AS DOUBLE)), false) LIMIT 1"
        )
        if bad:
            raise DataError(
                self.path, f"query_id {bad[0]!r}, doc_id {bad[1]!r}: the score is {bad[2]!r}; a finite number is needed"
            )
        run(
            "CREATE TEMP TABLE scores AS SELECT query_id, doc_id, min(CAST(raw AS DOUBLE))::FLOAT AS score, "
            "min(CAST(raw AS DOUBLE)) < max(CAST(raw AS DOUBLE)) AS differ FROM given GROUP BY query_id, doc_id"
        )
        if twice := self._row("SELECT query_id, doc_id FROM scores WHERE differ ORDER BY ALL LIMIT 1"):
            raise DataError(self.path, f"two different scores for query_id {twice[0]!r}, doc_id {twice[1]!r}")
        self._load_candidates()

    def _load_candidates(self) -> None:
        """The table `asked`: row (0-based), query_id and doc_id of every candidate, null where an id is not UTF-8.

        DuckDB is not given the file itself, since it refuses the whole of it for one such cell.
        """
        self._connection.execute("CREATE TEMP TABLE asked (row BIGINT, query_id VARCHAR, doc_id VARCHAR)")
        for covered, rows, _ in self.candidates.read(self.candidates.ranges(BATCH_ROWS)):
            numbers = pa.array(range(covered.first_row, covered.first_row + covered.rows), pa.int64())
            self._connection.register("piece", rows.select(["query_id", "doc_id"]).append_column("row", numbers))
            self._connection.execute("INSERT INTO asked BY NAME FROM piece")
            self._connection.unregister("piece")

    def _given(self) -> str:
        """The file as SQL: query_id, doc_id as text, raw as it stands there."""
        name, path = self.path.name.lower().removesuffix(".gz"), literal(self.path)
        ending = Path(name).suffix
        separator = _separator(self.path, TABULAR[ending]) if ending in TABULAR else ""
        if ending in TREC_RUNS:
            return (
                "SELECT fields[1] AS query_id, fields[3] AS doc_id, fields[5] AS raw FROM (SELECT "
                r"string_split_regex(trim(line), '\s+') AS fields FROM read_csv(" + path + ", header = false, delim = "
                "'\\0', quote = '', escape = '', columns = {'line': 'VARCHAR'})) WHERE len(fields) > 1"
            )
        if ending == ".parquet":
            source = f"read_parquet({path})"
        elif ending in JSON_LINES:
            return self._json_lines(f"read_json_objects({path}, format = 'newline_delimited')")
        elif ending in TABULAR:
            source = f"read_csv({path}, header = true, all_varchar = true, delim = '{separator}')"
        else:
            known = ".parquet, .jsonl, .csv, .tsv, .trec, .run (text may be gzipped)"
            raise InputError(f"{self.path}: unknown kind of score file; known endings: {known}")
        described = self._connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()
        present = {row[0] for row in described}
        wanted = (self._columns.query_id, self._columns.doc_id, self._columns.score)
        self._check_columns(present)
        keys = ", ".join(
            f"CAST({quoted(column)} AS VARCHAR) AS {name}" for column, name in zip(wanted, ("query_id", "doc_id"))
        )
        raw = f"CAST({quoted(wanted[2])} AS VARCHAR)"
        if separator == ";":  # spreadsheets write it where the comma is the decimal point
            raw = f"replace({raw}, ',', '.')"
        return f"SELECT {keys}, {raw} AS raw FROM {source}"

    def _json_lines(self, source: str) -> str:
        """JSON objects as SQL, as _given: DuckDB's own reader makes times, UUIDs and JSON of texts that look so."""
        keys = "SELECT DISTINCT unnest(json_keys(json)) FROM " + source
        present = {row[0] for row in self._connection.execute(keys).fetchall()}
        self._check_columns(present)
        wanted = (self._columns.query_id, self._columns.doc_id, self._columns.score)
        values = (
            f"json_extract_string(json, {literal('/' + column.replace('~', '~0').replace('/', '~1'))}) AS {name}"
            for column, name in zip(wanted, ("query_id", "doc_id", "raw"))
        )
        return f"SELECT {', '.join(values)} FROM {source}"

    def _check_columns(self, present: set[str]) -> None:
        wanted = (self._columns.query_id, self._columns.doc_id, self._columns.score)
        if missing := [column for column in wanted if column not in present]:
            raise InputError(f"{self.path}: no column {', '.join(missing)}; it has {', '.join(sorted(present))}")


def _separator(path: Path, possible: str) -> str:
    """What the header has most of outside quotes, as of a table of judgments. DataError: unreadable."""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            header = re.sub('"[^"]*"', "", stream.readline(LONGEST_HEADER).decode("utf-8", "replace"))
    except (OSError, EOFError, zlib.error) as problem:
        raise DataError(path, f"cannot be read: {problem}") from problem
    return max(possible, key=header.count)


def quoted(column: str) -> str:
    """A column's name as an SQL identifier."""
    return '"' + column.replace('"', '""') + '"'
