"""`make demo`: from a click log to an A/B verdict, every stage real; `make demo DATA=PATH LIMIT=400` on your own data.

Each stage is a command of the product that you can run by hand; `flow` below is the whole of it, in order.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clients.ab.router.local_router import start_router
from demo.stages import ROOT, Stages, note, run_program
from demo.summary import summarise
from ranking.errors import InputError
from ranking.program import run
from serving.temporary_server import start_triton

EXPERIMENT = "student-vs-baseline"
ARMS = ("baseline", "student")
SMALL_WORLD = [
    f"--world.{name}={size}"
    for name, size in {
        "documents": 600, "clicked_pairs": 1000, "log_queries": 800, "train_queries": 40, "dev_queries": 20,
        "test_queries": 40, "judged_documents": 12, "unlabelled_queries": 60, "candidates": 12,
    }.items()
]  # fmt: skip


@dataclass
class Config:
    """Run the whole product once: teacher, labels, student, servers, load test, A/B test, report.

    Args:
        data: BEIR folder or prepared dataset folder; the built-in world when left out
        limit: judged train queries used from `data`; other sizes follow from it, so that 400 end within an hour on two
            cores
        out: folder of the run; a second run goes on where the first one stopped
        student_init: checkpoint folder or hub id of a pretrained BERT that baseline and student start from; from
            scratch when left out
        label_queries: unlabelled queries whose candidates the teacher labels, 20 documents each at most
        users: simulated users of the A/B test
        load_seconds: length of the load test of each arm
        smoke: tiny sizes in every stage, to see that the parts fit together; the figures mean nothing
    """

    data: Path | None = None
    limit: int = 400
    out: Path = Path("runs/demo")
    student_init: str = ""
    label_queries: int = 4000
    users: int = 1500
    load_seconds: int = 12
    smoke: bool = False

    def __post_init__(self) -> None:
        if self.smoke:
            self.label_queries, self.users, self.load_seconds = 40, 120, 3
        if self.limit < 20:
            raise ValueError(f"limit is {self.limit}: at least 20 judged queries are needed to train anything")


def flow(config: Config) -> dict[str, Any]:
    """Run every stage that is not finished, in order; returns the run's summary. InputError names a failed command."""
    out, data, repository = config.out, config.out / "data", config.out / "model_repository"
    stages = Stages(out, total=16)
    once = ["--epochs", "1"] if config.smoke else []
    brief = [*once, "--warm-up-epochs", "0", "--size", "tiny-2"] if config.smoke else []
    # a model that has learnt nothing has no ranking to keep: only a smoke run may publish past the gate
    accept = ["--accept-drop"] if config.smoke else []

    source = source_flags(config.data, config.limit, config.smoke)
    stages.run("data", "prepare data", lambda: prepare(source, data), source)
    stages.run("clicks", "click log to click pairs", lambda: click_pairs(data), {"data": config.data})
    stages.program(
        "pretrain", "continued pre-training of the teacher: query in, clicked title and summary out",
        "-m", "training.pretrain_teacher", "--config", "training/configs/pretrain_small.yaml", "--data", data,
        "--out", out / "pretrained", *once, made=out / "pretrained",
    )  # fmt: skip
    stages.program(
        "start", "the teacher's start: its own likelihood becomes its score",
        "-m", "training.finetune_teacher", "--config", "training/configs/likelihood_small.yaml", "--data", data,
        "--model", out / "pretrained", "--out", out / "start", *once, made=out / "start",
    )  # fmt: skip
    stages.program(
        "finetune", "fine-tuning of the teacher with a pairwise rank loss",
        "-m", "training.finetune_teacher", "--config", "training/configs/finetune_small.yaml", "--data", data,
        "--model", out / "start", "--out", out / "teacher", *once, made=out / "teacher",
    )  # fmt: skip
    stages.program(
        "build_teacher", "teacher to a Triton model (backend vllm)",
        "build/build_teacher.py", "--checkpoint", out / "teacher", "--repository", repository,
    )  # fmt: skip
    stages.run(
        "sample", "choosing the pairs to label", lambda: sample(data, config.label_queries), config.label_queries
    )
    stages.run(
        "label", "labelling through tritonserver and vLLM",
        lambda: label(data / "candidates.parquet", repository, out / "labels"), made=out / "labels",
    )  # fmt: skip
    start = ["--init", config.student_init] if config.student_init else []
    stages.program(
        "baseline", "baseline: a small BERT on judgments alone",
        "-m", "training.train_baseline", "--config", "training/configs/baseline_small.yaml", "--data", data,
        "--out", out / "baseline", *start, *brief, made=out / "baseline",
    )  # fmt: skip
    stages.program(
        "student", "student: the same BERT on the teacher's labels",
        "-m", "training.distill_student", "--config", "training/configs/student_small.yaml", "--data", data,
        "--labels", out / "labels", "--teacher", out / "teacher", "--out", out / "student", *start, *brief,
        made=out / "student",
    )  # fmt: skip
    for arm in ARMS:
        stages.program(
            f"build_{arm}", f"{arm} to a Triton model (backend openvino), gated on judged queries",
            "build/build_student.py", "--checkpoint", out / arm, "--name", arm, "--target", "openvino", "--data", data,
            "--repository", repository, *accept,
        )  # fmt: skip
    systems = [f"{name}=checkpoint:{out / name}" for name in ("baseline", "teacher", "student")]
    stages.program(
        "evaluate", "ranking quality on the test queries",
        "-m", "training.evaluate", "--data", data, "--system", "bm25",
        *(word for system in systems for word in ("--system", system)), "--out", out / "evaluation",
    )  # fmt: skip
    stages.run(
        "load", "load test of both arms, open loop",
        lambda: load_test(out, data, repository, config.load_seconds),
    )  # fmt: skip
    stages.run(
        "ab", "A/B test with simulated users",
        lambda: ab_test(out / "ab", data, repository, config.users), config.users, out / "ab",
    )  # fmt: skip
    stages.program(
        "report", "report: who won",
        "clients/ab_report.py", "--events", out / "ab" / "data", "--out", out / "report.html",
        "--planned-users", str(config.users),
    )  # fmt: skip
    return summarise(out, stages, EXPERIMENT)


def source_flags(given: Path | None, limit: int, smoke: bool) -> list[str]:
    """Flags of prepare_data: what it reads, how many queries. given: BEIR or dataset folder; None: the built-in world.

    InputError if the folder is neither.
    """
    if given is None:
        return ["--source", "world", *(SMALL_WORLD if smoke else [])]
    queries = {"train": limit, "dev": limit // 2, "test": limit, "unlabelled": 2 * limit}
    sizes = [word for split, count in queries.items() for word in (f"--{split}-queries", str(count))]
    if (given / "corpus.jsonl").is_file():
        # most train queries give their documents to the teacher without their grades: labels must come from somewhere
        return ["--source", f"beir:{given}", "--judged-fraction", "0.25", "--clicks-from-judgments", *sizes]
    if (given / "dataset.json").is_file():
        return ["--source", f"dataset:{given}", *sizes]
    raise InputError(f"{given}: neither a BEIR folder (corpus.jsonl) nor a prepared dataset (dataset.json)")


def prepare(source: list[str], data: Path) -> None:
    """Write the dataset folder `data`. source: flags of source_flags()."""
    (data / "pool.parquet").unlink(missing_ok=True)  # an older run's pool is not this dataset's
    run_program("-m", "training.prepare_data", *source, "--out", data)


def click_pairs(data: Path) -> None:
    """Make clicks.parquet from the click log. A dataset without a log must have it: its relevant train pairs."""
    log = data / "events.parquet"
    if log.is_file():
        run_program("-m", "training.prepare_clicks", "--events", log, "--out", data / "clicks.parquet")
    elif (data / "clicks.parquet").is_file():
        note("this set has no click log: continued pre-training uses the relevant pairs of the train split")
    else:
        raise InputError(f"{data}: neither a click log nor click pairs")


def sample(data: Path, queries: int) -> None:
    """Replace candidates.parquet by a sample of this many queries; the whole stays beside it as pool.parquet."""
    pool, chosen = data / "pool.parquet", data / "candidates.parquet"
    if not pool.exists():
        chosen.rename(pool)
    judged = [data / "judgments" / f"{split}.parquet" for split in ("dev", "test")]
    run_program(
        "-m", "training.sample_candidates", "--pool", pool, "--out", chosen, "--queries", str(queries),
        "--bands", "10:10,rest:10", *(word for path in judged for word in ("--exclude", path)),
    )  # fmt: skip


def label(candidates: Path, repository: Path, labels: Path) -> None:
    """Have the served teacher score the candidates into the labels folder."""
    note("starting tritonserver with vLLM ...")
    with start_triton(repository, *only("teacher")) as server:
        run_program(
            "clients/label_corpus.py", "--candidates", candidates, "--out", labels,
            "--url", server.grpc, "--teacher", repository / "teacher",
        )  # fmt: skip


def only_arms(*arms: str) -> list[str]:
    """tritonserver flags that load these arms alone: an arm is a front model and its encoder."""
    return only(*(model for arm in arms for model in (arm, f"{arm}_encoder")))


def only(*models: str) -> list[str]:
    """tritonserver flags that load these models alone."""
    return ["--model-control-mode=explicit", *(f"--load-model={model}" for model in models)]


def load_test(out: Path, data: Path, repository: Path, seconds: int) -> dict[str, Any]:
    """Each arm by itself, at a rate that a laptop holds; returns latencies and errors per arm."""
    found = {}
    note("starting tritonserver with both arms ...")
    with start_triton(repository, *only_arms(*ARMS)) as server:
        for arm in ARMS:
            result = out / f"load-{arm}.json"
            run_program(
                "-m", "locust", "-f", "loadtest/", "--headless", "--only-summary", "-u", "8", "-r", "100",
                "-t", f"{seconds}s", "--arms", arm, "--list-sizes", "24", "--data", data, "--grpc-url", server.grpc,
                "--metrics-url", server.metrics, "--json-out", result,
            )  # fmt: skip
            row = json.loads(result.read_text())["arms"][arm]
            found[arm] = {"p50_ms": row["p50_ms"], "p99_ms": row["p99_ms"], "errors": row["failed"] + row["unanswered"]}
    return found


def ab_test(folder: Path, data: Path, repository: Path, users: int) -> None:
    """Simulated users on both arms through the router; the log and its Parquet tables go to `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "experiment.yaml").write_text(experiment_text())
    # an interrupted run must not leave half of its users in the log
    for old in sorted((folder / "log").glob("*.ablog")):
        old.unlink()
    note("starting tritonserver with both arms, and the router ...")
    with (
        start_triton(repository, *only_arms(*ARMS)) as server,
        start_router(folder / "experiment.yaml", server.grpc, folder / "log", "--deadline-ms", "2000") as router,
    ):
        run_program(
            "clients/simulate_traffic.py", "--data", data, "--router", router.url, "--users", str(users),
            "--concurrency", "8",
        )  # fmt: skip
    run_program("clients/ab_compact.py", "--log", folder / "log", "--out", folder / "data")


def experiment_text() -> str:
    """Half of the users on each arm, without guardrails: a demo on a busy laptop must not ramp itself down."""
    definition = {
        "default_model": "baseline",
        "experiments": [
            {
                "name": EXPERIMENT,
                "seed": f"{EXPERIMENT}-1",
                "arms": [{"name": arm, "model": arm, "weight": 0.5} for arm in ARMS],
                "control": "baseline",
            }
        ],
    }
    return yaml.safe_dump(definition, sort_keys=False)


def main(config: Config) -> None:
    """Run the flow and print its summary."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizers' warning about forks helps nobody here
    config.out = config.out if config.out.is_absolute() else ROOT / config.out
    summary = flow(config)
    print(summary["text"])


if __name__ == "__main__":
    run(main, Config, example="python -m demo.run --data ../shared/data/msrd --limit 400 --out runs/msrd")
