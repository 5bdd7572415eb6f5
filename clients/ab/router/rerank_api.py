"""The bodies of other services' rerank calls, as the router takes and gives them: Cohere's, Jina's and TEI's forms.

One request class reads all three, since they differ in names only: `documents` (Cohere, Jina) or `texts` (Hugging
Face's text-embeddings-inference). Fields that it does not know are passed over, as those services do, so that a client
that was written for them needs no change. No HTTP here: see rerank_routes.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from clients.ab.router.api import Document, Label, Name, Query, RankRequest, Text, short_enough
from clients.ab.router.page_ranking import INTERLEAVED, PageRefused
from ranking.calibration import probability
from ranking.chunks import MAX_CHUNKS
from ranking.limits import MAX_FIELD_BYTES, MAX_ID_CHARACTERS, field_bytes
from ranking.request_tensors import MAX_PRIOR
from ranking.visible import is_visible

TEXT_FIELDS = ("title", "text", "summary")  # of a document object, in this order, unless rank_fields names others
MAX_RANK_FIELDS = 100  # every document is searched for every name
UNKNOWN_LOGIT = 0.0  # of every document where no model ranked the page and the incoming order is the answer
RELEVANCE_SCORE = (
    "the model's calibrated probability where it gives one, else the logistic function of its raw score, which is not "
    "calibrated; both lie in 0..1 and have the order of the raw scores. `meta.relevance_score` of an answer says which"
)


@dataclass(kw_only=True)
class RerankSettings:
    """How callers of the rerank paths are told apart, and what they are told.

    Args:
        user_header: header that names the user whose arm ranks; without it the body's field `user` does
        rerank_model_name: what `/v1/models` and `/info` call the model; requests may name any
    """

    user_header: str = "x-user-id"
    rerank_model_name: str = "disranker"

    def __post_init__(self) -> None:
        for name in ("user_header", "rerank_model_name"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} is blank: a name is needed")


def _text_or_object(value: Any) -> str | dict[str, Any]:
    if isinstance(value, str):
        return short_enough(value)
    if not isinstance(value, dict):
        raise PydanticCustomError("document", "a text or an object with the text in its fields is needed")
    return value


# one check for both kinds: a union would name the place of a mistake by its own parts
TextOrObject = Annotated[
    Any, AfterValidator(_text_or_object), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})
]


def _text_of_object(value: Any) -> Any:
    return value["text"] if isinstance(value, dict) and "text" in value else value


class RerankRequest(BaseModel):
    """One query with the documents to rank, in the form of Cohere (v1, v2), Jina or text-embeddings-inference."""

    model_config = ConfigDict(strict=True)

    query: Annotated[Query, BeforeValidator(_text_of_object, json_schema_input_type=Query)]
    documents: Annotated[list[TextOrObject], FailFast()] = Field(
        default_factory=list, min_length=1,
        description="texts, or objects with `title`, `text` or `summary`, or what rank_fields names",
    )  # fmt: skip
    texts: Annotated[list[Text], FailFast()] = Field(
        default_factory=list, min_length=1, description="TEI's name of documents"
    )
    model: Label | None = Field(None, description="any name: the experiment decides which model ranks")
    top_n: int | None = Field(None, ge=1, description="so many of the best are given back; all if absent")
    return_documents: bool | None = Field(None, description="give the documents back with their scores")
    return_text: bool | None = Field(None, description="TEI's name of return_documents")
    rank_fields: list[Label] | None = Field(
        None, min_length=1, max_length=MAX_RANK_FIELDS,
        description="fields of document objects that are read; a repeated name counts once",
    )  # fmt: skip
    max_chunks_per_doc: int | None = Field(
        None, ge=1, description="chunks of a long document that are read at most, where the model reads several"
    )
    raw_scores: bool | None = Field(None, description="give raw logits instead of numbers in 0..1")
    truncation_direction: Literal["Right", "right"] | None = Field(None, description="a long text loses its end")
    user: Label | None = Field(None, description="decides the arm; a header may name the user instead")
    request_id: Name | None = Field(None, description="names the page; made if absent. A retry keeps its id")

    @model_validator(mode="after")
    def _one_list(self) -> RerankRequest:
        if bool(self.documents) == bool(self.texts):
            raise ValueError("documents: one list of documents is needed (TEI calls it texts)")
        return self

    @property
    def given(self) -> list[str] | list[str | dict[str, Any]]:
        """The documents as they came, whatever the list is called."""
        return self.texts or self.documents

    def page(self, user_id: str, request_id: str) -> RankRequest:
        """The page that is ranked. PageRefused if a document object lacks the text to read, or holds something else."""
        names = tuple(dict.fromkeys(self.rank_fields or TEXT_FIELDS))  # no text is read twice
        ids = _DistinctIds()
        documents = [self._document(number, given, names, ids) for number, given in enumerate(self.given)]
        # every field was checked above: a second check of 48 documents would take as long as the first
        return RankRequest.model_construct(
            user_id=user_id, query=self.query, documents=documents, request_id=request_id, platform="", segments={},
            arm=None, max_chunks=self.max_chunks_per_doc and min(self.max_chunks_per_doc, MAX_CHUNKS),
        )  # fmt: skip

    def _document(
        self, number: int, given: str | dict[str, Any], names: tuple[str, ...], ids: _DistinctIds
    ) -> Document:
        if isinstance(given, str):
            title, summary, known, prior = "", given, None, None
        else:
            if self.return_documents or self.return_text:
                _check_answerable(number, given)
            title, summary = _fields(number, given, names)
            known, prior = _given_id(number, given), _given_prior(number, given)
        doc_id = ids.take(known or document_id(title, summary))
        return Document.model_construct(doc_id=doc_id, title=title, summary=summary, prior=prior)


class _DistinctIds:
    """The ids of one page: the second document with an id gets `#2` behind it, the third `#3`."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._copies: dict[str, int] = {}  # counted on from here: from 1 each time, 1000 equal documents take 0.5 s

    def take(self, first: str) -> str:
        """The id itself, or the next of its copies that is not taken."""
        doc_id, copies = first, self._copies.get(first, 1)
        while doc_id in self._taken:
            copies += 1
            doc_id = f"{first}#{copies}"
        self._copies[first] = copies
        self._taken.add(doc_id)
        return doc_id


def document_id(title: str, summary: str) -> str:
    """The id of a document that came without one: the same text has the same id on every page of the log."""
    return hashlib.blake2b(f"{title}\0{summary}".encode(), digest_size=12).hexdigest()


def _fields(number: int, given: Mapping[str, Any], wanted: tuple[str, ...]) -> tuple[str, str]:
    """(title, summary) of a document object: `title` is the title, the other fields that are read are the summary.

    wanted: names of the fields that are read if they are there, each once.
    """
    names = [name for name in wanted if given.get(name) is not None]
    if not names:
        listed = ", ".join(wanted)
        raise PageRefused(f"documents[{number}]: has none of {listed}; name the fields to read in rank_fields")
    for name in names:
        if not isinstance(given[name], str):
            raise PageRefused(f"documents[{number}].{name}: text is needed, not {type(given[name]).__name__}")
    title = given["title"] if "title" in names else ""
    summary = "\n".join(given[name] for name in names if name != "title")
    for name, text in (("title", title), ("text", summary)):
        if field_bytes(text) > MAX_FIELD_BYTES:
            raise PageRefused(f"documents[{number}].{name}: longer than {MAX_FIELD_BYTES} bytes")
    return title, summary


def _check_answerable(number: int, given: Mapping[str, Any]) -> None:
    """NaN and Infinity are read, as Python's clients write them, but are no JSON to answer with."""
    try:
        json.dumps(given, allow_nan=False)
    except ValueError as problem:
        reason = "holds NaN or Infinity, which JSON cannot give back; send null, or no return_documents"
        raise PageRefused(f"documents[{number}]: {reason}") from problem


def _given_id(number: int, given: Mapping[str, Any]) -> str | None:
    for name in ("doc_id", "id"):
        value = given.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
            value = str(value)
        if isinstance(value, str):
            if len(value) > MAX_ID_CHARACTERS - 8 or not is_visible(value):
                raise PageRefused(f"documents[{number}].{name}: blank, or longer than {MAX_ID_CHARACTERS - 8}")
            return value
        if value is not None:
            raise PageRefused(f"documents[{number}].{name}: text or a whole number of 64 bits is needed")
    return None


def _given_prior(number: int, given: Mapping[str, Any]) -> float | None:
    value = given.get("prior")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_PRIOR:
        raise PageRefused(f"documents[{number}].prior: a finite number of at most {MAX_PRIOR:g} is needed")
    return float(value)


@dataclass(frozen=True)
class Reranked:
    """One document of an answer. index: its place in the request; score: as the caller asked for it."""

    index: int
    doc_id: str
    score: float


def reranked(request: RerankRequest, page: RankRequest, answer: Mapping[str, Any]) -> list[Reranked]:
    """The documents best first, top_n of them. answer: what PageService.rank gave for the page."""
    places = {document.doc_id: place for place, document in enumerate(page.documents)}
    scores = answer["scores"] or [UNKNOWN_LOGIT] * len(places)
    if not request.raw_scores:
        scores = answer["probabilities"] or probability(scores, None).tolist()
    if answer["served_by"] == INTERLEAVED:
        # each is by the model that placed its document: clients that sort by them would show a page that is not logged
        scores = sorted(scores, reverse=True)
    ranked = [Reranked(places[doc_id], doc_id, score) for doc_id, score in zip(answer["ranking"], scores)]
    return ranked[: request.top_n]


def cohere_answer(
    request: RerankRequest, ranked: list[Reranked], answer: Mapping[str, Any], version: str, name: str
) -> dict[str, Any]:
    """The answer of `/v1/rerank` and `/v2/rerank`: Cohere's, with the fields that Jina's has beside them.

    version: of Cohere's API; name: what the model is called.
    """
    results: list[dict[str, Any]] = []
    for entry in ranked:
        result: dict[str, Any] = {"index": entry.index, "relevance_score": entry.score, "doc_id": entry.doc_id}
        if request.return_documents or request.return_text:
            given = request.given[entry.index]
            result["document"] = {"text": given} if isinstance(given, str) else given
        results.append(result)
    meta: dict[str, Any] = {"api_version": {"version": version}}
    meta |= {key: answer[key] for key in ("experiment", "arm", "served_by", "fallback", "model_version", "logged")}
    calibrated = "calibrated" if answer["probabilities"] else "logistic"
    meta["relevance_score"] = "raw" if request.raw_scores else calibrated
    if answer["scores"] is None:
        meta["warnings"] = ["no model ranked the documents in time: they stand in the order of the request"]
    # Jina's clients look for `usage`; the router reads no tokens, so there is nothing to count in it
    shared = {"id": answer["request_id"], "object": "list", "model": name, "usage": {}}
    return {**shared, "results": results, "meta": meta}


def tei_answer(request: RerankRequest, ranked: list[Reranked]) -> list[dict[str, Any]]:
    """The answer of `/rerank` to a request with `texts`."""
    entries: list[dict[str, Any]] = []
    for entry in ranked:
        result: dict[str, Any] = {"index": entry.index, "score": entry.score}
        if request.return_text:
            result["text"] = request.given[entry.index]
        entries.append(result)
    return entries


# what text-embeddings-inference calls the reason of a refusal
_TEI_TYPES = {429: "Overloaded", 503: "Overloaded", 401: "Unauthorized"}


def error_content(path: str, status: int, reason: str) -> dict[str, str]:
    """The body of a refusal in the form that clients of this path read. Cohere's and Jina's share one path."""
    if path == "/v1/rerank":
        return {"message": reason, "detail": reason}
    if path == "/v2/rerank":
        return {"message": reason}
    if path == "/rerank":
        return {"error": reason, "error_type": _TEI_TYPES.get(status, "Validation")}
    return {"detail": reason}
