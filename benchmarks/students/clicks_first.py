r"""Clicks before judgments, without an LLM: what a log is worth beside a few judged queries.

python -m training.prepare_data --source beir:../shared/data/msrd --out data/msrd-clicks --judged-fraction 0.05 \
    --simulate-clicks baidu --dev-queries 150 --test-queries 500 --unlabelled-queries 1200
python -m benchmarks.students.clicks_first --data data/msrd-clicks --out runs/clicks_first

--data is a dataset folder with a click log, events.parquet, few judged train queries and candidates; the first command
makes one of a judged collection, whose withheld judgments its simulated users click by. Rows, all measured on its test
judgments by training.evaluate; every row after the first is tested against baseline-few:
  baseline-few   MiniLM-L6 on the judged train queries
  bm25           no training
  clicked        MiniLM-L6 on the log alone, corrected for position bias
  encoder        on from there on the judged train queries
  teacher        the encoder blended with the rankers that need no training
  student        distilled from the teacher's labels on from `clicked`, tuned on the judgments
A training that is finished is not run again, and an interrupted one goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.students.runs import train_as_shipped
from ranking.errors import InputError
from ranking.program import run
from training import blend_labels, distill_student, evaluate, prepare_clicks, train_baseline
from training.clicks.click_pairs import ClickPairSettings
from training.clicks.privacy_gate import OPEN_GATE
from training.evaluation.blend import UNTRAINED


@dataclass
class Config:
    """Train and measure rankers on a log and few judgments.

    Args:
        data: dataset folder with events.parquet
        out: folder for click tables, labels, checkpoints and the evaluation
        seed: of every training
    """

    data: Path
    out: Path = Path("runs/clicks_first")
    seed: int = 1


def main(config: Config) -> None:
    """Run what is not finished, then print the table of training.evaluate."""
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
    same = {"data": data, "seed": config.seed}
    few = train_as_shipped(train_baseline, "baseline_minilm.yaml", out / "baseline-few", **same)
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
    systems = [f"checkpoint:{few}", "bm25", f"checkpoint:{clicked}", f"checkpoint:{encoder}"]
    systems += [f"teacher=blend:{labels}", f"checkpoint:{student}"]
    evaluate.main(evaluate.Config(data=data, system=systems, out=out / "evaluation", precision="bfloat16"))


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.students.clicks_first --data data/msrd-clicks")
