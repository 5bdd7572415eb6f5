"""`make demo`: from a click log to an A/B verdict, every stage real; `make demo DATA=PATH LIMIT=400` on your own data.

Each stage is a command of the product that you can run by hand; `flow` below has them in order, those of a decoder as
teacher in decoder_stages.py.
"""

from __future__ import annotations

import gzip
import json
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from clients.ab.router.local_router import start_router
from demo.decoder_stages import train_teacher
from demo.preflight import check_machine, cores, slower_processor
from demo.stages import ROOT, Stages, note, one_run, run_program
from demo.summary import summarise, summarise_refusal
from demo.verdict import reason_not_to_ship
from ranking.errors import InputError
from ranking.pretrained import MINILM
from ranking.program import run
from serving.temporary_server import TritonServer, start_triton
from serving.tritonserver import has_space

EXPERIMENT = "student-vs-baseline"
ARMS = ("baseline", "student")
SCRATCH = "scratch"
EXIT_DO_NOT_SHIP = 3
EXIT_REJECTS = 3  # of the labelling program: finished, some pairs have no score
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
        data: BEIR folder, prepared dataset folder, or table of judgments (CSV, TSV, JSONL, Parquet); the built-in world
            when left out
        limit: judged train queries used from `data`; other sizes follow from it, so that 400 end within half an hour on
            two cores
        columns: names of the columns of a table, as prepare_data takes them: query=search_term,title=product_name
        grades: how its grades become ours, 0 to 4, as prepare_data takes them: Irrelevant=0,Partial=1,Exact=2
        out: folder of the run; a second run goes on where the first one stopped
        student_init: pretrained BERT that baseline and student start from: minilm (of the package), a folder, a hub id,
            or scratch; by default minilm on your own data, scratch on the built-in world
        teacher_init: pretrained decoder that becomes the teacher, a folder or hub id (wants a GPU); left out, your own
            data are labelled by a blend of BM25 and embedding similarity, which needs no training
        label_queries: unlabelled queries whose candidates the teacher labels, 20 documents each at most
        users: simulated users of the A/B test
        load_rate: lists of 24 documents a second in the load test; by default what two cores hold: 8 of the small
            models from scratch, 3 of a MiniLM
        load_seconds: length of the load test of each arm
        smoke: tiny sizes in every stage, to see that the parts fit together; the figures mean nothing
    """

    data: Path | None = None
    limit: int = 400
    columns: list[str] = field(default_factory=list)
    grades: list[str] = field(default_factory=list)
    out: Path = Path("runs/demo")
    student_init: str = ""
    teacher_init: str = ""
    label_queries: int = 4000
    users: int = 1500
    load_rate: int = 0
    load_seconds: int = 12
    smoke: bool = False

    def __post_init__(self) -> None:
        if self.smoke:
            self.label_queries, self.users, self.load_seconds = 40, 120, 3
        if self.limit < 20:
            raise ValueError(f"limit is {self.limit}: at least 20 judged queries are needed to train anything")
        if not self.student_init:
            self.student_init = SCRATCH if self.data is None else MINILM
        if not self.load_rate:
            self.load_rate = 8 if self.student_init == SCRATCH else 3

    @property
    def decoder_teacher(self) -> bool:
        """Whether the teacher is a decoder; else it is the blend, which needs pretrained embeddings alone."""
        return self.data is None or bool(self.teacher_init)

    @property
    def sends_prior(self) -> bool:
        """Whether both arms are published and judged with BM25 as their prior: on your own data.

        The built-in world keeps other words for documents than for queries, so its BM25 has nothing to add.
        """
        return self.data is not None


def flow(config: Config) -> dict[str, Any]:
    """Run every stage that is not finished, in order; returns the run's summary. InputError names a failed command.

    It stops before any model is published if the student does not beat what the user has (demo/verdict.py); the
    summary's `do_not_ship` says why.
    """
    out, data, repository = config.out, config.out / "data", config.out / "model_repository"
    stages = Stages(out, total=16 if config.decoder_teacher else 11)
    # a model that has learnt nothing has no ranking to keep: only a smoke run may publish past the gate
    accept = ["--accept-drop", "--accept-worse", "smoke run"] if config.smoke else []
    prior = ["--callers-send-prior"] if config.sends_prior else []

    source = source_flags(config)
    stages.run("data", "prepare data", lambda: prepare(source, data), source)
    if config.decoder_teacher:
        train_decoder(stages, config)
    stages.run(
        "sample", "choosing the pairs to label", lambda: sample(data, config.label_queries), config.label_queries
    )
    size, start = student_start(config)
    baseline: tuple[str | Path, ...] = (
        "-m", "training.train_baseline", "--config", f"training/configs/baseline_{size}.yaml", "--data", data,
        "--out", out / "baseline", *start,
    )  # fmt: skip
    baseline_title = "baseline: a small BERT on judgments alone"
    if config.decoder_teacher:
        # vLLM's start uses one core of two for most of a minute
        with stages.beside("baseline", baseline_title, *baseline, made=out / "baseline"):
            stages.run(
                "label", "labelling through tritonserver and vLLM",
                lambda: label(data / "candidates.parquet", repository, out / "labels"), made=out / "labels",
            )  # fmt: skip
    else:
        stages.program("baseline", baseline_title, *baseline, made=out / "baseline")
        stages.program(
            "label", "labelling by BM25, embedding similarity and the baseline, weighted by dev judgments",
            "-m", "training.blend_labels", "--data", data, "--out", out / "labels",
            "--ranker+", f"checkpoint:{out / 'baseline'}", made=out / "labels",
        )  # fmt: skip
    teacher: list[str | Path] = ["--teacher", out / "teacher"] if config.decoder_teacher else []
    stages.program(
        "student", "student: the same BERT on the teacher's labels",
        "-m", "training.distill_student", "--config", f"training/configs/student_{size}.yaml", "--data", data,
        "--labels", out / "labels", *teacher, "--out", out / "student", *start, made=out / "student",
    )  # fmt: skip
    teacher_row = f"checkpoint:{out / 'teacher'}" if config.decoder_teacher else f"blend:{out / 'labels'}"
    systems = [
        f"baseline=checkpoint:{out / 'baseline'}",
        f"teacher={teacher_row}",
        f"student=checkpoint:{out / 'student'}",
        *(f"{arm} + bm25=prior:{out / arm}" for arm in ARMS),
    ]
    stages.program(
        "evaluate", "ranking quality on the test queries",
        "-m", "training.evaluate", "--data", data, "--system", "bm25",
        *(word for system in systems for word in ("--system", system)), "--precision", "auto",
        "--out", out / "evaluation",
    )  # fmt: skip
    reason = "" if config.smoke else reason_not_to_ship(out / "evaluation", with_prior=config.sends_prior)
    if reason:
        return summarise_refusal(out, stages, reason)
    for arm in ARMS:
        control = ["--accept-worse", "control arm of the demo's A/B test"] if arm == "baseline" else []
        stages.program(
            f"build_{arm}", f"{arm} to a Triton model (backend openvino), gated on judged queries",
            "build/build_student.py", "--checkpoint", out / arm, "--name", arm, "--target", "openvino", "--data", data,
            "--repository", repository, "--serves-now", "none" if arm == "baseline" else "baseline",
            *prior, *(accept or control),
        )  # fmt: skip
    with ExitStack() as running:

        @cache
        def arms() -> TritonServer:
            """The server of both arms, started by the stage that needs it first."""
            note("starting tritonserver with both arms ...")
            return running.enter_context(start_triton(repository, *only_arms(*ARMS)))

        stages.run(
            "load", "load test of both arms, open loop",
            lambda: load_test(out, data, arms(), config.load_rate, config.load_seconds), config.load_rate,
        )  # fmt: skip
        stages.run(
            "ab", "A/B test with simulated users",
            lambda: ab_test(out / "ab", data, arms(), config.users, config.sends_prior), config.users, out / "ab",
        )  # fmt: skip
    stages.program(
        "report", "report: who won",
        "clients/ab_report.py", "--events", out / "ab" / "data", "--out", out / "report.html",
        "--planned-users", str(config.users),
    )  # fmt: skip
    return summarise(out, stages, EXPERIMENT)


def train_decoder(stages: Stages, config: Config) -> None:
    """The stages of a teacher that is a decoder: from scratch on the built-in world, else from --teacher-init."""
    out, data = config.out, config.out / "data"
    once = ["--epochs", "1"] if config.smoke else []
    size = "0.5b_24gb" if config.teacher_init else "small"
    init = ["--model", config.teacher_init] if config.teacher_init else []
    # a pretrained decoder's likelihood is a start after one pass at fine-tuning's own settings
    start = ["finetune_0.5b_24gb", "--loss", "likelihood", "--epochs", "1"] if init else ["likelihood_small", *once]
    stages.run("clicks", "click log to click pairs", lambda: click_pairs(data), {"data": config.data})
    train_teacher(stages, data, out, size=size, start=start, init=init, once=once)
    stages.program(
        "build_teacher", "teacher to a Triton model (backend vllm)",
        "build/build_teacher.py", "--checkpoint", out / "teacher", "--repository", out / "model_repository",
    )  # fmt: skip


def student_start(config: Config) -> tuple[str, list[str]]:
    """Which configurations baseline and student train by, and the flags of their start."""
    if config.student_init == SCRATCH:
        return "small", ["--epochs", "1", "--warm-up-epochs", "0", "--size", "tiny-2"] if config.smoke else []
    return "minilm", ["--init", config.student_init, *(["--epochs", "0.2"] if config.smoke else [])]


def source_flags(config: Config) -> list[str]:
    """Flags of prepare_data: what it reads, how many queries. InputError if `data` is nothing that it reads."""
    given, limit = config.data, config.limit
    if given is None:
        return ["--source", "world", *(SMALL_WORLD if config.smoke else [])]
    if not given.exists():
        raise InputError(f"{given}: no such file or folder")
    queries = {"train": limit, "dev": limit // 2, "test": limit, "unlabelled": 2 * limit}
    flags = [word for split, count in queries.items() for word in (f"--{split}-queries", str(count))]
    # real tables have a few rows without a query or a title; a first try goes on without them and says how many
    flags += ["--on-bad-row", "reject"]
    for name in ("columns", "grades"):
        if words := getattr(config, name):
            flags += [f"--{name}", ",".join(words)]
    if (given / "dataset.json").is_file():
        return ["--source", f"dataset:{given}", *flags]
    if config.decoder_teacher:
        flags.append("--clicks-from-judgments")
    # a set without splits of its own, or judged for the test alone as most public ones are: enough queries to the test
    flags += ["--dev-fraction", "0.2", "--test-fraction", "0.4"]
    if any((given / f"corpus.jsonl{end}").is_file() for end in ("", ".gz")):
        # most train queries give their documents to the teacher without their grades: labels must come from somewhere
        flags += ["--judged-fraction", "0.25"]
        if judges_relevant_alone(given / "qrels"):
            flags += ["--negatives", "20"]
        if not any(path.name.startswith("train.") for path in _qrels(given / "qrels")):
            flags.append("--resplit")
        return ["--source", f"beir:{given}", *flags]
    if given.is_file() or next(given.rglob("*.parquet"), None) is not None:
        return ["--source", f"table:{given}", *flags]
    raise InputError(
        f"{given}: not a BEIR folder (corpus.jsonl), a prepared dataset (dataset.json) or a table of judgments"
    )


def judges_relevant_alone(qrels: Path) -> bool:
    """Whether most queries of a BEIR folder have no document judged irrelevant: there is nothing to rank then."""
    queries: set[str] = set()
    with_irrelevant: set[str] = set()
    for path in _qrels(qrels):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            # query first and grade last: in BEIR's .tsv, whose first line names the columns, and in TREC's four columns
            rows = [line.split() for line in file.read().decode("utf-8", "replace").splitlines()]
        for query, *_, grade in (row for row in rows[".tsv" in path.suffixes :] if len(row) > 2):
            queries.add(query)
            if grade in ("0", "-1", "0.0"):
                with_irrelevant.add(query)
    return 2 * len(with_irrelevant) < len(queries)


def _qrels(folder: Path) -> list[Path]:
    """The files of judgments that prepare_data reads there."""
    return sorted(path for path in folder.glob("*.*") if {".tsv", ".qrels"} & set(path.suffixes))


def prepare(source: list[str], data: Path) -> None:
    """Write the dataset folder `data`. source: flags of source_flags()."""
    (data / "pool.parquet").unlink(missing_ok=True)  # an older run's pool is not this dataset's
    run_program("-m", "training.prepare_data", *source, "--out", data)
    counts = json.loads((data / "dataset.json").read_text(encoding="utf-8")).get("counts", {})
    if rejected := counts.get("rejected_rows", 0):
        note(f"{rejected:,} bad rows were left out; {data / 'rejects.tsv'} has each with its reason")


def click_pairs(data: Path) -> None:
    """Make clicks.parquet from the click log. A dataset without a log must have it: its relevant train pairs."""
    log = data / "events.parquet"
    if log.is_file():
        run_program(
            "-m", "training.prepare_clicks", "--events", log, "--out", data / "clicks.parquet",
            # only the built-in world has such a log, and its users are simulated: there is nobody to protect
            "--privacy.min-users", "1", "--privacy.personal-data", "keep", "--privacy.max-user-clicks", "0",
        )  # fmt: skip
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
    with start_triton(repository, *only("teacher"), timeout_seconds=900) as server:  # vLLM, on a busy machine
        run_program(
            "clients/label_corpus.py", "--candidates", candidates, "--out", labels,
            "--url", server.grpc, "--teacher", repository / "teacher",
            accept=(0, EXIT_REJECTS),  # a pair that the teacher refuses is refused at every run
        )  # fmt: skip


def only_arms(*arms: str) -> list[str]:
    """tritonserver flags that load these arms alone: an arm is a front model and its encoder."""
    return only(*(model for arm in arms for model in (arm, f"{arm}_encoder")))


def only(*models: str) -> list[str]:
    """tritonserver flags that load these models alone."""
    return ["--model-control-mode=explicit", *(f"--load-model={model}" for model in models)]


def load_test(out: Path, data: Path, server: TritonServer, rate: int, seconds: int) -> dict[str, Any]:
    """Each arm by itself, `rate` lists of 24 a second for `seconds`; returns latencies and errors per arm."""
    found = {}
    for arm in ARMS:
        result = out / f"load-{arm}.json"
        result.unlink(missing_ok=True)  # of an interrupted run
        run_program(
            "-m", "locust", "-f", "loadtest/", "--headless", "--only-summary", "-u", str(rate), "-r", "100",
            "-t", f"{seconds}s", "--arms", arm, "--list-sizes", "24", "--data", data, "--grpc-url", server.grpc,
            "--metrics-url", server.metrics, "--json-out", result,
            accept=(0, 1),  # 1: requests failed, as on a machine too busy for the rate; the summary counts them
        )  # fmt: skip
        row = json.loads(result.read_text())["arms"][arm]
        found[arm] = {"p50_ms": row["p50_ms"], "p99_ms": row["p99_ms"], "errors": row["failed"] + row["unanswered"]}
    return found


def ab_test(folder: Path, data: Path, server: TritonServer, users: int, sends_prior: bool) -> None:
    """Simulated users on both arms through the router; the log and its Parquet tables go to `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "experiment.yaml").write_text(experiment_text())
    # an interrupted run must not leave half of its users in the log
    for old in sorted((folder / "log").glob("*.ablog")):
        old.unlink()
    note("starting the router ...")
    with start_router(folder / "experiment.yaml", server.grpc, folder / "log", "--deadline-ms", "2000") as router:
        run_program(
            "clients/simulate_traffic.py", "--data", data, "--router", router.url, "--users", str(users),
            "--concurrency", "8", *(["--send-prior"] if sends_prior else []),
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


def main(config: Config) -> int:
    """Run the flow and print its summary. Returns 3 if the student should not be shipped."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizers' warning about forks helps nobody here
    config.out = config.out if config.out.is_absolute() else ROOT / config.out
    if config.data is not None and not config.data.is_absolute():  # the stages' programs run in ROOT, not here
        config.data = Path(os.path.relpath(config.data, ROOT))
    if has_space(os.path.relpath(config.out, ROOT)):
        raise InputError(f"{config.out}: tritonserver takes no path with white space: give another OUT=")
    check_machine(config.out, config.decoder_teacher)
    about = "12 minutes" if config.data is None else "half an hour for LIMIT=400"
    print(
        f"Two free cores need about {about}; this machine has {cores()}. Every stage is a command that you can run by "
        f"hand; its output goes to {config.out / 'logs'}. Interrupted, the same command goes on from there.\n"
    )
    if slower := slower_processor():
        print(slower + "\n")
    with one_run(config.out):
        summary = flow(config)
    print(summary["text"])
    return EXIT_DO_NOT_SHIP if "do_not_ship" in summary else 0


if __name__ == "__main__":
    run(main, Config, example="python -m demo.run --data ../shared/data/msrd --limit 400 --out runs/msrd")
