"""Ask a served student to rank documents for a query, from the command line.

    python clients/rerank.py --query "night train" --documents documents.jsonl

Programs of your own use `Reranker` or `AsyncReranker` of clients/triton/reranker.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients.triton.connection import TritonAccess
from clients.triton.reranker import Reranker
from ranking.errors import DataError
from ranking.program import run


@dataclass
class Config(TritonAccess):
    """Rank documents for a query with a served student.

    Args:
        query: the query
        documents: JSON Lines file with title and summary per line, and doc_id if there is one; `prior`, the first
            stage's score, is blended in by the weight that the arm was published with
        url: Triton servers, tried in this order; scheme grpc, grpcs, http or https (none means grpc)
        model: Triton model name: student, baseline or a further arm
        version: version of the model; empty for the one it serves
        max_chunks: chunks of a long document that are read at most, for models that read several; none: the model's own
        top: lines to print; 0 for all
        deadline_ms: time for the whole request, retries included
    """

    query: str
    documents: Path
    url: list[str] = field(default_factory=lambda: ["grpc://localhost:8001"])
    model: str = "student"
    version: str = ""
    max_chunks: int | None = None
    top: int = 10
    deadline_ms: float = 10_000.0

    def __post_init__(self) -> None:
        if self.top < 0:
            raise ValueError(f"top is {self.top}: 0 or more is needed")


def main(config: Config) -> None:
    """Print the documents, best first, with their scores."""
    documents = read_documents(config.documents)
    with Reranker(config.url, config.model, config.deadline_ms, config.credentials()) as ranker:
        titles, summaries = ([d[name] for d in documents] for name in ("title", "summary"))
        priors = [d["prior"] for d in documents]
        ranked = ranker.rank(config.query, titles, summaries, config.version, priors, config.max_chunks)
    chances = ranked.probabilities
    print(f"{'rank':>4}  {'score':>9}  {'' if chances is None else 'probability  '}{'doc_id':12}  title")
    for place, index in enumerate(ranked.order[: config.top or None], start=1):
        document = documents[index]
        title = " ".join(document["title"].split())
        chance = "" if chances is None else f"{chances[index]:>11.4f}  "
        print(f"{place:>4}  {ranked.scores[index]:>9.4f}  {chance}{document['doc_id']:12}  {title[:90]}")


def read_documents(path: Path) -> list[dict[str, Any]]:
    """Documents of a JSON Lines file: title, summary, doc_id, prior or None. DataError names the first bad line.

    Half a surrogate pair, as a title that was cut within an emoji has it, is read as it would be sent: as "?".
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines(): a JSON text may hold U+2028
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(path, f"cannot be read: {problem}") from problem
    documents: list[dict[str, Any]] = []
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise DataError(path, f"not JSON: {problem}", row) from problem
        if not isinstance(content, dict) or not isinstance(content.get("title"), str):
            raise DataError(path, "an object with a text `title` is expected", row)
        summary = content.get("summary", "")
        if not isinstance(summary, str):
            raise DataError(path, "`summary` is not text", row)
        prior = content.get("prior")
        if prior is not None and (isinstance(prior, bool) or not isinstance(prior, int | float)):
            raise DataError(path, "`prior` is not a number", row)
        texts = {
            "title": content["title"],
            "summary": summary,
            "doc_id": str(content.get("doc_id", len(documents) + 1)),
        }
        whole = {name: text.encode("utf-8", "replace").decode("utf-8") for name, text in texts.items()}
        documents.append({**whole, "prior": prior})
    if not documents:
        raise DataError(path, "no documents")
    return documents


if __name__ == "__main__":
    run(main, Config, example='python clients/rerank.py --query "night train" --documents documents.jsonl')
