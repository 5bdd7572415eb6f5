"""BM25 over (title, summary): the row that every ranker must beat, and the finder of negatives."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence

import bm25s
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ranking.spelling import fold_spelling
from ranking.telemetry import bars_are_read

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG at import
K1, B = 0.9, 0.4  # Anserini's values for short texts; better than 1.2 and 0.75 on MSRD's dev split (docs/decisions.md)

# Chinese, Japanese, Korean, Thai, Lao, Burmese and Khmer are written without spaces between words, or with few: their
# letters are indexed in overlapping pairs
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
# vowel signs and the like, which Python's \w leaves out: without them a word of Hindi or Tamil falls apart
_SIGNS = "".join(chr(code) for code in range(0x0300, 0xABFF) if unicodedata.category(chr(code))[0] == "M")
_WORDS = re.compile(rf"[{_UNSPACED}]+|(?:[^\W{_UNSPACED}][{_SIGNS}]*)+")
_ASCII_WORDS = re.compile(r"\w+")  # the same of plain text, several times faster


def words(text: str) -> list[str]:
    """Index terms of a text: words in one spelling, plural s cut, letter pairs for scripts without spaces."""
    terms: list[str] = []
    text = fold_spelling(text)
    found = _ASCII_WORDS.findall(text) if text.isascii() else _WORDS.findall(text)
    for word in found:
        if re.match(f"[{_UNSPACED}]", word):
            terms += [word[i : i + 2] for i in range(len(word) - 1)] or [word]
        else:
            terms.append(word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word)
    return terms


class Bm25:
    """An index of documents given as (title, summary)."""

    def __init__(self, documents: Sequence[tuple[str, str]]):
        self.index = bm25s.BM25(k1=K1, b=B, method="lucene")
        self.documents = len(documents)
        self.vocabulary: dict[str, int] = {}
        if any(terms := [words(f"{title} {summary}") for title, summary in documents]):
            self.index.index(terms, show_progress=False)
            self.vocabulary = self.index.vocab_dict

    def scores(self, queries: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        """Per query, the score of every document, float32 [documents]; 0 where no word is shared."""
        for query in queries:
            known = [term for term in words(query) if term in self.vocabulary]
            yield self.index.get_scores(known) if known else np.zeros(self.documents, np.float32)


def bm25_scores(
    queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str], corpus: Sequence[tuple[str, str]] = ()
) -> NDArray[np.float32]:
    """BM25 of n (query, document) rows, float32 [n].

    Word statistics come from the distinct documents of the rows and of corpus: (title, summary) each.
    """
    documents = {document: number for number, document in enumerate(dict.fromkeys([*zip(titles, summaries), *corpus]))}
    index = Bm25(list(documents))
    rows_of: dict[str, list[int]] = {}
    for row, query in enumerate(queries):
        rows_of.setdefault(query, []).append(row)
    scores = np.zeros(len(queries), np.float32)
    found = zip(rows_of.values(), index.scores(list(rows_of)))
    for rows, of_documents in tqdm(
        found, total=len(rows_of), desc="bm25", unit="query", disable=not bars_are_read(), leave=False
    ):
        scores[rows] = of_documents[[documents[titles[row], summaries[row]] for row in rows]]
    return scores
