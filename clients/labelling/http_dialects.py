"""How the HTTP services that rerank are asked, and how their answers are read: one small entry per service.

A request is one query with several documents; an answer has a score for each document under its index. Scores are asked
for raw (unbounded) wherever a service can give them: a score squeezed into 0..1 has lost the order of the best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

JsonObject = dict[str, Any]
FLOAT32_MAX = 3.4028234663852886e38  # labels are stored as float32


class BadAnswer(Exception):
    """An answer that cannot be what was asked for; the text says why."""


@dataclass(frozen=True)
class RankingRequest:
    """One query with its documents: titles and summaries have one entry per document."""

    query: str
    titles: Sequence[str]
    summaries: Sequence[str]

    def documents(self) -> list[str]:
        """Title, one space, summary: for services that take a document as one text."""
        return [f"{title} {summary}".strip() for title, summary in zip(self.titles, self.summaries)]


@dataclass(frozen=True)
class Dialect:
    """One service's form.

    path: of the request; body: (model, request) -> JSON; results: JSON -> the list of entries;
    score_name: the entry's field that holds the score;
    key_variable: environment variable of the service's key, empty where none is needed; identity_path: where a server
    says what it serves, empty where only the model's name says it; identity: what of that answer tells two teachers
    apart.
    """

    path: str
    body: Callable[[str, RankingRequest], JsonObject]
    results: Callable[[Any], Any]
    score_name: str
    key_variable: str = ""
    identity_path: str = ""
    identity: Callable[[Any], Any] = lambda answer: answer

    def scores(self, answer: Any, documents: int) -> dict[int, float]:
        """{index of the document: score}, which may lack documents that the service left out.

        BadAnswer: no such form, an index twice or outside 0..documents - 1, a score that is no finite number.
        """
        try:
            pairs = [(entry["index"], entry[self.score_name]) for entry in self.results(answer)]
        except (KeyError, TypeError, IndexError) as problem:
            raise BadAnswer(f"not the expected form: {problem!r}") from problem
        found: dict[int, float] = {}
        for index, score in pairs:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < documents:
                raise BadAnswer(f"a score for document {index!r} of {documents}")
            if index in found:
                raise BadAnswer(f"two scores for document {index}")
            # a number as JSON has it may be a whole one of a thousand digits, of which isfinite() knows nothing
            if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= FLOAT32_MAX:
                raise BadAnswer(f"the score of document {index} is {score!r}")
            found[index] = float(score)
        return found


def _results(answer: Any) -> Any:
    return answer["results"]


DIALECTS: dict[str, Dialect] = {
    # vLLM's score API: /score with text_1, text_2; use_activation false gives the logit
    "vllm-score": Dialect(
        path="/score",
        body=lambda model, asked: {
            "model": model, "text_1": asked.query, "text_2": asked.documents(), "use_activation": False,
        },
        results=lambda answer: answer["data"],
        score_name="score",
        identity_path="/v1/models",
        identity=lambda answer: sorted((entry["id"], entry.get("root", "")) for entry in answer["data"]),
    ),
    # vLLM's rerank API, Jina's form with vLLM's use_activation
    "vllm-rerank": Dialect(
        path="/v1/rerank",
        body=lambda model, asked: {
            "model": model, "query": asked.query, "documents": asked.documents(), "use_activation": False,
        },
        results=_results,
        score_name="relevance_score",
        identity_path="/v1/models",
        identity=lambda answer: sorted((entry["id"], entry.get("root", "")) for entry in answer["data"]),
    ),
    # Hugging Face text-embeddings-inference: the answer is the list itself, sorted by score
    "tei": Dialect(
        path="/rerank",
        body=lambda model, asked: {"query": asked.query, "texts": asked.documents(), "raw_scores": True},
        results=lambda answer: answer,
        score_name="score",
        identity_path="/info",
        identity=lambda answer: [answer["model_id"], answer.get("model_sha"), answer.get("model_dtype")],
    ),
    # Cohere's v2 rerank API; relevance_score lies in 0..1
    "cohere": Dialect(
        path="/v2/rerank",
        body=lambda model, asked: {
            "model": model, "query": asked.query, "documents": asked.documents(), "top_n": len(asked.titles),
        },
        results=_results,
        score_name="relevance_score",
        key_variable="CO_API_KEY",
    ),
    # Jina's rerank API; the range of relevance_score depends on the model
    "jina": Dialect(
        path="/v1/rerank",
        body=lambda model, asked: {
            "model": model, "query": asked.query, "documents": asked.documents(), "top_n": len(asked.titles),
            "return_documents": False,
        },
        results=_results,
        score_name="relevance_score",
        key_variable="JINA_API_KEY",
    ),
}  # fmt: skip
