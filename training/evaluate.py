"""Evaluate rankers on a dataset's judged documents: one table, the same as JSON, and per-query Parquet."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ranking.card import fingerprint
from ranking.errors import InputError
from ranking.files import replacing, write_json
from ranking.first_stage import BM25_NAME, first_stage_scores
from ranking.prior_fit import fit_prior
from ranking.program import run
from ranking.schema import read_judgments
from training.evaluation.comparison import Judgments, SystemResult, compare, per_query_table
from training.evaluation.label_scores import label_scores
from training.evaluation.learning_curve import curve_points, curve_table, plot_curve
from training.evaluation.published_arm import PublishedArm
from training.evaluation.result_tables import calibration_table, disagreement_page, table, teacher_table
from training.evaluation.trec_files import trec_ids, write_qrels, write_run

LOGGER = logging.getLogger(__name__)
Split = Literal["train", "dev", "test"]
Precision = Literal["auto", "float32", "bfloat16"]
TestMetric = Literal["ndcg@1", "ndcg@5", "ndcg@10", "ndcg_exp@1", "ndcg_exp@5", "ndcg_exp@10", "mrr", "pnr"]


@dataclass
class Config:
    """Score a dataset's judged documents with several systems and compare them.

    Args:
        data: dataset folder
        split: train, dev or test
        system: bm25, random, labels:PATH (a labels folder or Parquet file), blend:PATH (the teacher behind a labels
            folder of training.blend_labels, on the judged pairs), checkpoint:PATH (ours, or any Hugging Face
            cross-encoder), prior:PATH (the same with the first stage's score as prior, its weight fitted on the dev
            judgments) or published:ARM,CHECKPOINT (an arm's folder in the model repository and the checkpoint that
            it was built from, with the first stage's score as prior), each optionally as NAME=...; the first is what
            the others are tested against
        first_stage: the first stage's scores of the judged pairs (query_id, doc_id, prior), for published: and prior:;
            BM25 when left out
        curve: print quality against the number of judged train queries, and plot it into OUT/curve.png, from
            checkpoints that were trained with different --train-share
        teacher: row that retention and agreement refer to; default: the first teacher or labels row
        out: folder for evaluation.json, per_query.parquet, scores.parquet and disagreements-*.md; by default
            runs/evaluation/DATA-SPLIT
        write_qrels: file to write the judgments into, in trec_eval's form
        write_runs: folder to write every system's ranking into, NAME.run in trec_eval's form
        test_metric: metric of the interval and the p in the table; NDCG has linear gain, ndcg_exp has 2^grade - 1
        relevant_from: grade from which a document counts as relevant in the calibration error
        disagreements: rows in the list of largest disagreements with the teacher
        queries: evaluate on the first so many queries only; 0 for all
        precision: float32, bfloat16 matrix products, or auto: bfloat16 where the processor multiplies it natively
        batch_tokens: padded tokens of one forward; lower it if memory does not suffice
        resamples: bootstrap resamples
        permutations: permutations of the randomisation test
        seed: draws the random system, resamples and permutations
    """

    data: Path
    split: Split = "test"
    system: list[str] = field(default_factory=lambda: ["bm25", "random"])
    first_stage: Path | None = None
    curve: bool = False
    teacher: str = ""
    out: Path | None = None
    write_qrels: Path | None = None
    write_runs: Path | None = None
    test_metric: TestMetric = "ndcg@5"
    relevant_from: int = 1
    disagreements: int = 20
    queries: int = 0
    precision: Precision = "float32"
    batch_tokens: int = 8192
    resamples: int = 2000
    permutations: int = 10000
    seed: int = 0

    def __post_init__(self):
        if not self.system:
            raise ValueError("system: at least one is needed, e.g. --system bm25")
        self.system = _joined(self.system)
        for name in ("resamples", "permutations", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        for name in ("queries", "disagreements", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: 0 or more is needed")


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
    """Score the judged documents with every system, print the tables, write the files of write_results."""
    judged_file = config.data / "judgments" / f"{config.split}.parquet"
    judgments = judgments_of(judged_file, config.queries)
    _check_names(config)
    if config.write_runs:
        trec_ids(config.write_runs, judgments)
    if config.write_qrels:
        write_qrels(config.write_qrels, judgments)
    systems: list[System] = []
    for spec in config.system:
        systems.append(
            score_system(
                spec,
                judgments,
                corpus=config.data,
                split=config.split,
                first_stage=config.first_stage,
                seed=config.seed,
                precision=config.precision,
                batch_tokens=config.batch_tokens,
                scored=systems,
            )
        )
    _make_names_unique(systems)
    teacher = _teacher(systems, config.teacher)
    if config.write_runs:
        for name, system in _distinct_file_names(systems).items():
            write_run(config.write_runs / f"{name}.run", judgments, system.scores, system.name)
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
    out = config.out or Path("runs/evaluation") / f"{config.data.name}-{config.split}"
    if config.curve:
        points = curve_points(checkpoint_folders(systems))
        parts.append(curve_table(points, results))
        plot_curve(points, results, out / "curve.png")
    print("\n\n".join(part for part in parts if part))
    write_results(
        out, config.split, judged_file, judgments, systems, teacher, results, disagreements=config.disagreements
    )
    LOGGER.info("written: %s", out)


def judgments_of(path: Path, queries: int = 0) -> Judgments:
    """A judgments file, or its first `queries` queries (0: all). DataError if it holds no judged document."""
    rows = read_judgments(path)
    if queries:
        first = pc.unique(rows.column("query_id"))[:queries]
        rows = rows.filter(pc.is_in(rows.column("query_id"), value_set=first))
    return Judgments.of_table(rows)


def score_system(
    spec: str,
    judgments: Judgments,
    *,
    corpus: Path,
    split: Split = "test",
    first_stage: Path | None = None,
    seed: int = 0,
    precision: Precision = "float32",
    batch_tokens: int = 8192,
    scored: Sequence[System] = (),
) -> System:
    """Scores of one --system. InputError names a spec that is none, a pair without a label, or a bad checkpoint.

    corpus: dataset folder whose judged documents give BM25 its word statistics; split: the one that `judgments` are
    of; first_stage: the prior's file, None for BM25; seed: of the random system; precision and batch_tokens: of a
    checkpoint's forwards; scored: systems of the same judgments that have their scores, not to be taken twice.
    """
    name, source = _split_spec(spec)
    kind, _, where = source.partition(":")
    if source == "random":
        rng = np.random.default_rng(seed)
        return System(name, source, rng.random(len(judgments.grades), np.float32))
    if source == "bm25":
        return System(name, source, first_stage_scores(None, corpus, judgments.table))
    if kind == "labels" and where:
        return System(name, source, label_scores(Path(where), judgments.table), is_teacher=True, is_logit=True)
    # torch takes seconds to import, and bm25 needs none of it
    if kind == "blend" and where:
        from training.evaluation.blend import Blend, BlendScorer

        blend = Blend.of_labels(Path(where))
        scorer = BlendScorer(corpus, blend.encoder, blend.max_tokens, blend.precision)
        return System(name, source, scorer.blended(blend, judgments.table), is_teacher=True, is_logit=True)
    if kind == "prior" and where:
        from training.evaluation.checkpoint_scores import Scorer

        if split == "dev":
            raise InputError(f"--system {spec}: its weight is fitted on dev, and would be measured on what it has seen")
        checkpoint = Scorer.load(where)
        dev = judgments_of(corpus / "judgments" / "dev.parquet")
        dev_scores = checkpoint.score(*dev.texts(), batch_tokens=batch_tokens, precision=precision, progress=name)
        dev_prior = first_stage_scores(first_stage, corpus, dev.table)
        with_prior, _ = fit_prior(dev_scores, dev_prior, dev.grades, dev.groups, len(dev.query_ids))
        LOGGER.info("%s: weight of the prior %g, fitted on %d dev queries", name, with_prior.weight, len(dev.query_ids))
        scores = next((s.scores for s in scored if s.source == f"checkpoint:{where}"), None)
        if scores is None:
            scores = checkpoint.score(*judgments.texts(), batch_tokens=batch_tokens, precision=precision, progress=name)
        prior = first_stage_scores(first_stage, corpus, judgments.table)
        return System(name, source, with_prior.blend(scores, prior, judgments.groups), is_logit=True)
    if kind in ("checkpoint", "published") and where:
        from training.evaluation.checkpoint_scores import Scorer

        arm = PublishedArm.read(where) if kind == "published" else None
        given = BM25_NAME if first_stage is None else f"first stage {first_stage.name}"
        if arm and arm.first_stage != given:
            raise InputError(f"--system {spec}: its prior was fitted on {arm.first_stage}, and {given} is given")
        checkpoint = Scorer.load(arm.checkpoint if arm else where)
        scores = checkpoint.score(*judgments.texts(), batch_tokens=batch_tokens, precision=precision, progress=name)
        if arm:
            prior = first_stage_scores(first_stage, corpus, judgments.table)
            return System(name, source, arm.prior.blend(scores, prior, judgments.groups), is_logit=True)
        card = checkpoint.card
        is_teacher = card is not None and card.role == "teacher"
        return System(name, source, scores, is_teacher, True, card.calibration if card else None)
    raise InputError(
        f"--system {spec}: bm25, random, labels:, blend:, checkpoint:, prior: or published: is expected, or NAME=one"
    )


def checkpoint_folders(systems: list[System]) -> dict[str, Path]:
    """System name -> checkpoint folder, of the systems that are checkpoints."""
    return {s.name: Path(s.source.removeprefix("checkpoint:")) for s in systems if s.source.startswith("checkpoint:")}


def _split_spec(spec: str) -> tuple[str, str]:
    name, equals, source = spec.partition("=")
    if equals and re.fullmatch(r"[\w.+ -]+", name):
        return name, source
    kind, _, where = spec.partition(":")
    return (Path(where).name or kind if where else spec), spec


def _joined(specs: list[str]) -> list[str]:
    """The systems, each in one piece: a command line takes lists apart at commas, published:ARM,CHECKPOINT too."""
    whole: list[str] = []
    for spec in specs:
        source = _split_spec(whole[-1])[1] if whole else ""
        if source.startswith("published:") and "," not in source and not re.search("[:=]", spec):
            whole[-1] += f",{spec}"
        else:
            whole.append(spec)
    return whole


def _make_names_unique(systems: list[System]) -> None:
    names = [system.name for system in systems]
    for system in systems:
        if names.count(system.name) > 1:
            system.name = system.source
    if len({system.name for system in systems}) < len(systems):
        raise InputError("--system: the same system is given twice")
    if taken := {system.name for system in systems} & {"query_id", "doc_id", "grade"}:
        raise InputError(f"--system {taken.pop()}=...: scores.parquet has a column of that name; name it otherwise")


def _check_names(config: Config) -> None:
    """InputError for names that cannot be told apart or are none, before the scoring, which may take hours."""
    planned = [System(*_split_spec(spec), np.empty(0, np.float32)) for spec in config.system]
    _make_names_unique(planned)
    _distinct_file_names(planned)
    if config.teacher:
        _teacher(planned, config.teacher)


def _teacher(systems: list[System], name: str) -> System | None:
    """The row of that name or source; without a name the first one that is a teacher."""
    if name:
        found = next((system for system in systems if name in (system.name, system.source)), None)
        if found is None:
            raise InputError(f"--teacher {name}: no such row; there are {', '.join(s.name for s in systems)}")
        return found
    return next((system for system in systems if system.is_teacher), None)


def write_results(
    out: Path,
    split: str,
    judged_file: Path,
    judgments: Judgments,
    systems: list[System],
    teacher: System | None,
    results: dict[str, SystemResult],
    *,
    disagreements: int,
) -> None:
    """evaluation.json, per_query.parquet, scores.parquet, and a disagreements page per system beside the teacher."""
    has_relevant = judgments.ranking(systems[0].scores).has_relevant
    content = {
        "data": str(judged_file.parents[1]),
        "split": split,
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
    for system in systems:
        if teacher is not None and system is not teacher:
            names, scores = (teacher.name, system.name), (teacher.scores, system.scores)
            page = disagreement_page(names, scores, judgments, disagreements)
            with replacing(out / f"disagreements-{_file_name(system.name)}.md") as aside:
                aside.write_text(page, encoding="utf-8")


def _distinct_file_names(systems: list[System]) -> dict[str, System]:
    named = {_file_name(system.name): system for system in systems}
    if len(named) < len(systems):
        raise InputError("--system: two systems would have one file: name them apart with NAME=...")
    return named


def _file_name(system: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", system)


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m training.evaluate --data data/world --system bm25 --system checkpoint:runs/student",
    )
