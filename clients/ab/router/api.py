"""The bodies that the A/B router takes and gives: their fields, limits and meaning. No HTTP here: see http_app.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, StringConstraints, field_validator
from pydantic_core import PydanticCustomError

from clients.ab.router.http_limits import MAX_EVENTS
from ranking.limits import MAX_FIELD_BYTES, MAX_ID_CHARACTERS, field_bytes
from ranking.request_tensors import MAX_PRIOR
from ranking.visible import is_visible


def short_enough(text: str) -> str:
    """The text, as a pydantic check: an error if it has more bytes than a field may have."""
    if len(text) > MAX_FIELD_BYTES // 4 and field_bytes(text) > MAX_FIELD_BYTES:  # a character has at most four bytes
        raise PydanticCustomError("too_long", "longer than {limit} bytes", {"limit": MAX_FIELD_BYTES})
    return text


def _not_blank(text: str) -> str:
    if not is_visible(text):
        raise PydanticCustomError("blank", "blank: no visible character")
    return text


# Pages become rows of the exposures and events tables and requests to Triton: what those refuse must not get in.
Text = Annotated[str, AfterValidator(short_enough)]
Query = Annotated[Text, AfterValidator(_not_blank)]
Label = Annotated[str, StringConstraints(max_length=MAX_ID_CHARACTERS)]
Name = Annotated[Label, AfterValidator(_not_blank)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Document(_Strict):
    """One candidate. Title and summary may be empty."""

    doc_id: Name
    title: Text = ""
    summary: Text = ""
    prior: float | None = Field(
        None, ge=-MAX_PRIOR, le=MAX_PRIOR, allow_inf_nan=False, description="the first stage's score, if there is one"
    )


class RankRequest(_Strict):
    """One search page to rank. Documents come in the order of the caller's own ranking."""

    user_id: Name = Field(description="decides the arm; the same user always gets the same one")
    query: Query
    documents: Annotated[list[Document], FailFast()] = Field(min_length=1)
    request_id: Name | None = Field(None, description="names the page; made if absent. A retry keeps its id")
    platform: Annotated[str, StringConstraints(max_length=64)] = Field("", description="segment of the report")
    segments: dict[Name, Label] = Field(default_factory=dict, max_length=16, description="further segments")
    min_probability: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="leave out documents that are less probably relevant"
    )
    max_chunks: int | None = Field(
        None, ge=1, lt=1 << 31,
        description="chunks of a long document that are read at most, where the model reads several",
    )  # fmt: skip
    arm: str | None = Field(None, description="force this arm, for testing; only with --allow-forced-arm")

    @field_validator("documents")
    @classmethod
    def _distinct(cls, documents: list[Document]) -> list[Document]:
        if len({d.doc_id for d in documents}) < len(documents):
            seen: set[str] = set()
            twice = next(d.doc_id for d in documents if d.doc_id in seen or seen.add(d.doc_id))  # type: ignore[func-returns-value]
            raise ValueError(f"doc_id {twice!r} is given twice")
        return documents


class RankAnswer(BaseModel):
    """The ranking. Send request_id back with every click."""

    request_id: str
    experiment: str = Field(description="empty for a user outside every experiment")
    arm: str
    ranking: list[str] = Field(description="document ids, best first")
    scores: list[float] | None = Field(description="raw scores in that order; null for the incoming order")
    probabilities: list[float] | None = Field(
        description="that each document is relevant, in that order; null where the model has no calibration"
    )
    left_out: int = Field(
        description="documents below min_probability, which are neither in the ranking nor in the log"
    )
    served_by: str = Field(description="model whose order this is, `interleaved`, or `incoming`")
    fallback: str = Field(description="why the arm's model did not rank it, empty if it did")
    model_version: str
    latency_ms: float
    logged: bool | Literal["pending"] = Field(
        description="whether the exposure is on disk; `pending`: it is queued, and the disk is slow"
    )


class Event(_Strict):
    """A click, or the seconds a user stayed after one. Sending it twice changes nothing."""

    request_id: Name
    doc_id: Name
    type: Literal["click", "dwell"]
    dwell_seconds: float | None = Field(None, ge=0, le=86400, allow_inf_nan=False, description="for type dwell")
    timestamp: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="seconds since 1970, the caller's clock"
    )

    def model_post_init(self, context: Any) -> None:
        """Refuse a dwell without its seconds, and seconds without a dwell."""
        if (self.type == "dwell") != (self.dwell_seconds is not None):
            raise ValueError("dwell_seconds belongs to type dwell, and only to it")


class EventsRequest(_Strict):
    """Clicks and dwell times, of one page or of many."""

    events: Annotated[list[Event], FailFast()] = Field(min_length=1, max_length=MAX_EVENTS)


class EventsAnswer(BaseModel):
    """How many events are on disk now."""

    accepted: int
