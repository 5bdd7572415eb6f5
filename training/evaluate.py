"""Evaluate rankers on a dataset's judged documents: one table, the same as JSON, and per-query Parquet."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ranking.card import fingerprint
from ranking.errors import DataError, InputError
from ranking.files import replacing, write_json
from ranking.labels import read_labels
from ranking.program import run
from ranking.schema import read_table
from training.evaluation.comparison import Judgments, compare, per_query_table
from training.evaluation.report import calibration_table, disagreement_page, table, teacher_table
from training.sources.bm25 import bm25_scores

LOGGER = logging.getLogger(__name__)
Split = Literal["train", "dev", "test"]
TestMetric = Literal["ndcg@1", "ndcg@5", "ndcg@10", "ndcg_exp@1", "ndcg_exp@5", "ndcg_exp@10", "mrr", "pnr"]


@dataclass
class Config:
    """Score a dataset's judged documents with several systems and compare them.

    Args:
        data: dataset folder
        split: train, dev or test
        system: bm25, random, labels:PATH (a labels folder or Parquet file) or checkpoint:PATH (ours, or any Hugging Face cross-encoder), each optionally as NAME=...; the first is what the others are tested against
        teacher: row that retention and agreement refer to; default: the first teacher or labels row
        out: folder for evaluation.json, per_query.parquet, scores.parquet and disagreements-*.md; default runs/evaluation/DATA-SPLIT
        test_metric: metric of the interval and the p in the table; NDCG has linear gain, ndcg_exp has 2^grade - 1
        relevant_from: grade from which a document counts as relevant in the calibration error
        disagreements: rows in the list of largest disagreements with the teacher
        queries: evaluate on the first so many queries only; 0 for all
        precision: float32, or bfloat16 matrix products (faster where the CPU or GPU has them)
        batch_tokens: padded tokens of one forward; lower it if memory does not suffice
        resamples: bootstrap resamples
        permutations: permutations of the randomisation test
        seed: draws the random system, resamples and permutations
    """  # noqa: E501

    data: Path
    split: Split = "test"
    system: list[str] = field(default_factory=lambda: ["bm25", "random"])
    teacher: str = ""
    out: Path | None = None
    test_metric: TestMetric = "ndcg@5"
    relevant_from: int = 1
    disagreements: int = 20
    queries: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    batch_tokens: int = 8192
    resamples: int = 2000
    permutations: int = 10000
    seed: int = 0

    def __post_init__(self):
        if not self.system:
            raise ValueError("system: at least one is needed, e.g. --system bm25")
        for name in ("resamples", "permutations", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")


@dataclass
class System:
    """A row of the table: where its scores come from, the scores, and what its card says."""

    name: str
    source: str
    scores: NDArray[np.float32]
    is_teacher: bool = False
    is_logit: bool = False
    calibration: dict[str, Any] | None = None


def main(config: Config) -> None:
    judgments = read_judgments(config)
    systems = [score_system(spec, judgments, config) for spec in config.system]
    _make_names_unique(systems)
    teacher = _teacher(systems, config)
    results = compare(
        {system.name: system.scores for system in systems},
        judgments,
        teacher=teacher.name if teacher else None,
        calibrations={system.name: system.calibration for system in systems if system.is_logit},
        relevant_from=config.relevant_from,
        resamples=config.resamples,
        permutations=config.permutations,
        seed=config.seed,
    )
    parts = [table(results, len(judgments.query_ids), config.test_metric)]
    if teacher:
        parts.append(teacher_table(results, teacher.name))
    parts.append(calibration_table(results))
    print("\n\n".join(part for part in parts if part))
    out = config.out or Path("runs/evaluation") / f"{config.data.name}-{config.split}"
    write_results(out, config, judgments, systems, teacher, results)
    LOGGER.info("written: %s", out)


def read_judgments(config: Config) -> Judgments:
    path = config.data / "judgments" / f"{config.split}.parquet"
    rows = read_table(path, "judgments")
    if not len(rows):
        raise DataError(path, "there is no judged document to evaluate on")
    if config.queries:
        first = pc.unique(rows.column("query_id"))[: config.queries]
        rows = rows.filter(pc.is_in(rows.column("query_id"), value_set=first))
    return Judgments.of_table(rows)


def score_system(spec: str, judgments: Judgments, config: Config) -> System:
    """Scores of one --system. InputError names a spec that is none, a pair without a label, or a bad checkpoint."""
    name, source = _split_spec(spec)
    kind, _, where = source.partition(":")
    if source == "random":
        rng = np.random.default_rng(config.seed)
        return System(name, source, rng.random(len(judgments.grades), np.float32))
    if source == "bm25":
        corpus = _documents(config.data)
        return System(name, source, bm25_scores(*judgments.texts(), corpus=corpus))
    if kind == "labels" and where:
        return System(name, source, label_scores(Path(where), judgments), is_teacher=True, is_logit=True)
    if kind == "checkpoint" and where:
        from training.evaluation.scoring import Scorer  # torch takes seconds to import, and bm25 needs none of it

        scorer = Scorer.load(where)
        scores = scorer.score(
            *judgments.texts(), batch_tokens=config.batch_tokens, precision=config.precision, progress=name
        )
        card = scorer.card
        is_teacher = card is not None and card.role == "teacher"
        return System(name, source, scores, is_teacher, True, card.calibration if card else None)
    raise InputError(f"--system {spec}: bm25, random, labels:PATH or checkpoint:PATH is expected, or NAME=one of them")


def _split_spec(spec: str) -> tuple[str, str]:
    name, equals, source = spec.partition("=")
    if equals and re.fullmatch(r"[\w.+ -]+", name):
        return name, source
    kind, _, where = spec.partition(":")
    return (Path(where).name or kind if where else spec), spec


def _documents(data: Path) -> list[tuple[str, str]]:
    """The judged documents of all splits: BM25's word statistics should not depend on the split that is measured."""
    documents: dict[tuple[str, str], None] = {}
    for path in sorted((data / "judgments").glob("*.parquet")):
        rows = read_table(path, "judgments")
        documents |= dict.fromkeys(zip(rows.column("title").to_pylist(), rows.column("summary").to_pylist()))
    return list(documents)


def label_scores(path: Path, judgments: Judgments) -> NDArray[np.float32]:
    """Teacher scores of the judged pairs from a labels folder or one labels file. InputError if a pair has none."""
    rows = read_labels(path) if path.is_dir() else read_table(path, "labels")
    keys = zip(rows.column("query_id").to_pylist(), rows.column("doc_id").to_pylist())
    scores = dict(zip(keys, rows.column("teacher_score").to_pylist()))
    judged = judgments.table
    pairs = list(zip(judged.column("query_id").to_pylist(), judged.column("doc_id").to_pylist()))
    missing = [pair for pair in pairs if pair not in scores]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(pairs)} judged pairs have no label, the first is query {missing[0][0]!r}, "
            f"document {missing[0][1]!r}; label the judged pairs too"
        )
    return np.array([scores[pair] for pair in pairs], np.float32)


def _make_names_unique(systems: list[System]) -> None:
    names = [system.name for system in systems]
    for system in systems:
        if names.count(system.name) > 1:
            system.name = system.source
    if len({system.name for system in systems}) < len(systems):
        raise InputError("--system: the same system is given twice")


def _teacher(systems: list[System], config: Config) -> System | None:
    if config.teacher:
        found = next((system for system in systems if config.teacher in (system.name, system.source)), None)
        if found is None:
            raise InputError(f"--teacher {config.teacher}: no such row; there are {', '.join(s.name for s in systems)}")
        return found
    return next((system for system in systems if system.is_teacher), None)


def write_results(out: Path, config: Config, judgments: Judgments, systems: list[System], teacher, results) -> None:
    """evaluation.json, per_query.parquet, scores.parquet, and a disagreements page per system beside the teacher."""
    has_relevant = judgments.ranking(systems[0].scores).has_relevant
    judged_file = config.data / "judgments" / f"{config.split}.parquet"
    content = {
        "data": str(config.data),
        "split": config.split,
        "judgments": fingerprint(judged_file),
        "queries": len(judgments.query_ids),
        "queries_without_relevant": int((~has_relevant).sum()),
        "documents": len(judgments.grades),
        "gain": "ndcg: linear (the grade); ndcg_exp: 2^grade - 1",
        "first": systems[0].name,
        "teacher": teacher.name if teacher else None,
        "systems": {s.name: {"source": s.source, **results[s.name].as_dict()} for s in systems},
    }
    write_json(out / "evaluation.json", content)
    with replacing(out / "per_query.parquet") as aside:
        pq.write_table(per_query_table(results, judgments), aside)
    scored = judgments.table.select(["query_id", "doc_id", "grade"])
    for system in systems:
        scored = scored.append_column(system.name, pa.array(system.scores, pa.float32()))
    with replacing(out / "scores.parquet") as aside:
        pq.write_table(scored, aside)
    for system in systems if teacher else []:
        if system is not teacher:
            names, scores = (teacher.name, system.name), (teacher.scores, system.scores)
            page = disagreement_page(names, scores, judgments, config.disagreements)
            file_name = f"disagreements-{re.sub(r'[^A-Za-z0-9_.+-]+', '_', system.name)}.md"
            with replacing(out / file_name) as aside:
                aside.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m training.evaluate --data data/world --system bm25 --system checkpoint:runs/student",
    )
