"""The documents that a request asks to be ranked, as text or as token ids: read, checked, and made into encoded pairs.

    query BYTES [1], title BYTES [n], summary BYTES [n]
    or  token_ids INT32 [tokens], token_counts INT32 [1 + 2n], vocabulary BYTES [1]
    and for an arm that reads long documents in chunks optional max_chunks INT32 [1]

token_ids holds the tokens of the query, then those of the first document's title, of its summary, of the second
document's title, and so on; token_counts says how many each of these fields has. They are what StudentFormat.tokenise
gives: no marks, cut to what the score card says is read. vocabulary is the fingerprint of the tokenizer.json that made
them (ranking/card.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray
from request_fields import BadRequest, check_documents, decode, read_fields
from score_cache import content_keys

from ranking.text import EncodedDocuments, StudentFormat

TEXT_INPUTS = ("query", "title", "summary")
TOKEN_INPUTS = ("token_ids", "token_counts", "vocabulary")


Field = TypeVar("Field", str, NDArray[np.int32])


@dataclass(frozen=True)
class Page(ABC, Generic[Field]):
    """A query and n documents, each field a str or int32 ids; most_chunks: of a document, so many are read at most."""

    query: Field
    titles: Sequence[Field]
    summaries: Sequence[Field]
    most_chunks: int

    def __len__(self) -> int:
        return len(self.titles)

    def take(self, rows: NDArray[np.intp]) -> Page[Field]:
        """The page with these documents alone."""
        return replace(self, titles=[self.titles[row] for row in rows], summaries=[self.summaries[row] for row in rows])

    @abstractmethod
    def keys(self) -> list[bytes]:
        """What the score cache knows each document by."""

    @abstractmethod
    def encode(self, text: StudentFormat) -> EncodedDocuments:
        """The documents as an encoder of this format reads them."""


class TextPage(Page[str]):
    """A page whose fields are text."""

    def keys(self) -> list[bytes]:
        """Each document's key from its own text and the query's."""
        documents = [(title.encode(), summary.encode()) for title, summary in zip(self.titles, self.summaries)]
        return content_keys(self.query.encode(), documents, f"text {self.most_chunks}".encode())

    def encode(self, text: StudentFormat) -> EncodedDocuments:
        """The documents as an encoder of this format reads them, tokenised here."""
        return text.encode_documents([self.query] * len(self), self.titles, self.summaries, self.most_chunks)


class TokenPage(Page[NDArray[np.int32]]):
    """A page whose fields are token ids, int32 each, without marks."""

    def keys(self) -> list[bytes]:
        """Each document's key from its own ids and the query's."""
        documents = [(title.tobytes(), summary.tobytes()) for title, summary in zip(self.titles, self.summaries)]
        return content_keys(self.query.tobytes(), documents, f"tokens {self.most_chunks}".encode())

    def encode(self, text: StudentFormat) -> EncodedDocuments:
        """The documents as an encoder of this format reads them: the ids with the format's marks between them."""
        limits = text.limits  # a cascade's small model may read less of a field than the large one
        return text.join(
            [self.query[: limits.max_query_tokens]] * len(self),
            [ids[: limits.max_title_tokens] for ids in self.titles],
            self.summaries,
            self.most_chunks,
        )


def read_page(request, max_documents: int, text: StudentFormat, vocabulary: str) -> TextPage | TokenPage:
    """What the request asks to be ranked. BadRequest says what is wrong with it, with the tensor and the place.

    text, vocabulary: format and fingerprint of the tokenizer that token ids must be of.
    """
    given = {name: pb_utils.get_input_tensor_by_name(request, name) for name in (*TEXT_INPUTS, *TOKEN_INPUTS)}
    sent = [name for name, tensor in given.items() if tensor is not None]
    wanted = TOKEN_INPUTS if any(name in TOKEN_INPUTS for name in sent) else TEXT_INPUTS
    if set(sent) != set(wanted):
        raise BadRequest(
            f"the request has {', '.join(sent) or 'no tensor'}: send query, title and summary, or token_ids, "
            "token_counts and vocabulary"
        )
    most_chunks = read_most_chunks(request, text)
    if wanted is TEXT_INPUTS:
        queries, titles, summaries = read_fields(request, max_documents)
        return TextPage(queries[0], titles, summaries, most_chunks)
    ids, counts, named = (given[name].as_numpy() for name in TOKEN_INPUTS)
    (made_by,) = decode("vocabulary", named)
    if made_by != vocabulary:
        raise BadRequest(
            f"vocabulary is {made_by!r}, this version reads {vocabulary!r}: its tokenizer would have given other ids"
        )
    return token_page(ids, counts, max_documents, text, most_chunks)


def read_most_chunks(request, text: StudentFormat) -> int:
    """How many chunks of a document are read at most: as many as the caller wants, if the format reads so many."""
    tensor = pb_utils.get_input_tensor_by_name(request, "max_chunks")
    if tensor is None:
        return text.chunking.most
    wanted = int(tensor.as_numpy()[0])
    if wanted < 1:
        raise BadRequest(f"max_chunks is {wanted}: at least 1 chunk of a document is read")
    return min(wanted, text.chunking.most)


def token_page(
    ids: NDArray[np.int32], counts: NDArray[np.int32], max_documents: int, text: StudentFormat, most_chunks: int
) -> TokenPage:
    """The page of these tensors. BadRequest unless a tokenizer could have given these ids, within all limits."""
    documents, odd = divmod(len(counts) - 1, 2)
    if odd or not len(counts):
        raise BadRequest(f"token_counts has {len(counts)} values: one of the query and two of each document are needed")
    check_documents(documents, max_documents)
    limits = text.limits
    most = np.array([limits.max_query_tokens, *[limits.max_title_tokens, text.summary_tokens] * documents])
    wrong = np.flatnonzero((counts < 0) | (counts > most))
    if len(wrong):
        place = int(wrong[0])
        raise BadRequest(
            f"token_counts[{place}] is {counts[place]}: {_field_name(place)} has 0 to {most[place]} tokens here"
        )
    if counts[0] == 0:
        raise BadRequest("query is blank: token_counts[0] is 0")
    if counts.sum(dtype=np.int64) != len(ids):
        raise BadRequest(f"token_counts add up to {counts.sum(dtype=np.int64)}, token_ids has {len(ids)} values")
    size = text.tokenizer.get_vocab_size()
    marks = [*text.marks.first, *text.marks.between, *text.marks.last, text.pad_id]
    for bad, reason in (
        ((ids < 0) | (ids >= size), f"the vocabulary has ids 0 to {size - 1}"),
        (np.isin(ids, marks), "that is a mark or padding, which no text is made into; marks are added here"),
    ):
        if bad.any():
            place = int(bad.argmax())
            field = int(np.searchsorted(np.cumsum(counts), place, side="right"))
            raise BadRequest(f"token_ids[{place}] of {_field_name(field)} is {ids[place]}: {reason}")
    query, *fields = np.split(ids, np.cumsum(counts)[:-1])
    return TokenPage(query, fields[0::2], fields[1::2], most_chunks)


def _field_name(place: int) -> str:
    return "query" if not place else f"{('summary', 'title')[place % 2]}[{(place - 1) // 2}]"
