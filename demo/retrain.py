"""From new clicks to the next A/B test in one command (docs/retraining.md).

python -m demo.retrain --log runs/ab/data --since 2026-11-14 --data runs/demo/data --student runs/demo/student \
    --repository runs/demo/model_repository --pretrained runs/demo/pretrained --out runs/retrain

Each stage is a command of the product. A stage that is done is not run again, so an interrupted run goes on. It stops
at a gate with the reason: too little was clicked, the teacher or the student got worse, the student failed on replayed
pages.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from build.publication_settings import check_model_name
from demo.decoder_stages import train_teacher
from demo.run import only, only_arms
from demo.stages import ROOT, ProgramFailed, Stages, note, one_run, run_program
from ranking.card import CARD_NAME, ScoreCard, fingerprint
from ranking.errors import InputError, Refused
from ranking.files import write_json, write_text
from ranking.program import run
from ranking.schema import TABLES, read_table, write_table
from serving.temporary_server import start_triton

EXIT_STOPPED = 3
EXIT_REJECTS = 3  # of the labelling program: finished, some pairs have no score
EXIT_REPLAY_FAILED = 3  # of the replay: too many pages failed or were slow
NDCG = "ndcg@5"
TEACHER_STAGES = {"renew": 3, "clicks": 1, "keep": 0}


class Stopped(InputError):
    """A gate refused: nothing is broken, and a person has to decide."""


@dataclass
class Config:
    """Retrain on what was clicked since a day, and write the experiment that tries the result.

    Args:
        log: folder of ab_compact: events and exposures by day
        data: dataset folder with judgments and candidates that the serving student was trained on
        student: checkpoint of the serving student, which the new one starts from
        repository: model repository that serves; the new student is published there, and not promoted over it
        out: folder of this run; a second run goes on where the first one stopped
        since: first UTC day of the log that is learnt from, as 2026-11-14; all of it when left out
        until: last such day; without it a day that arrives while the run is interrupted starts it afresh
        teacher: "renew": continue the decoder's pre-training and fine-tune it again; "clicks": a BERT ranker goes on
            learning from what the log showed and what was clicked, for teams without a GPU; "keep": label new pairs
            alone, by the teacher that is in the repository
        pretrained: checkpoint of stage 1 that "renew" continues
        last_teacher: the last teacher's checkpoint, which a new one must not be worse than; "clicks" goes on from it,
            or from the serving student where there is none
        teacher_model: the teacher's Triton model in the repository
        teacher_kind: decoder, served by vLLM, or ranker: a published arm
        store: label store: pairs that this teacher has labelled before are not asked again
        arm: name of the new arm and its Triton model; another one for each run, since a test may go on with the last
        serving_arm: arm that serves now, the control of the experiment
        student_config: settings of the student's training
        teacher_size: which settings of training/configs the stages of "renew" take: small or 0.5b_24gb
        teacher_config: settings of the training of "clicks"
        label_queries: queries of the log whose documents are labelled, the most clicked first
        min_pairs: new click pairs below which nothing is trained
        teacher_tolerance: NDCG@5 on dev that a new teacher may lose against the last one
        replay_pages: logged pages that the new student must answer before anybody sees it
        replay_deadline_ms: time of such a page
        coverage: share of users in the experiment that is written
        accept_worse: publish the student although it is worse; the reason, kept in its manifest
        click_flags: further flags of prepare_clicks in one text, such as "--privacy.min-users 3 --dwell-seconds 10"
        gate_flags: further flags of build_student.py in one text, such as "--gate-queries 400"
    """

    log: Path
    data: Path
    student: Path
    repository: Path
    out: Path
    since: str = ""
    until: str = ""
    teacher: Literal["renew", "clicks", "keep"] = "renew"
    pretrained: Path | None = None
    last_teacher: Path | None = None
    teacher_model: str = "teacher"
    teacher_kind: Literal["decoder", "ranker"] = "decoder"
    store: Path = Path("runs/label_store")
    arm: str = "student_next"
    serving_arm: str = "student"
    student_config: str = "training/configs/student_minilm.yaml"
    teacher_size: Literal["small", "0.5b_24gb"] = "small"
    teacher_config: str = "training/configs/baseline_clicks_minilm.yaml"
    label_queries: int = 2000
    min_pairs: int = 200
    teacher_tolerance: float = 0.01
    replay_pages: int = 500
    replay_deadline_ms: float = 200.0
    coverage: float = 0.05
    accept_worse: str = ""
    click_flags: str = ""
    gate_flags: str = ""

    def __post_init__(self) -> None:
        for name in ("since", "until"):
            if day := getattr(self, name):
                setattr(self, name, date.fromisoformat(day).isoformat())  # days are compared as they name their files
        if self.teacher == "renew" and self.pretrained is None:
            raise ValueError("pretrained: the checkpoint of stage 1 is needed to renew the teacher; or --teacher keep")
        check_model_name(self.arm)
        check_model_name(self.teacher_model)
        if self.arm == self.serving_arm:
            raise ValueError(f"arm is {self.arm}: another name than the serving arm's is needed for an A/B test")
        if not 0 < self.coverage <= 1:
            raise ValueError(f"coverage is {self.coverage}: a share of users above 0 and up to 1 is needed")


def flow(config: Config) -> dict[str, Any]:
    """Every stage that is not finished, in order; returns what the summary says. Stopped at a gate that refuses."""
    refuse_taken_arm(config)  # before hours of training
    out = config.out
    stages = Stages(out, total=7 + TEACHER_STAGES[config.teacher])
    clicks = learn(stages, config, lambda: label(config))
    refuse_taken_arm(config)  # of this --out, but trained anew since it was published
    accept = ["--accept-worse", config.accept_worse] if config.accept_worse else []
    with gate(Refused.exit_code):
        stages.program(
            "gate", "the gate, against what serves now",
            "build/build_student.py", "--checkpoint", out / "student", "--name", config.arm, "--target", "openvino",
            "--data", out / "data", "--repository", config.repository, "--serves-now", config.serving_arm, *accept,
            *config.gate_flags.split(),
        )  # fmt: skip
    replay = stages.run(
        "replay", f"{config.replay_pages} logged pages in the shadow", lambda: replayed(config),
        [config.replay_pages, config.replay_deadline_ms, config.log],
    )  # fmt: skip
    experiment = out / "experiment.yaml"
    write_text(experiment, experiment_text(config))
    return {"clicks": clicks, "replay": replay, "experiment": str(experiment)}


@contextmanager
def gate(refused: int) -> Iterator[None]:
    """Stopped if a command of the block ends with the exit code by which it refuses; another failure stays one."""
    try:
        yield
    except ProgramFailed as problem:
        if problem.code == refused:
            raise Stopped(str(problem)) from problem
        raise


def refuse_taken_arm(config: Config) -> None:
    """Stopped if the repository has versions of the arm that are not of this run's student.

    A test of an earlier run may be going on with them: what is published beside them would serve its users. InputError
    if it has none of the arm that serves, which the new one is compared with.
    """
    if not any((config.repository / config.serving_arm).glob("[0-9]*")):
        raise InputError(f"--serving-arm {config.serving_arm}: {config.repository} has no version of it")
    made = config.out / "student"
    own = {fingerprint(made)} if (made / CARD_NAME).is_file() else set()
    published = sorted((config.repository / config.arm).glob("[0-9]*/manifest.json"))
    known = {json.loads(path.read_text(encoding="utf-8"))["checkpoint"]["fingerprint"] for path in published}
    if known - own:
        raise Stopped(
            f"stopped: {config.repository / config.arm} holds another student than {made}, and a test may be going on "
            "with it: give the new one a name of its own (--arm; nothing is trained again), and name the arm that "
            "serves now (--serving-arm)"
        )


def learn(stages: Stages, config: Config, label_candidates: Callable[[], None]) -> dict[str, Any]:
    """From the log to a new student in out/student; returns the counts of clicks. Stopped at a gate that refuses.

    label_candidates: writes out/labels, the labels folder of out/data/candidates.parquet.
    """
    out, data = config.out, config.out / "data"
    files = days_of(config.log, config.since, config.until)
    days = [stamp(config.log / "events" / name) for name in files]
    stages.run("log", f"{len(files)} days of the log", lambda: link_days(config.log, files, out / "log"), days)
    judged = stamp(config.data / "dataset.json")
    clicks = stages.run(
        "clicks", "new clicks, through the privacy gate", lambda: new_clicks(config), [config.click_flags, judged]
    )
    if clicks["pairs"] < config.min_pairs:
        raise Stopped(
            f"stopped: {clicks['pairs']} new click pairs, {config.min_pairs} are needed (--min-pairs); nothing changed"
        )
    candidates = stamp(config.data / "candidates.parquet")
    stages.run("data", "old candidates and new ones", lambda: merge(config), [config.label_queries, candidates])
    if config.teacher == "renew":
        renew_teacher(stages, config)
    elif config.teacher == "clicks":
        stages.program(
            "teacher", "the ranker that labels, on what was shown and clicked",
            "-m", "training.train_baseline", "--config", config.teacher_config, "--learn-from", "clicks",
            "--data", data, "--init", config.last_teacher or config.student, "--out", out / "teacher",
            made=out / "teacher",
        )  # fmt: skip
    if config.teacher != "keep":
        refuse_worse_teacher(config)
    teacher = [config.repository, config.teacher_model, config.teacher_kind, config.store]
    stages.run("label", "labels of what the store lacks", label_candidates, teacher, made=out / "labels")
    stages.program(
        "student", "the student, started from the serving one",
        "-m", "training.distill_student", "--config", config.student_config, "--data", data, "--labels", out / "labels",
        "--init", config.student, "--out", out / "student", made=out / "student",
    )  # fmt: skip
    return clicks


def stamp(file: Path) -> list[str | int]:
    """What tells a file from another one and from what it was before: path, bytes, time of its last change."""
    state = file.stat() if file.is_file() else None
    return [str(file), state.st_size, state.st_mtime_ns] if state else [str(file)]


def days_of(log: Path, since: str, until: str = "") -> list[str]:
    """Names of the log's day files from one day to another, both included. Stopped if there is none."""
    found = sorted(file.name for file in (log / "events").glob("*.parquet"))
    files = [name for name in found if name[:10] >= since and (not until or name[:10] <= until)]
    if not files:
        span = f"{f' since {since}' if since else ''}{f' until {until}' if until else ''}"
        raise Stopped(f"stopped: {log / 'events'}: no day{span}; run ab_compact.py first")
    return files


def link_days(log: Path, files: list[str], folder: Path) -> None:
    """Link the days' events, and exposures where there are any, into a folder that looks like the log."""
    shutil.rmtree(folder, ignore_errors=True)
    for table in ("events", "exposures"):
        for name in files:
            if (source := (log / table / name).absolute()).is_file():
                (folder / table).mkdir(parents=True, exist_ok=True)
                (folder / table / name).symlink_to(source)


def new_clicks(config: Config) -> dict[str, Any]:
    """Click pairs and shown documents of the days; dev and test queries of the dataset stay out."""
    data = config.out / "data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    shutil.copytree(config.data / "judgments", data / "judgments")
    run_program(
        "-m", "training.prepare_clicks", "--events", config.out / "log" / "events", "--out", data / "clicks.parquet",
        "--shown-documents", data / "shown_documents.parquet", *config.click_flags.split(),
    )  # fmt: skip
    report = json.loads((data / "clicks.report.json").read_text(encoding="utf-8"))
    return {"pairs": report["clicks"], "rare_queries": report["privacy"]["rare_queries"]}


def merge(config: Config) -> dict[str, Any]:
    """Write the run's candidates: the dataset's own, so that nothing is unlearnt, and what clicked queries showed.

    A query that the dataset knows joins again once the log showed documents for it that the dataset lacks: its words
    may have come to mean something else.
    """
    data = config.out / "data"
    old = read_table(config.data / "candidates.parquet", "candidates")
    file = data / "shown_documents.parquet"
    shown = read_table(file, "shown_documents")
    pairs = old.select(["query", "doc_id"]).group_by(["query", "doc_id"]).aggregate([])
    unlabelled = shown.join(pairs, ["query", "doc_id"], join_type="left anti").column("query").combine_chunks()
    rows = shown.filter(pc.is_in(shown.column("query"), value_set=unlabelled))
    chosen = (
        rows.group_by("query")
        .aggregate([("clicks", "sum")])
        .sort_by([("clicks_sum", "descending"), ("query", "ascending")])
        .column("query")
        .slice(0, config.label_queries)
        .combine_chunks()
    )
    known = pc.sum(pc.is_in(chosen, value_set=old.column("query").combine_chunks())).as_py() or 0
    rows = rows.filter(pc.is_in(rows.column("query"), value_set=chosen)).sort_by([("query", "ascending")])
    # each run's groups have names of their own, since a query may join in several runs
    prefix = f"log:{fingerprint(file, config.data / 'candidates.parquet')[:8]}"
    ids = pc.binary_join_element_wise(pa.scalar(prefix), rows.column("query"), ":")
    new = pa.table(
        [ids, *(rows.column(name) for name in ("doc_id", "query", "title", "summary"))],
        names=TABLES["candidates"].schema.names,
    ).cast(TABLES["candidates"].schema)
    write_table(data / "candidates.parquet", "candidates", pa.concat_tables([old, new]))
    return {
        "old_pairs": len(old), "new_pairs": len(new), "new_queries": len(chosen) - known, "known_queries": known,
    }  # fmt: skip


def renew_teacher(stages: Stages, config: Config) -> None:
    """Continue stage 1 on the new clicks and fine-tune again."""
    out, data, size = config.out, config.out / "data", config.teacher_size
    start = ["likelihood_small"] if size == "small" else [f"finetune_{size}", "--loss", "likelihood", "--epochs", "1"]
    assert config.pretrained is not None, "__post_init__ has checked it"
    init = ["--from-scratch=", "--model", str(config.pretrained)]
    train_teacher(stages, data, out, size=size, start=start, init=init, once=[])


def refuse_worse_teacher(config: Config) -> None:
    """Stopped if the new teacher's NDCG@5 on dev is further below the last one's than may be."""
    if config.last_teacher is None:
        return
    new, last = (ScoreCard.load(folder).metrics.get(NDCG) for folder in (config.out / "teacher", config.last_teacher))
    if new is not None and last is not None and new < last - config.teacher_tolerance:
        raise Stopped(
            f"stopped: the new teacher's {NDCG} on dev is {new:.4f}, the last one's {last:.4f}, and "
            f"{config.teacher_tolerance:g} may be lost; --teacher keep labels with the last one"
        )


def label(config: Config) -> None:
    """Label the candidates by the served teacher, through the store; a new one is built for Triton first."""
    name, models, kind = config.teacher_model, config.repository, config.teacher_kind
    teacher, built = config.out / "teacher", config.out / "model_repository"
    if config.teacher != "keep":  # of an interrupted labelling, maybe by a teacher of the other kind
        shutil.rmtree(built, ignore_errors=True)
    if config.teacher == "renew":
        models, kind = built, "decoder"
        run_program("build/build_teacher.py", "--checkpoint", teacher, "--name", name, "--repository", models)
    elif config.teacher == "clicks":
        models, kind = built, "ranker"
        run_program(
            "build/build_student.py", "--checkpoint", teacher, "--name", name, "--target", "openvino",
            "--repository", models, "--data", config.out / "data", "--serves-now", "none",
            "--accept-worse", "it labels and serves nobody",
        )  # fmt: skip
    flags = only_arms(name) if kind == "ranker" else only(name)
    note(f"starting tritonserver with {name} ...")
    with start_triton(models, *flags) as server:
        run_program(
            "clients/label_corpus.py", "--candidates", config.out / "data" / "candidates.parquet",
            "--out", config.out / "labels", "--store", config.store, "--url", server.grpc, "--model", name,
            "--teacher", models / name, "--teacher-kind", kind,
            accept=(0, EXIT_REJECTS),  # a pair that the teacher refuses is refused at every run
        )  # fmt: skip


def replayed(config: Config) -> dict[str, Any]:
    """Send logged pages to the new student. Stopped if too many of them fail."""
    scores = config.out / "replay.parquet"
    note(f"starting tritonserver with {config.arm} ...")
    with start_triton(config.repository, *only_arms(config.arm)) as server, gate(EXIT_REPLAY_FAILED):
        run_program(
            "-m", "clients.ab.forecast.replay_pages", "--data", config.log, "--model", config.arm, "--out", scores,
            "--url", server.grpc, "--pages", str(config.replay_pages),
            "--deadline-ms", str(config.replay_deadline_ms),
        )  # fmt: skip
    return json.loads(scores.with_suffix(".report.json").read_text(encoding="utf-8"))


def experiment_text(config: Config) -> str:
    """The A/B test of the new arm: few users at first, guardrails that cut them by themselves.

    The student's fingerprint is in its name: the report must never add up two students under one name.
    """
    name = f"{config.arm}-{config.since or 'all'}-{fingerprint(config.out / 'student')[:6]}"
    definition = {
        "default_model": config.serving_arm,
        "experiments": [
            {
                "name": name,
                "seed": name,
                "coverage": config.coverage,
                "arms": [{"name": arm, "model": arm, "weight": 0.5} for arm in (config.serving_arm, config.arm)],
                "control": config.serving_arm,
                "shadow": 0.01,
                "guardrails": {"max_error_share": 0.05, "max_p99_ms": config.replay_deadline_ms, "min_pages": 200},
            }
        ],
    }
    ramp = "# Raise `coverage` as the report stays clean: 0.05, 0.2, 0.5, 1.0. Nobody changes arm by that.\n"
    return ramp + yaml.safe_dump(definition, sort_keys=False)


def main(config: Config) -> int:
    """Run the flow and say what comes next; at a gate that refuses, say why. Returns the exit code.

    InputError if something is not there, or a stage fails.
    """
    for name in ("log", "data", "student", "repository", "out", "pretrained", "last_teacher", "store"):
        if (path := getattr(config, name)) is not None and not path.is_absolute():
            setattr(config, name, ROOT / path)
    for name in ("log", "data", "student", "pretrained", "last_teacher", "repository"):
        path = getattr(config, name)
        if path is not None and config.out.resolve() in (path.resolve(), *path.resolve().parents):
            raise InputError(f"--{name} {path} lies in --out, where what is made anew is removed: name another --out")
        if path is not None and not path.is_dir():  # some are first read after hours
            raise InputError(f"--{name.replace('_', '-')} {path}: no such folder")
    with one_run(config.out):
        return _run(config)


def _run(config: Config) -> int:
    try:
        found = flow(config)
    except Stopped as problem:
        write_json(config.out / "summary.json", {"stopped": str(problem)})
        print(problem)
        return EXIT_STOPPED
    except InputError as problem:
        write_json(config.out / "summary.json", {"failed": str(problem)})
        raise
    write_json(config.out / "summary.json", found)
    print(
        f"{config.arm} is published beside {config.serving_arm}: promote nothing, give the router "
        f"{found['experiment']} and read clients/ab_report.py after its planned users"
    )
    return 0


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m demo.retrain --log runs/demo/ab/data --data runs/demo/data --student runs/demo/student "
        "--repository runs/demo/model_repository --pretrained runs/demo/pretrained --out runs/retrain",
    )
