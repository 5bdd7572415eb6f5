"""What prepare_data reads: BEIR folders, MSRD in its upstream format, ir_datasets, and prepared datasets.

Every reader returns a JudgedSource: documents, queries, and judged pairs by split, each row checked on the way in. Of a
corpus the judged documents are kept, and as many others as the caller has room for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ranking.errors import DataError, InputError
from ranking.schema import iter_table
from ranking.spelling import fold_spelling
from training.sources.query_splits import SPLITS, split_name
from training.sources.row_readers import (
    BadRows,
    Row,
    column,
    grade_field,
    json_field,
    json_rows,
    on_scale,
    text_field,
    text_lines,
)
from training.sources.separated_rows import separated_rows

TREC_QRELS = ".qrels"
UNSPLIT = ""  # the split of judgments whose source names none
Pair = tuple[str, str]  # (query id, doc id)
Text = tuple[str, str]  # (title, summary)


@dataclass
class JudgedSource:
    """Documents and queries by id, and who judged what.

    documents: id -> text, that of the first row with this id; texts: pair -> text, where a query shows the document
    with another one (a summary around the query's words, another spelling of the title); queries: id -> text; judged:
    split -> {pair: grade}, the split being train, dev, test or UNSPLIT, grades as the source has them until
    training/sources/grade_scales.py maps them; unlabelled: pairs without a grade; licence: as dataset.json shall
    state it; corpus_size: documents in the source, kept or not; rows: (split, pair) -> file and row of every grade that
    is no whole number from 0 to 4.
    """

    licence: str
    documents: dict[str, Text] = field(default_factory=dict)
    texts: dict[Pair, Text] = field(default_factory=dict)
    queries: dict[str, str] = field(default_factory=dict)
    judged: dict[str, dict[Pair, float]] = field(default_factory=dict)
    unlabelled: set[Pair] = field(default_factory=set)
    corpus_size: int = 0
    rows: dict[tuple[str, Pair], tuple[str | Path, int]] = field(default_factory=dict)

    def text(self, pair: Pair) -> Text:
        """Title and summary of a pair's document, as its query shows them."""
        return self.texts.get(pair) or self.documents[pair[1]]

    def add_text(self, pair: Pair, text: Text) -> None:
        """Note a pair's text; the first one of a document is also the text that BM25 finds it by."""
        if self.documents.setdefault(pair[1], text) != text:
            self.texts[pair] = text

    def judge(self, split: str, pair: Pair, grade: float, path: str | Path, row: int) -> None:
        """Note a judgment. ValueError if the pair has one already in this split."""
        grades = self.judged.setdefault(split, {})
        if pair in grades:
            raise ValueError(f"duplicate key (query {pair[0]!r}, document {pair[1]!r})")
        grades[pair] = grade
        if not on_scale(grade):
            self.rows[split, pair] = (path, row)

    def judged_queries(self) -> set[str]:
        """Ids of the queries with at least one grade."""
        return {query_id for grades in self.judged.values() for query_id, _ in grades}


@dataclass
class _Qrel:
    """A judgment with where it stood, so that one naming an unknown document can be pointed at."""

    path: Path
    row: int
    split: str
    query_id: str
    doc_id: str
    grade: float


def read_beir(folder: Path, bad: BadRows, spare: int | None = 0) -> JudgedSource:
    """A BEIR folder: corpus.jsonl (_id, title, text), queries.jsonl (_id, text), qrels/{train,dev,test}.tsv.

    The columns of the qrels are query-id, corpus-id and score; files named .qrels have trec_eval's form instead. The
    two .jsonl files may be gzipped.
    spare: how many unjudged documents are kept, the first of the file; None keeps all. Errors: see module row_readers.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; beir:PATH needs corpus.jsonl, queries.jsonl and qrels/*.tsv in it")
    patterns = ("*.tsv", "*.tsv.gz", f"*{TREC_QRELS}", f"*{TREC_QRELS}.gz")
    files = sorted(file for pattern in patterns for file in (folder / "qrels").glob(pattern))
    if not files:
        raise InputError(f"{folder / 'qrels'}: no .tsv or {TREC_QRELS} file; judgments are expected there")
    qrels: list[_Qrel] = []
    for file in files:
        split = split_name(file.name.split(".")[0])
        if split is None:
            raise InputError(f"{file}: name it for its split: {', '.join(SPLITS)}")
        trec = file.name.removesuffix(".gz").endswith(TREC_QRELS)
        for number, row in _trec_qrels(file, bad) if trec else separated_rows(file, bad):
            names = ("query-id", "corpus-id", "score")
            query_id, doc_id, grade = (column(row, name, file) for name in names)
            try:
                qrels.append(
                    _Qrel(file, number, split, text_field(query_id, "query-id"), text_field(doc_id, "corpus-id"),
                          grade_field(grade))
                )  # fmt: skip
            except ValueError as problem:
                bad.refuse(file, number, str(problem))
    source = JudgedSource(licence="as its publisher states")
    source.queries = dict(_read_queries(_one_of(folder, "queries"), bad))
    corpus = _one_of(folder, "corpus")
    wanted = {qrel.doc_id for qrel in qrels}
    source.corpus_size = _read_corpus(
        source, json_rows(corpus, bad), corpus, bad, wanted, spare, "_id", _title_and_text
    )
    _add_judgments(source, qrels, bad)
    return source


def _trec_qrels(path: Path, bad: BadRows) -> Iterator[Row]:
    """Rows of trec_eval's form, query_id 0 doc_id grade, under the names of BEIR's columns."""
    for number, line in text_lines(path, bad):
        fields = line.split()
        if len(fields) != 4:
            bad.refuse(path, number, f"{len(fields)} columns where TREC's qrels have 4: query_id, 0, doc_id, grade")
            continue
        yield number, {"query-id": fields[0], "corpus-id": fields[2], "score": fields[3]}


def _one_of(folder: Path, stem: str) -> Path:
    return next((path for end in (".jsonl", ".jsonl.gz") if (path := folder / (stem + end)).is_file()),
                folder / f"{stem}.jsonl")  # fmt: skip


def _read_queries(path: Path, bad: BadRows) -> Iterator[tuple[str, str]]:
    seen: dict[str, int] = {}
    for number, row in json_rows(path, bad):
        try:
            query_id = text_field(json_field(row, "_id"), "_id")
            if query_id in seen:
                raise ValueError(f"query {query_id!r} stands already in row {seen[query_id]}")
            text = text_field(json_field(row, "text"), "query")
        except ValueError as problem:
            bad.refuse(path, number, str(problem))
            continue
        seen[query_id] = number
        yield query_id, text


def _title_and_text(row: dict[str, Any]) -> tuple[str, str]:
    return (
        text_field(row.get("title"), "title", blank_ok=True),
        text_field(json_field(row, "text"), "text", blank_ok=True),
    )


def _read_corpus(
    source: JudgedSource,
    rows: Iterator[Row],
    path: Path,
    bad: BadRows,
    wanted: set[str],
    spare: int | None,
    key: str,
    text: Callable[[dict[str, Any]], Text],
) -> int:
    """Check every document; keep the wanted ones and the first `spare` others (None: all).

    Returns how many good ones there were.
    """
    seen: set[str] = set()
    others = 0
    for number, row in rows:
        try:
            doc_id = text_field(json_field(row, key), key)
            if doc_id in seen:
                raise ValueError(f"document {doc_id!r} stands already in an earlier row")
            document = text(row)
        except ValueError as problem:
            bad.refuse(path, number, str(problem))
            continue
        seen.add(doc_id)
        if doc_id not in wanted:
            if spare is not None and others >= spare:
                continue
            others += 1
        source.documents[doc_id] = document
    return len(seen)


def _add_judgments(source: JudgedSource, qrels: list[_Qrel], bad: BadRows) -> None:
    for qrel in qrels:
        try:
            if qrel.query_id not in source.queries:
                raise ValueError(f"query {qrel.query_id!r} is not among the queries")
            if qrel.doc_id not in source.documents:
                raise ValueError(f"document {qrel.doc_id!r} is not in the corpus")
            source.judge(qrel.split, (qrel.query_id, qrel.doc_id), qrel.grade, qrel.path, qrel.row)
        except ValueError as problem:
            bad.refuse(qrel.path, qrel.row, str(problem))


MSRD_LICENCE = "CC BY-SA 4.0, MSRD by Metarank Labs, as redistributed in elastic/elasticsearch-labs"
MSRD_FILES = ("movies-corpus.jsonl.gz", "movies-judgments.tsv.gz")


def read_msrd(folder: Path, bad: BadRows, spare: int | None = 0) -> JudgedSource:
    """movies-corpus.jsonl.gz and movies-judgments.tsv.gz (query_id, query, doc_id, grade), as published upstream."""
    corpus, judgments = (folder / name for name in MSRD_FILES)
    source = JudgedSource(licence=MSRD_LICENCE)
    qrels: list[_Qrel] = []
    for number, row in separated_rows(judgments, bad):
        try:
            query_id = text_field(column(row, "query_id", judgments), "query_id").removeprefix("qid:")
            query = text_field(column(row, "query", judgments), "query")
            doc_id = text_field(column(row, "doc_id", judgments), "doc_id")
            if source.queries.setdefault(query_id, query) != query:
                raise ValueError(f"query {query_id!r} reads {source.queries[query_id]!r} in an earlier row")
            grade = grade_field(column(row, "grade", judgments))
        except ValueError as problem:
            bad.refuse(judgments, number, str(problem))
            continue
        qrels.append(_Qrel(judgments, number, UNSPLIT, query_id, doc_id, grade))
    wanted = {qrel.doc_id for qrel in qrels}
    source.corpus_size = _read_corpus(source, json_rows(corpus, bad), corpus, bad, wanted, spare, "id", _movie)
    _add_judgments(source, qrels, bad)
    return source


def _movie(row: dict[str, Any]) -> tuple[str, str]:
    """A movie's title, and its overview, year and people as one text: searches name actors and characters."""
    parts = [text_field(json_field(row, "overview"), "overview", blank_ok=True)]
    named = (("Year", "year"), ("Genres", "genres"), ("Director", "director"), ("Cast", "actors"),
             ("Characters", "characters"), ("Tags", "tags"))  # fmt: skip
    for label, name in named:
        value = row.get(name)
        values = value if isinstance(value, list) else [value]
        text = ", ".join(text_field(v, name, blank_ok=True) for v in values if v)
        if text:
            parts.append(f"{label}: {text}.")
    return text_field(json_field(row, "title"), "title"), " ".join(part for part in parts if part)


def read_ir_dataset(name: str, bad: BadRows, spare: int | None = 0) -> JudgedSource:
    """A dataset of ir_datasets by its id; where it has no judgments itself, its train, dev and test parts are taken.

    InputError: ir_datasets is not installed, knows no such id, or has no queries, documents or judgments for it.
    """
    try:
        import ir_datasets
    except ImportError as problem:
        raise InputError("ir:DATASET_ID needs the package ir-datasets: pip install 'disranker[datasets]'") from problem

    def load(dataset_id: str):
        try:
            return ir_datasets.load(dataset_id)
        except KeyError as problem:
            raise InputError(f"ir_datasets knows no dataset {dataset_id!r}") from problem

    dataset = load(name)
    last = split_name(name.rpartition("/")[2])
    if dataset.has_qrels():
        parts = {last or UNSPLIT: dataset}
    else:
        ids = [i for i in ir_datasets.registry if i.startswith(f"{name}/") and split_name(i[len(name) + 1 :])]
        parts = {split_name(i[len(name) + 1 :]) or UNSPLIT: load(i) for i in ids}
    parts = {split: part for split, part in parts.items() if part.has_qrels()}
    if not parts or not dataset.has_docs():
        raise InputError(f"ir:{name} has no documents with judgments, nor parts /train, /dev, /test that do")
    source = JudgedSource(licence=f"see the documentation of ir_datasets for {name}")
    qrels: list[_Qrel] = []
    for split, part in parts.items():
        names: dict[str, str] = {}  # query ids of this part -> ours: each part may count its queries from 1
        for number, query in enumerate(part.queries_iter(), 1):
            try:
                text = text_field(query.default_text(), "query")
            except ValueError as problem:
                bad.refuse(f"ir:{name} queries", number, str(problem))
                continue
            same = source.queries.get(query.query_id, text) == text
            names[query.query_id] = query.query_id if same else f"{split}:{query.query_id}"
            source.queries[names[query.query_id]] = text
        for number, qrel in enumerate(part.qrels_iter(), 1):
            place = Path(f"ir:{name} qrels {split}")
            query_id = names.get(qrel.query_id, qrel.query_id)
            try:
                qrels.append(_Qrel(place, number, split, query_id, qrel.doc_id, grade_field(qrel.relevance)))
            except ValueError as problem:
                bad.refuse(place, number, str(problem))
    place = Path(f"ir:{name} docs")
    wanted = {qrel.doc_id for qrel in qrels}
    documents = ((n, {"doc_id": d.doc_id, "document": d}) for n, d in enumerate(dataset.docs_iter(), 1))
    source.corpus_size = _read_corpus(source, documents, place, bad, wanted, spare, "doc_id", _ir_document)
    _add_judgments(source, qrels, bad)
    return source


def _ir_document(row: dict[str, Any]) -> tuple[str, str]:
    document = row["document"]
    title = getattr(document, "title", "")
    text = next((v for name in ("text", "body", "abstract") if (v := getattr(document, name, None))), None)
    if text is None:
        text = document.default_text()
    return text_field(title, "title", blank_ok=True), text_field(text, "text", blank_ok=True)


def read_dataset(folder: Path, bad: BadRows) -> JudgedSource:
    """A prepared dataset folder, to draw a smaller one from: its splits, candidates and licence."""
    if not (folder / "dataset.json").is_file():
        raise InputError(f"{folder}: no dataset.json; dataset:PATH needs a folder that prepare_data wrote")
    try:
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        source = JudgedSource(licence=content["licence"], corpus_size=content["counts"]["documents"])
    except (ValueError, TypeError, LookupError) as problem:
        raise DataError(folder / "dataset.json", f"cannot be read: {problem!r}; prepare the dataset again") from problem
    files = {split: folder / f"judgments/{split}.parquet" for split in SPLITS}
    for split, path in {**files, "": folder / "candidates.parquet"}.items():
        table = "judgments" if split else "candidates"
        number = 0
        for piece in iter_table(path, table):
            for row in piece.to_pylist():
                number += 1
                try:
                    _add_row(source, row, split, path, number)
                except ValueError as problem:
                    bad.refuse(path, number, str(problem))
    return source


def _add_row(source: JudgedSource, row: dict[str, Any], split: str, path: Path, number: int) -> None:
    pair = (row["query_id"], row["doc_id"])
    known = source.queries.setdefault(row["query_id"], row["query"])
    # sample_candidates writes queries normalised and in lower case
    if known != row["query"] and fold_spelling(known) != fold_spelling(row["query"]):
        raise ValueError(f"query {row['query_id']!r} has another text in an earlier row")
    if split:
        source.judge(split, pair, row["grade"], path, number)
    else:
        source.unlabelled.add(pair)
    source.add_text(pair, (row["title"], row["summary"]))
