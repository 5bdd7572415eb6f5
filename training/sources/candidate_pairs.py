"""The pairs that the teacher shall label: of every query that is not held out, whether somebody judged it or not."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ranking.bm25 import Bm25
from ranking.telemetry import bars_are_read
from ranking.text import normalise
from ranking.visible import is_visible
from training.sources.judged_collections import JudgedSource, Pair
from training.sources.query_splits import NearQueries, shuffled

LOGGER = logging.getLogger(__name__)
TITLE_QUERIES = 1_000  # where a collection has no query but held-out ones
QUERY_WORDS = 12  # of a summary, where a document has no title


@dataclass(kw_only=True)
class CandidateSettings:
    """Which pairs stand in candidates.parquet for the teacher to label.

    Args:
        unlabelled_queries: at most this many queries without grades in candidates.parquet; 0 for all
        candidate_documents: each query there has at least so many documents: BM25's best of the corpus join those that
            the source has; 0 adds none
        title_queries: documents whose title becomes a query there; where a source has no query but dev and test ones,
            1,000 are taken
        corpus_limit: documents without a judgment that BM25 searches, the first of the corpus; 0 for all of them
    """

    unlabelled_queries: int = 0
    candidate_documents: int = 20
    title_queries: int = 0
    corpus_limit: int = 200_000

    def __post_init__(self):
        for name in ("unlabelled_queries", "candidate_documents", "title_queries", "corpus_limit"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: 0 or more is needed")


def candidate_pairs(
    source: JudgedSource,
    train: Mapping[Pair, int],
    withheld: Mapping[Pair, int],
    held_out: Iterable[str],
    settings: CandidateSettings,
    seed: int,
) -> tuple[list[Pair], dict[str, int]]:
    """The candidates and, for dataset.json, where they come from.

    train: judged pairs of the train split, which take part with their grades hidden; withheld: judged pairs whose
    grades nobody shall use; held_out: ids of the dev and test queries, of which no near-identical query takes part.
    Title queries are added to the source's queries. Says in the log what was found, and why where nothing was.
    """
    near = NearQueries(source.queries[query_id] for query_id in held_out)
    judged = source.judged_queries()
    free = [q for q, text in source.queries.items() if q not in judged and text not in near]
    # query id -> its documents in order, each once: a prepared dataset lists judged pairs among its candidates too
    documents: dict[str, dict[str, None]] = {query_id: {} for query_id in [*free, *(q for q, _ in withheld)]}
    ungraded = sorted(source.unlabelled)
    for query_id, doc_id in [*ungraded, *withheld]:
        if query_id in documents:
            documents[query_id][doc_id] = None
    if 0 < settings.unlabelled_queries < len(documents):
        documents = {q: documents[q] for q in shuffled(documents, seed + 2)[: settings.unlabelled_queries]}
    queries = {"without_grades": len(documents)}
    of_train = {query_id for query_id, _ in train}
    for query_id, doc_id in [*train, *(pair for pair in ungraded if pair[0] in of_train)]:
        documents.setdefault(query_id, {})[doc_id] = None
    queries["judged_train"] = len(documents) - queries["without_grades"]
    titles = _title_queries(source, near, settings.title_queries or (0 if documents else TITLE_QUERIES), seed)
    queries["titles"] = len(titles)
    source.queries.update({query_id: text for query_id, (text, _) in titles.items()})
    documents.update({query_id: {doc_id: None} for query_id, (_, doc_id) in titles.items()})
    given = sum(map(len, documents.values()))
    if settings.candidate_documents and documents:
        _add_best(source, documents, settings.candidate_documents)
    pairs = [(query_id, doc_id) for query_id, found in documents.items() for doc_id in found]
    found = {f"queries_{name}": count for name, count in queries.items()}
    found |= {"pairs_of_the_source": given, "pairs_found_by_bm25": len(pairs) - given}
    LOGGER.info(
        "candidates: %d pairs of %d queries without grades, %d judged train queries (grades hidden) and %d titles; "
        "%d of the pairs were found by BM25",
        len(pairs), *queries.values(), len(pairs) - given,
    )  # fmt: skip
    if not pairs:
        LOGGER.warning(
            "there are no candidates, so no label can be made: no query has a document to show for it; give queries "
            "without grades, or --candidate-documents 20"
        )
    return pairs, found


def _title_queries(source: JudgedSource, near: NearQueries, count: int, seed: int) -> dict[str, tuple[str, str]]:
    """Query id -> (text, doc id) of up to `count` documents, whose title or first words resemble no held-out query."""
    taken = {normalise(text).casefold() for text in source.queries.values()}
    found: dict[str, tuple[str, str]] = {}
    for doc_id in shuffled(source.documents, seed + 3) if count else []:
        title, summary = source.documents[doc_id]
        text = title if is_visible(title) else _first_words(summary)
        spelled = normalise(text).casefold()
        if not is_visible(text) or spelled in taken or text in near or f"title:{doc_id}" in source.queries:
            continue
        taken.add(spelled)
        found[f"title:{doc_id}"] = (text, doc_id)
        if len(found) == count:
            break
    return found


def _first_words(text: str) -> str:
    return " ".join(re.split(r"(?<=[.!?。])\s", normalise(text), maxsplit=1)[0].split()[:QUERY_WORDS])


def _add_best(source: JudgedSource, documents: dict[str, dict[str, None]], count: int) -> None:
    """Fill every query up to `count` documents with BM25's best; a document that shares no word is never added."""
    short = [query_id for query_id, found in documents.items() if len(found) < count]
    if not short or not source.documents:
        return
    doc_ids = list(source.documents)
    index = Bm25(list(source.documents.values()))
    every = index.scores([source.queries[query_id] for query_id in short])
    for query_id, scores in tqdm(
        zip(short, every), total=len(short), desc="candidates", unit="query", disable=not bars_are_read(), leave=False
    ):
        found = documents[query_id]
        best = np.argsort(-scores, kind="stable")[: count + len(found)]
        new = [doc_id for i in best if scores[i] > 0 and (doc_id := doc_ids[i]) not in found]
        found.update(dict.fromkeys(new[: count - len(found)]))
