"""A blend of rankers as a teacher: which ones, on what scale, with which weights.

A pair's score is the weighted sum of its rankers' scores, each less a fixed mean and divided by a fixed spread. Mean
and spread are those of the labelled candidates and stay with the blend, so a pair has one score whatever list it stands
in.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ranking.bm25 import bm25_scores
from ranking.card import fingerprint
from ranking.errors import InputError
from ranking.labels import LabelSet, load_manifest
from ranking.pretrained import checkpoint_of
from ranking.schema import read_table
from training.evaluation.blend_combination import rank_fractions
from training.evaluation.checkpoint_scores import Scorer
from training.evaluation.label_scores import label_scores
from training.evaluation.sentence_similarity import SentenceEncoder

Precision = Literal["float32", "bfloat16"]
Combination = Literal["weighted", "ridge", "rank"]
UNTRAINED = ("bm25", "bm25:title", "similarity", "similarity:title")
RANKERS = f"{', '.join(UNTRAINED)}, checkpoint:PATH or labels:PATH"


@dataclass(frozen=True)
class Ranker:
    """One ranker of a blend. source: as RANKERS names it; fingerprint: of what its scores depend on."""

    source: str
    fingerprint: str
    mean: float = 0.0
    spread: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True)
class Blend:
    """Rankers with scales and weights.

    encoder, max_tokens, precision: how embeddings are made; corpus: fingerprint of the documents behind BM25's word
    statistics; combine: what is added up: scores on one scale, or ranks within the query.
    """

    rankers: tuple[Ranker, ...]
    encoder: str
    max_tokens: int
    precision: Precision
    corpus: str
    combine: Combination = "weighted"

    def teacher_id(self) -> str:
        """16 hex digits that change with everything that moves a score, the folders' names excepted."""
        content = asdict(self) | {"encoder": ""}
        if self.combine != "rank":  # however the weights were found, they and the scales make the score
            del content["combine"]
        for ranker in content["rankers"]:
            if ranker["source"] not in UNTRAINED:
                ranker["source"] = ranker["source"].partition(":")[0]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """The weights in one line."""
        return ", ".join(f"{ranker.source} {ranker.weight:.2f}" for ranker in self.rankers)

    @classmethod
    def of_labels(cls, folder: Path) -> Blend:
        """The blend behind a labels folder that training.blend_labels wrote. InputError if it was made otherwise."""
        manifest: dict[str, Any] = load_manifest(folder / "manifest.json") or {}
        if "blend" not in manifest:
            raise InputError(f"{folder}: not a labels folder of training.blend_labels")
        try:
            content = dict(manifest["blend"])
            content["rankers"] = tuple(Ranker(**ranker) for ranker in content["rankers"])
            return cls(**content)
        except (TypeError, ValueError, KeyError) as problem:
            raise InputError(f"{folder}: its blend is not one of this release: {problem}; label again") from problem


class BlendScorer:
    """Scores pairs by the rankers of a blend over one dataset folder.

    data: folder whose candidates and judgments are the documents of BM25's word statistics.
    """

    def __init__(self, data: Path, encoder: str, max_tokens: int, precision: Precision):
        self.data, self.encoder_name, self.max_tokens, self.precision = data, encoder, max_tokens, precision
        self.documents = dataset_documents(data)

    @cached_property
    def corpus(self) -> str:
        """Fingerprint of the documents, whatever their order."""
        digest = hashlib.sha256()
        for title, summary in sorted(self.documents):
            digest.update(f"{len(title)}:{title}{summary}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]

    @cached_property
    def encoder(self) -> SentenceEncoder:
        """The sentence encoder, opened once."""
        return SentenceEncoder.load(self.encoder_name, self.max_tokens)

    def ranker(self, source: str) -> Ranker:
        """The ranker of that name, its scale and weight still open. InputError if it is none of RANKERS."""
        kind, _, where = source.partition(":")
        if source in UNTRAINED:
            return Ranker(source, self.corpus if kind == "bm25" else _fingerprint_of(checkpoint_of(self.encoder_name)))
        if kind == "checkpoint" and where:
            return Ranker(source, _fingerprint_of(where))
        if kind == "labels" and where:
            return Ranker(source, LabelSet.load(where).teacher_id)
        raise InputError(f"--ranker {source}: {RANKERS} is expected")

    def scores(self, source: str, rows: pa.Table) -> NDArray[np.float32]:
        """One ranker's raw scores, float32 [rows], of rows with query_id, doc_id, query, title and summary.

        InputError: an unknown ranker, a bad checkpoint, or a pair that has no label.
        """
        kind, _, where = source.partition(":")
        queries, titles, summaries = (rows.column(name).to_pylist() for name in ("query", "title", "summary"))
        bf16 = self.precision == "bfloat16"
        if kind == "bm25" and where == "title":
            corpus = list(dict.fromkeys((title, "") for title, _ in self.documents))
            return bm25_scores(queries, titles, [""] * len(titles), corpus)
        if kind == "bm25":
            return bm25_scores(queries, titles, summaries, self.documents)
        if kind == "similarity":
            texts = titles if where == "title" else [f"{title} {text}" for title, text in zip(titles, summaries)]
            return self.encoder.similarity(queries, texts, bf16=bf16, progress=source)
        if kind == "checkpoint":
            scorer = Scorer.load(where)
            return scorer.score(queries, titles, summaries, precision=self.precision, progress=source)
        return label_scores(Path(where), rows)

    def blended(self, blend: Blend, rows: pa.Table) -> NDArray[np.float32]:
        """The blend's scores, float32 [rows]. InputError if a ranker's file or the documents are no longer the same."""
        if blend.corpus != self.corpus:
            raise InputError(f"{self.data}: not the documents that the blend was made on; label again")
        total = np.zeros(len(rows), np.float64)
        for ranker in blend.rankers:
            if self.ranker(ranker.source).fingerprint != ranker.fingerprint:
                raise InputError(f"{ranker.source}: changed since the blend was made; label again")
            scores = self.scores(ranker.source, rows)
            if blend.combine == "rank":
                total += ranker.weight * rank_fractions(scores, query_numbers(rows))
            else:
                total += ranker.weight * (scores - ranker.mean) / ranker.spread
        return total.astype(np.float32)


def query_numbers(rows: pa.Table) -> NDArray[np.int64]:
    """int64 [rows]: one number for each query_id."""
    return np.unique(rows.column("query_id").to_numpy(zero_copy_only=False), return_inverse=True)[1]


def dataset_documents(data: Path) -> list[tuple[str, str]]:
    """The distinct documents (title, summary) of a dataset folder's candidates and judgments."""
    documents: dict[tuple[str, str], None] = {}
    tables = [(path, "judgments") for path in sorted((data / "judgments").glob("*.parquet"))]
    if (data / "candidates.parquet").is_file():
        tables.append((data / "candidates.parquet", "candidates"))
    for path, table in tables:
        rows = read_table(path, table)
        documents |= dict.fromkeys(zip(rows.column("title").to_pylist(), rows.column("summary").to_pylist()))
    return list(documents)


def _fingerprint_of(checkpoint: str) -> str:
    """Of a folder's weights and tokenizer; a hub id stands for itself. InputError if the folder has no weights."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return checkpoint
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{folder}: no *.safetensors; a checkpoint folder is needed")
    return fingerprint(*weights, *sorted(folder.glob("tokenizer.json")))
