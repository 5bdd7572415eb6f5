r"""Clicks before judgments, without an LLM: what a log is worth beside a few judged queries.

python -m training.prepare_data --source beir:../shared/data/msrd --out data/msrd-clicks --judged-fraction 0.05 \
    --simulate-clicks baidu --dev-queries 150 --test-queries 500 --unlabelled-queries 1200
python -m benchmarks.students.clicks_first --data data/msrd-clicks --out runs/clicks_first

--data is a dataset folder with a click log, events.parquet, few judged train queries and candidates; the first command
makes one of a judged collection, whose withheld judgments its simulated users click by. All rows are measured on its
test judgments: seed by seed, by training.evaluate, beside BM25; then over all seeds, beside baseline-few:
  bm25           no training
  baseline-few   MiniLM-L6 on the judged train queries
  clicked        MiniLM-L6 on the log alone, corrected for position bias
  encoder        on from there on the judged train queries
  teacher        the encoder blended with the rankers that need no training
  student        distilled from the teacher's labels on from `clicked`, tuned on the judgments
  decoder        with --decoder: the paper's steps from scratch, on the same clicks and judgments
A training or a seed's evaluation that is finished is not run again, and an interrupted training goes on where it was;
seeds may be run one by one, and all of them named in the last run.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.students.runs import judged_ranking, paired_gain, train_as_shipped
from ranking.errors import InputError
from ranking.metrics import JudgedRanking
from ranking.program import run
from training import (
    blend_labels,
    distill_student,
    evaluate,
    finetune_teacher,
    prepare_clicks,
    pretrain_teacher,
    train_baseline,
)
from training.clicks.click_pairs import ClickPairSettings
from training.clicks.privacy_gate import OPEN_GATE
from training.evaluation.blend import UNTRAINED

LOGGER = logging.getLogger(__name__)
FEW = "baseline-few"


@dataclass
class Config:
    """Train and measure rankers on a log and few judgments.

    Args:
        data: dataset folder with events.parquet
        out: folder for click tables, labels, checkpoints and the evaluation
        seeds: of the trainings; every row but the decoder's is trained with each
        decoder: train the decoder's row, too, with the first seed alone
    """

    data: Path
    out: Path = Path("runs/clicks_first")
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    decoder: bool = False

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds: at least one is needed")


def main(config: Config) -> None:
    """Run what is not finished, print training.evaluate's table of each seed, then that of all seeds together."""
    data, out, shown = config.data, config.out, config.out / "shown_documents.parquet"
    if not (data / "events.parquet").is_file():
        raise InputError(f"{data}: no events.parquet; a dataset with a click log is needed")
    if not shown.is_file():
        prepare_clicks.main(
            ClickPairSettings(
                events=str(data / "events.parquet"),
                out=out / "clicks.parquet",
                shown_documents=shown,
                privacy=OPEN_GATE,
            )
        )
    scores: dict[int, list[Path]] = {}
    for seed in config.seeds:
        of_seed = out / f"seed-{seed}"
        rows = [("bm25", "bm25"), *trained(data, of_seed, shown, seed)]
        scores[seed] = [evaluated(data, of_seed / "evaluation", rows)]
    if config.decoder:
        first = config.seeds[0]
        rows = [("bm25", "bm25"), ("decoder", f"checkpoint:{decoder(data, out, first)}")]
        scores[first].append(evaluated(data, out / f"seed-{first}" / "decoder_evaluation", rows))
    print(f"\n{table_of_seeds(scores)}")


def evaluated(data: Path, out: Path, rows: list[tuple[str, str]]) -> Path:
    """scores.parquet of training.evaluate with the rows' names, made unless it is newer than their checkpoints."""
    scores = out / "scores.parquet"
    folders = [Path(source.partition(":")[2]) for _, source in rows if ":" in source]
    if scores.is_file() and all(scores.stat().st_mtime > folder.stat().st_mtime for folder in folders):
        LOGGER.info("%s: measured before", out)
        return scores
    systems = [f"{row}={source}" for row, source in rows]
    evaluate.main(evaluate.Config(data=data, system=systems, out=out, precision="bfloat16"))
    return scores


def trained(data: Path, out: Path, shown: Path, seed: int) -> list[tuple[str, str]]:
    """(row, system for training.evaluate) of all rows of a seed, trained where they are not."""
    same = {"data": data, "seed": seed}
    few = train_as_shipped(train_baseline, "baseline_minilm.yaml", out / FEW, **same)
    clicked = train_as_shipped(
        train_baseline, "baseline_clicks_minilm.yaml", out / "clicked", shown_documents=shown, **same
    )
    encoder = train_as_shipped(
        train_baseline, "baseline_minilm.yaml", out / "encoder", init=clicked, learning_rate=2e-5, **same
    )
    labels = out / "labels"
    if not labels.is_dir():
        blend_labels.main(blend_labels.Config(data=data, out=labels, ranker=[*UNTRAINED, f"checkpoint:{encoder}"]))
    student = train_as_shipped(
        distill_student, "student_minilm.yaml", out / "student", labels=labels, init=clicked, **same
    )
    checkpoints = [f"checkpoint:{one}" for one in (few, clicked, encoder, student)]
    return list(zip((FEW, "clicked", "encoder", "student", "teacher"), [*checkpoints, f"blend:{labels}"]))


def decoder(data: Path, out: Path, seed: int) -> Path:
    """A decoder of a million weights: pre-trained on the clicks, scored by its likelihood, fine-tuned on judgments."""
    with_clicks = out / "data"  # the dataset's own folder may hold clicks that went through a privacy gate
    if not with_clicks.is_dir():
        with_clicks.mkdir()
        for name in ("judgments", "candidates.parquet", "dataset.json"):
            (with_clicks / name).symlink_to((data / name).resolve())
        (with_clicks / "clicks.parquet").symlink_to((out / "clicks.parquet").resolve())
    same = {"data": with_clicks, "seed": seed}
    out = out / f"seed-{seed}" / "decoder"
    limits = {"limits.max-summary-tokens": 64}
    pretrained = train_as_shipped(pretrain_teacher, "pretrain_small.yaml", out / "pretrained", **same, **limits)
    start = train_as_shipped(finetune_teacher, "likelihood_small.yaml", out / "start", model=pretrained, **same)
    return train_as_shipped(finetune_teacher, "finetune_small.yaml", out / "teacher", model=start, **same)


def table_of_seeds(scores: dict[int, list[Path]]) -> str:
    """Each row's NDCG@5 (linear gain) and PNR, the first's deviation over seeds and difference to baseline-few.

    scores: each seed's files of training.evaluate. The interval of a difference draws seeds and queries anew where
    there are several, else queries alone; the p is of a randomisation test of each query's mean over seeds. A row is
    held against the baselines of its own seeds.
    """
    ranked: dict[int, dict[str, JudgedRanking]] = {seed: {} for seed in scores}
    for seed, files in scores.items():
        for rows in map(pq.read_table, files):
            for name in set(rows.column_names) - {"query_id", "doc_id", "grade"}:
                ranked[seed][name] = judged_ranking(rows, rows.column(name).to_numpy())

    def of_seeds(row: str) -> dict[int, NDArray[np.float64]]:
        """The row's NDCG@5 of each query by seed."""
        return {seed: rows[row].ndcg(5) for seed, rows in ranked.items() if row in rows}

    few = of_seeds(FEW)
    lines = [f"| | seeds | NDCG@5 | deviation over seeds | PNR | over {FEW} | p |", "|---|--:|--:|--:|--:|---|--:|"]
    for row in ("bm25", FEW, "clicked", "encoder", "teacher", "student", "decoder"):
        found = of_seeds(row)
        if not found:
            continue
        means = [float(one.mean()) for one in found.values()]
        deviation = f"{np.std(means, ddof=1):.4f}" if len(means) > 1 and row != "bm25" else ""
        against = ("", "") if row == FEW else paired_gain(np.stack([found[seed] - few[seed] for seed in found]))
        trainings = "" if row == "bm25" else str(len(found))
        pnr = np.mean([ranked[seed][row].pairs().pnr for seed in found])
        lines.append(
            "| " + " | ".join([row, trainings, f"{np.mean(means):.4f}", deviation, f"{pnr:.1f}", *against]) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.students.clicks_first --data data/msrd-clicks")
