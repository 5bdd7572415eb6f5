"""The tables of a dataset folder made from judged pairs: rows in an order that says nothing, negatives, click pairs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ranking.text import normalise
from training.sources.bm25 import Bm25
from training.sources.judged_collections import JudgedSource
from training.sources.query_splits import shuffled


def pair_table(source: JudgedSource, grades: dict[tuple[str, str], int], seed: int, graded: bool) -> pa.Table:
    """Rows by query; within a query the documents stand in a drawn order, since ties break by it and judgment files
    often list the relevant documents first."""
    of_query: dict[str, list[str]] = {}
    for query_id, doc_id in grades:
        of_query.setdefault(query_id, []).append(doc_id)
    pairs = [(q, d) for q, documents in of_query.items() for d in shuffled(documents, seed)]
    query_ids, doc_ids = [q for q, _ in pairs], [d for _, d in pairs]
    columns = {
        "query_id": pa.array(query_ids, pa.string()),
        "doc_id": pa.array(doc_ids, pa.string()),
        "query": pa.array([source.queries[q] for q in query_ids], pa.string()),
        "title": pa.array([source.documents[d][0] for d in doc_ids], pa.string()),
        "summary": pa.array([source.documents[d][1] for d in doc_ids], pa.string()),
    }
    if graded:
        columns["grade"] = pa.array([grades[pair] for pair in pairs], pa.int8())
    return pa.table(columns)


def clicks_from_judgments(judgments: pa.Table) -> pa.Table:
    """The relevant pairs as a clicks table, weight = grade; one row per normalised query and document, the best grade's."""
    relevant = judgments.filter(pc.greater(judgments.column("grade"), 0))
    best: dict[tuple[str, str], dict] = {}
    for row in relevant.to_pylist():
        key = (normalise(row["query"]).lower(), row["doc_id"])
        if key not in best or best[key]["weight"] < row["grade"]:
            best[key] = {"query": key[0], "weight": float(row["grade"])} | {
                name: row[name] for name in ("doc_id", "title", "summary")
            }
    names = ("query", "doc_id", "title", "summary", "weight")
    return pa.table({name: [row[name] for row in best.values()] for name in names})


def add_negatives(source: JudgedSource, grades: dict[tuple[str, str], int], count: int) -> None:
    """Add BM25's best unjudged documents of each query as grade 0."""
    doc_ids = list(source.documents)
    index = Bm25(list(source.documents.values()))
    judged: dict[str, int] = Counter(query_id for query_id, _ in grades)
    for query_id, scores in zip(judged, index.scores([source.queries[q] for q in judged])):
        best = np.argsort(-scores, kind="stable")[: count + judged[query_id]]
        new = [pair for i in best if scores[i] > 0 and (pair := (query_id, doc_ids[i])) not in grades]
        grades.update(dict.fromkeys(new[:count], 0))
