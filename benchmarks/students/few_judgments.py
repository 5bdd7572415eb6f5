"""MSRD with few judgments and no LLM: the recipe of docs/students.md with 0, 30, 60 and 120 judged train queries.

python -m benchmarks.students.few_judgments --source beir:../shared/data/msrd --out runs/few_judgments

The teacher is training.blend_labels on queries nobody judged, where there are judgments with the baseline that learned
from them among its rankers; baselines and students have the shipped settings (training/configs/*_minilm.yaml) and
differ in `--train-share` and their teacher alone. All rows are measured on MSRD's test judgments, by
training.evaluate with its curve. A training that is finished is not run again, and an interrupted one goes on where it
was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.compute as pc

from benchmarks.students.runs import train_as_shipped
from ranking.program import run
from ranking.schema import read_table
from training import blend_labels, distill_student, evaluate, prepare_data, train_baseline


@dataclass
class Config:
    """Train and measure baselines and students on few judged queries.

    Args:
        source: dataset as prepare_data names it
        out: folder for dataset, labels, checkpoints, table and curve
        judged: numbers of judged train queries; 0 trains a student alone
        dev_queries: dev queries, for the blend's weights and the choice of checkpoints
        test_queries: test queries to measure on; 0 for all
        unlabelled_queries: train queries without judgments that the teacher labels
        seeds: seeds to train with; the table has a row for each
    """

    source: str = "beir:../shared/data/msrd"
    out: Path = Path("runs/few_judgments")
    judged: list[int] = field(default_factory=lambda: [0, 30, 60, 120])
    dev_queries: int = 150
    test_queries: int = 500
    unlabelled_queries: int = 800
    seeds: list[int] = field(default_factory=lambda: [1])


def main(config: Config) -> None:
    """Run what is not finished, then print the tables of training.evaluate and write its curve."""
    data = config.out / "data"
    prepare(config, data)
    queries = pc.count_distinct(read_table(data / "judgments/train.parquet", "judgments").column("query_id")).as_py()
    systems = ["bm25"]
    for seed in config.seeds:
        for judged in config.judged:
            share = min(1.0, judged / queries)
            flags = {"data": data, "seed": seed, "train_share": share}
            name = f"{judged}-seed{seed}"
            labels = config.out / f"labels-{name}"
            teacher = blend_labels.Config(data=data, out=labels)
            if judged:
                out = config.out / f"baseline-{name}"
                systems.append(f"checkpoint:{train_as_shipped(train_baseline, 'baseline_minilm.yaml', out, **flags)}")
                teacher.ranker = [*teacher.ranker, f"checkpoint:{out}"]
            if not labels.is_dir():
                blend_labels.main(teacher)
            systems.append(f"teacher-{name}=blend:{labels}")
            out = config.out / f"student-{name}"
            flags |= {"labels": labels}
            systems.append(f"checkpoint:{train_as_shipped(distill_student, 'student_minilm.yaml', out, **flags)}")
    evaluate.main(
        evaluate.Config(data=data, system=systems, curve=True, out=config.out / "evaluation", precision="bfloat16")
    )


def prepare(config: Config, data: Path) -> None:
    """The dataset: 5% of the train queries keep their judgments, the documents of others become candidates."""
    if not (data / "dataset.json").is_file():
        prepare_data.main(
            prepare_data.Config(
                source=config.source,
                out=data,
                judged_fraction=0.05,
                dev_queries=config.dev_queries,
                test_queries=config.test_queries,
                unlabelled_queries=config.unlabelled_queries,
            )
        )


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.students.few_judgments --source beir:../shared/data/msrd")
