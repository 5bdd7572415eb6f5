"""Label a corpus: every (query, title, summary) candidate gets the teacher's score, whatever fails (docs/labelling.md).

    python clients/label_corpus.py --candidates data/world/candidates.parquet --out runs/world/labels --url
    localhost:8001

Exit code: 0 every pair labelled; 3 finished, some pairs are in rejects.parquet; 130 interrupted, run it again to go on;
1 it cannot go on (the line says why; what is finished stays finished).
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Literal

from clients.labelling.candidate_file import CandidateFile, RowRange
from clients.labelling.first_sample import describe_sample, draw_sample, show_scores
from clients.labelling.label_folder import LabelFolder, one_writer
from clients.labelling.label_ranges import Job, find_teacher, label_ranges
from clients.labelling.label_shards import Origin
from clients.labelling.progress_and_metrics import serve_metrics, show
from clients.labelling.run_forecast import forecast, probe
from clients.labelling.served_teacher import checkpoint_folder
from clients.labelling.teacher_endpoint import Patience, TeacherKind
from clients.labelling.work_queue import Tally
from clients.triton.connection import TritonAccess
from ranking.errors import InputError
from ranking.labels import MANIFEST_NAME, load_manifest
from ranking.program import EXIT_INTERRUPTED, run
from ranking.text import TeacherFormat

logger = logging.getLogger("labels")

EXIT_REJECTS = 3


@dataclass
class Config(TritonAccess):
    """Score every candidate with the teacher behind Triton; run it again after any interruption and it goes on.

    Args:
        candidates: candidates.parquet to label, a query's candidates side by side
        out: folder of the label shards; one folder per candidate file and teacher
        url: teacher servers, host:port or grpcs://host:port, separated by commas
        teacher_kind: decoder, served by the vLLM backend, or ranker: any published arm that takes query, title and
            summary and gives scores
        teacher: a decoder's checkpoint folder that the servers were built from, for its tokenizer and text limits; of a
            published model's folder the highest version is taken; a ranker's server needs nothing of it
        model: name of the served model
        in_flight: requests in flight per endpoint; left out, the number is found by trying
        shard_rows: candidate rows per shard; raise it for corpora above 10^8 pairs
        deadline_ms: time that a request may take before it is sent again
        retries: failures of one pair before it goes to the rejects
        give_up_seconds: time without an answer from any endpoint before the run ends; at its start it waits a minute at
            most
        max_refused: share of pairs that the teacher may fail on before the run ends
        retry_rejects: label shards again in which the teacher failed on some pairs
        engine: local labels from this process; ray spreads shards over a Ray cluster
        ray_address: address of the Ray cluster; left out, Ray is started on this machine
        ray_workers: labelling processes of the ray engine
        dry_run: print pairs, tokens, time and cost, and label nothing
        rate: pairs a second for the dry run; left out, it is measured on the servers for a few seconds
        price_per_hour: price of one teacher server's hour, for the dry run
        sample: label only this many pairs, into OUT/sample, and show the scores' distribution
        stratify: draw the sample from all over the file, whole queries, instead of its first rows
        seed: of the stratified sample
        metrics_port: serve Prometheus metrics on this port
        metrics_address: interface of the metrics port; 0.0.0.0 where Prometheus runs on another machine
    """

    candidates: Path
    out: Path
    url: list[str] = field(default_factory=lambda: ["localhost:8001"])
    teacher_kind: TeacherKind = "decoder"
    teacher: Path = Path("model_repository/teacher")
    model: str = "teacher"
    in_flight: int | None = None
    shard_rows: int = 10_000
    deadline_ms: float = 60_000.0
    retries: int = 5
    give_up_seconds: float = 900.0
    max_refused: float = 0.01
    retry_rejects: bool = False
    engine: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    ray_workers: int = 2
    dry_run: bool = False
    rate: float | None = None
    price_per_hour: float | None = None
    sample: int | None = None
    stratify: bool = False
    seed: int = 0
    metrics_port: int | None = None
    metrics_address: str = "127.0.0.1"

    def __post_init__(self) -> None:
        for name in ("in_flight", "shard_rows", "deadline_ms", "give_up_seconds", "ray_workers", "rate", "sample"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be above 0")
        if not 0 <= self.max_refused <= 1:
            raise ValueError(f"--max-refused is {self.max_refused}: a share between 0 and 1 is meant")
        if len(set(self.url)) < len(self.url) or not self.url:
            raise ValueError("--url: name each endpoint once")


class StopSignals:
    """SIGINT and SIGTERM: the first asks to finish the shards in hand, the second leaves at once (a rerun goes on)."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing the shards in hand; once more to leave at once", file=sys.stderr)

    def __call__(self) -> bool:
        """Whether a first signal has come."""
        return self.asked


async def _label_here(job: Job, ranges: list[RowRange], tally: Tally, stopping: Callable[[], bool]) -> None:
    bar = asyncio.create_task(show(tally))
    try:
        await label_ranges(job, ranges, tally, lambda record: None, stopping)
    finally:
        bar.cancel()
        await asyncio.gather(bar, return_exceptions=True)


def label(config: Config, candidates: CandidateFile, out: Path, shard_rows: int) -> int:
    """Bring the folder `out` to completion, or as far as the signals allow. Returns the exit code."""
    stopping = StopSignals()
    with one_writer(out):
        job = make_job(config, candidates, out, shard_rows)
        folder = LabelFolder(out, candidates, job.origin)
        pending = folder.pending(config.retry_rejects)
        tally = Tally(total=candidates.rows, already=candidates.rows - sum(covered.rows for covered in pending))
        if config.metrics_port is not None:
            serve_metrics(tally, config.metrics_port, config.metrics_address)
        started, clock = datetime.now().astimezone(), monotonic()
        try:
            if pending and config.engine == "ray":
                from clients.labelling.ray_engine import label_over_ray  # Ray takes seconds to import

                label_over_ray(job, pending, tally, stopping, config.ray_address, config.ray_workers)
            elif pending:
                asyncio.run(_label_here(job, pending, tally, stopping))
            if pending:
                folder.note_run(started, monotonic() - clock, tally.scored)
            left = folder.pending()
            if left:
                rows = sum(covered.rows for covered in left)
                logger.warning("stopped with %d of %d pairs to label; run again to go on", rows, candidates.rows)
                return EXIT_INTERRUPTED
            counts = folder.finish()["counts"]
        except OSError as problem:
            reason = problem.strerror or problem
            raise InputError(f"{out}: {reason}; finished shards are kept, run again to go on") from problem
    logger.info("%s: %d labels, %d rejects", out, counts["labels"], counts["rejects"])
    return EXIT_REJECTS if counts["rejects"] else 0


def make_job(config: Config, candidates: CandidateFile, out: Path, shard_rows: int) -> Job:
    """Ask the servers who they are, check the local checkpoint against them, and put together what the workers need."""
    credentials = config.credentials()
    wait_seconds = min(config.give_up_seconds, 60.0)
    teacher = asyncio.run(find_teacher(config.url, credentials, config.model, config.teacher_kind, wait_seconds))
    checkpoint = checkpoint_folder(config.teacher)
    teacher.texts(checkpoint)  # a wrong folder must be known before anything is written
    return Job(
        candidates=candidates,
        folder=out,
        origin=Origin.of(candidates, shard_rows, teacher.teacher_id),
        teacher=teacher,
        teacher_folder=checkpoint,
        urls=tuple(config.url),
        credentials=credentials,
        in_flight=config.in_flight,
        patience=Patience(config.deadline_ms, config.retries),
        give_up_seconds=config.give_up_seconds,
        max_refused=config.max_refused,
    )


def label_sample(config: Config, candidates: CandidateFile, size: int) -> int:
    """Label a first slice into OUT/sample and print its scores."""
    folder = config.out / "sample"
    # drawn afresh into a folder of its own, so that a sample of another size or seed does not meet the old one
    folder /= f"{size}-{'seed' + str(config.seed) if config.stratify else 'first'}"
    path = folder / "candidates.parquet"
    draw_sample(candidates, size, config.stratify, config.seed, path)
    drawn = CandidateFile.open(path)
    code = label(config, drawn, folder / "labels", shard_rows=min(config.shard_rows, 1000))
    if code in (0, EXIT_REJECTS):
        print(show_scores(folder / "labels"))
        print(describe_sample(load_manifest(folder / "labels" / MANIFEST_NAME) or {}, candidates.rows))
    return code


def dry_run(config: Config, candidates: CandidateFile) -> int:
    """Print what the run would take. The servers are asked only where --rate does not say how fast they are."""
    rate = config.rate
    if rate is None:
        with tempfile.TemporaryDirectory(prefix="label-probe-") as scratch:
            job = make_job(config, candidates, Path(scratch), shard_rows=min(config.shard_rows, 5000))
            rate = probe(job, Path(scratch), candidates.ranges(job.origin.shard_rows))
    text_format = None
    if config.teacher_kind == "decoder":
        text_format = TeacherFormat.of_checkpoint(checkpoint_folder(config.teacher))
    print(forecast(candidates, text_format, rate, len(config.url), config.price_per_hour))
    return 0


def main(config: Config) -> int:
    """Label, sample or forecast, as the settings say. Returns the exit code."""
    candidates = CandidateFile.open(config.candidates)
    if config.dry_run:
        return dry_run(config, candidates)
    if config.sample is not None:
        return label_sample(config, candidates, config.sample)
    return label(config, candidates, config.out, config.shard_rows)


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python clients/label_corpus.py --candidates data/world/candidates.parquet --out runs/world/labels "
        "--url localhost:8001",
    )
