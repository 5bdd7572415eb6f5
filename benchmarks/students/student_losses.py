"""Which loss should a student learn by? The paper's hybrid beside variants of it, on one teacher's labels.

python -m benchmarks.students.student_losses --data runs/world --teacher runs/losses/seed-1/teacher --out runs/losses

Where the teacher is an encoder with the students' tokenizer and limits, `--variants` may name those that also imitate
its value relations (docs/results/value_relations.md).

Every line has order (NDCG@5, PNR), calibration (ECE on test after Platt scaling on dev) and where the student's error
against its teacher lies: in the offsets of whole queries, or in the order within them. A finished line is not run
again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from benchmarks.students.ablation import LIMITS
from benchmarks.students.runs import (
    append_row,
    checkpoint_scores,
    finished_rows,
    judged_ranking,
    query_numbers,
    started,
)
from ranking.calibration import ece, probability
from ranking.calibration_fit import fit
from ranking.card import CARD_NAME, ScoreCard, fingerprint
from ranking.errors import InputError
from ranking.files import replacing
from ranking.metrics import mean
from ranking.program import run
from ranking.schema import read_table
from training.distill_student import DistillationSettings, distill
from training.student.student_groups import groups_of
from training.student.student_training import start_student

LOGGER = logging.getLogger(__name__)

# variant -> settings of distill_student that differ
VARIANTS: dict[str, dict[str, Any]] = {
    "hybrid (paper)": {"loss": "hybrid", "alpha": 1.0},
    "ranknet_point 0.1": {"loss": "ranknet_point", "anchor": 0.1},
    "ranknet": {"loss": "ranknet"},
    "margin": {"loss": "margin"},
    "ranknet_point 0.3": {"loss": "ranknet_point", "anchor": 0.3},
    "hybrid with offsets removed": {"loss": "hybrid", "alpha": 1.0},
    "hybrid with uniform sampling": {"loss": "hybrid", "alpha": 1.0, "group_sampling": "uniform"},
    "hybrid with alpha 0.1": {"loss": "hybrid", "alpha": 0.1},
    "point": {"loss": "point"},
    "ranknet with uniform sampling": {"loss": "ranknet", "group_sampling": "uniform"},
    "hybrid with all documents": {"loss": "hybrid", "alpha": 1.0, "group_documents": 0, "batch_groups": 3},
}
# variants for which the teacher must be an encoder with the students' tokenizer and limits
OF_ENCODERS: dict[str, dict[str, Any]] = {
    "hybrid with relations 1": {"loss": "hybrid", "alpha": 1.0, "relation_weight": 1.0, "relation_heads": 4},
    "hybrid with relations 10": {"loss": "hybrid", "alpha": 1.0, "relation_weight": 10.0, "relation_heads": 4},
}
ALL = VARIANTS | OF_ENCODERS
PIECE = 4000  # candidates labelled at once; what is labelled is kept
WITHOUT_OFFSETS = "hybrid with offsets removed"


@dataclass
class Config:
    """Train a student by each variant of the loss and print the table.

    Args:
        data: dataset folder with candidates and judgments
        teacher: checkpoint whose scores of the candidates are the labels
        out: folder for labels, students and results.jsonl
        variants: which, in this order; none: all that any teacher can teach
        seeds: training seeds
        queries: queries of the candidates that are labelled; 0 for all
        size: shape of the students, see docs/students.md
        epochs: passes over the labelled queries
        held_out: labelled queries that no student sees: the error against the teacher is measured there
        tables: print what is there and train nothing
    """

    data: Path
    teacher: Path
    out: Path = Path("runs/student_losses")
    variants: list[str] | None = None
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    queries: int = 0
    size: str = "mini-3"
    epochs: float = 2
    held_out: int = 200
    tables: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.variants or []) - set(ALL))
        if unknown:
            raise ValueError(f"variants: {', '.join(unknown)} unknown; there are {', '.join(ALL)}")


def main(config: Config) -> None:
    """Train what is not finished, seed by seed, and print the table."""
    names = config.variants or list(VARIANTS)
    if not config.tables:
        config.out.mkdir(parents=True, exist_ok=True)
        labelled = labelled_candidates(config)
        done = {(row["variant"], row["seed"]) for row in finished_rows(config.out)}
        for seed in config.seeds:
            for name in names:
                if (name, seed) not in done:
                    append_row(config.out, measured(config, labelled, name, seed))
    print(table(finished_rows(config.out)))


def labelled_candidates(config: Config) -> pa.Table:
    """The candidates of the first queries with the teacher's scores, which are computed once, piece by piece."""
    candidates = read_table(config.data / "candidates.parquet", "candidates")
    if config.queries:
        first = candidates.column("query_id").unique()[: config.queries]
        candidates = candidates.filter(pc.is_in(candidates.column("query_id"), value_set=first))
    scores = []
    for start in range(0, len(candidates), PIECE):
        rows, kept = candidates.slice(start, PIECE), config.out / f"labels-{start}.npy"
        if not kept.is_file():
            with replacing(kept) as aside, aside.open("wb") as stream:
                np.save(stream, checkpoint_scores(config.teacher, rows))
        scores.append(np.load(kept))
        if len(scores[-1]) != len(rows):
            raise InputError(f"{kept}: {len(scores[-1])} labels for {len(rows)} candidates; give another --out")
    return candidates.append_column("teacher_score", pa.array(np.concatenate(scores), pa.float32()))


def measured(config: Config, labelled: pa.Table, name: str, seed: int) -> dict[str, Any]:
    """Train one student and measure it: the line of results.jsonl."""
    queries = labelled.column("query_id").unique()
    unseen = pc.is_in(labelled.column("query_id"), value_set=queries[: config.held_out])
    train, test = labelled.filter(pc.invert(unseen)), labelled.filter(unseen)
    out = config.out / f"student-{list(ALL).index(name)}-{seed}"
    if not (out / CARD_NAME).is_file():
        settings = DistillationSettings(
            data=config.data, out=out, seed=seed, epochs=config.epochs, resume=started(out), limits=LIMITS,
            size=config.size, vocabulary_size=4000, match_steps=300, learning_rate=1e-3, warmup=20, log_steps=100,
            # of an encoder the vocabulary too, so that the variants differ in nothing else
            tokenizer=config.teacher if ScoreCard.load(config.teacher).role in ("student", "baseline") else None,
            relation_teacher=config.teacher if name in OF_ENCODERS else None,
            **{"batch_groups": 8, "group_documents": 8} | ALL[name],
        )  # fmt: skip
        student = start_student(settings)
        labels = without_offsets(train) if name == WITHOUT_OFFSETS else train
        groups = groups_of([labels], "teacher_score", student.text_format)
        mark = {"labels": fingerprint(config.teacher / "model.safetensors")}
        distill(settings, student, groups, ScoreCard.load(config.teacher), mark)
    line = {"variant": name, "seed": seed} | order_and_calibration(config.data, out) | error_of(out, test)
    LOGGER.info("%s", line)
    return line


def without_offsets(labelled: pa.Table) -> pa.Table:
    """The labels with every query's mean moved to the mean of all: what the student cannot know is not asked of it."""
    scores, query = labelled.column("teacher_score").to_numpy(), query_numbers(labelled)
    centred = scores - query_means(scores, query)[query] + scores.mean()
    place = labelled.column_names.index("teacher_score")
    return labelled.set_column(place, "teacher_score", pa.array(centred, pa.float32()))


def query_means(values: NDArray, query: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean of the values of each query, float [queries]."""
    return np.bincount(query, values) / np.bincount(query)


def order_and_calibration(data: Path, checkpoint: Path) -> dict[str, float]:
    """NDCG@5 and PNR on test, and the calibration error there after Platt scaling on dev."""
    dev, test = (read_table(data / "judgments" / f"{split}.parquet", "judgments") for split in ("dev", "test"))
    on_dev, on_test = (checkpoint_scores(checkpoint, rows) for rows in (dev, test))
    curve = fit("platt", on_dev, dev.column("grade").to_numpy() > 0)
    ranked = judged_ranking(test, on_test)
    return {
        "dev_ndcg@5": mean(judged_ranking(dev, on_dev).ndcg(5)),
        "ndcg@5": mean(ranked.ndcg(5)),
        "pnr": ranked.pairs().pnr,
        "ece": ece(probability(on_test, curve), test.column("grade").to_numpy() > 0),
    }


def error_of(checkpoint: Path, labelled: pa.Table) -> dict[str, float]:
    """The error against the teacher on queries that were not trained on, in shares of the labels' variance.

    offset: variance of a query's mean error; within: variance of the error within queries; between: how much of the
    labels' own variance lies between queries.
    """
    teacher, query = labelled.column("teacher_score").to_numpy().astype(np.float64), query_numbers(labelled)
    error = checkpoint_scores(checkpoint, labelled) - teacher
    of_query = query_means(error, query)
    return {
        "offset": float(of_query.var() / teacher.var()),
        "within": float((error - of_query[query]).var() / teacher.var()),
        "between": float(query_means(teacher, query).var() / teacher.var()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds of each variant, and of its difference from hybrid, in Markdown."""
    if not rows:
        raise InputError("no finished student to report")
    columns = {"dev_ndcg@5": 3, "ndcg@5": 3, "pnr": 2, "ece": 3, "offset": 3, "within": 3}
    lines = [
        "| loss | seeds | dev NDCG@5 | test NDCG@5 | less hybrid | PNR | ECE, Platt on dev | error in offsets "
        "| error within |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    hybrid = {row["seed"]: row["ndcg@5"] for row in rows if row["variant"] == "hybrid (paper)"}
    for name in ALL:
        found = [row for row in rows if row["variant"] == name]
        if found:
            cells = [_spread([row[column] for row in found], digits) for column, digits in columns.items()]
            apart = [row["ndcg@5"] - hybrid[row["seed"]] for row in found if row["seed"] in hybrid]
            cells.insert(2, _spread(apart, 3) if apart else "")
            lines.append(f"| {name} | {len(found)} | " + " | ".join(cells) + " |")
    between = np.mean([row["between"] for row in rows])
    return "\n".join([*lines, "", f"Of the labels' variance {between:.0%} lies between queries."])


def _spread(values: list[float], digits: int) -> str:
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m benchmarks.students.student_losses --data data/world --teacher runs/teacher --seeds 1",
    )
