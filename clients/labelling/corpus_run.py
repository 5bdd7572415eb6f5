"""One run over a corpus, however its teacher is asked: bring a labels folder to completion, with or without a store."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import monotonic

from clients.labelling.candidate_file import CandidateFile, RowRange
from clients.labelling.label_folder import LabelFolder, one_writer
from clients.labelling.label_ranges import Job, label_ranges
from clients.labelling.label_store import LabelStore
from clients.labelling.progress_and_metrics import serve_metrics, show
from clients.labelling.stored_corpus import NEW_FOLDER, fill_folder, find_missing, store_new_labels
from clients.labelling.teacher_endpoint import Patience
from clients.labelling.work_queue import Tally
from ranking.errors import InputError
from ranking.program import EXIT_INTERRUPTED
from ranking.telemetry import TelemetrySettings

logger = logging.getLogger("labels")

EXIT_REJECTS = 3

# (candidates, labels folder, rows a shard) -> the job; asks the teacher who it is
MakeJob = Callable[[CandidateFile, Path, int], Job]
# label these ranges of the job, in this process or elsewhere
LabelRanges = Callable[[Job, Sequence[RowRange], Tally, Callable[[], bool]], None]


@dataclass(kw_only=True)
class RunSettings(TelemetrySettings):
    """Settings of every program that labels a corpus; their Config inherits them.

    Args:
        candidates: candidates.parquet to label, a query's candidates side by side
        out: folder of the label shards; one folder per candidate file and teacher
        store: folder of all labels ever made; what it has is not asked again, what is new goes into it
        shard_rows: candidate rows per shard; raise it for corpora above 10^8 pairs
        deadline_ms: time that a request may take before it is sent again
        retries: failures of one pair before it goes to the rejects
        give_up_seconds: time without an answer from any endpoint before the run ends
        max_refused: share of pairs that the teacher may fail on before the run ends
        retry_rejects: label shards again in which the teacher failed on some pairs
        dry_run: print pairs, tokens, time and cost, and label nothing
        metrics_port: serve Prometheus metrics on this port
        metrics_address: interface of the metrics port; 0.0.0.0 where Prometheus runs on another machine
    """

    candidates: Path
    out: Path
    store: Path | None = None
    shard_rows: int = 10_000
    deadline_ms: float = 60_000.0
    retries: int = 5
    give_up_seconds: float = 900.0
    max_refused: float = 0.01
    retry_rejects: bool = False
    dry_run: bool = False
    metrics_port: int | None = None
    metrics_address: str = "127.0.0.1"

    def __post_init__(self) -> None:
        check_above_zero(self, "shard_rows", "deadline_ms", "give_up_seconds")
        if not 0 <= self.max_refused <= 1:
            raise ValueError(f"--max-refused is {self.max_refused}: a share between 0 and 1 is meant")

    def patience(self) -> Patience:
        """How long and how often a request is tried."""
        return Patience(self.deadline_ms, self.retries)


def check_above_zero(settings: object, *names: str) -> None:
    """ValueError names the first of these settings that is given and not above 0."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be above 0")


class StopSignals:
    """SIGINT and SIGTERM: the first asks to finish the shards in hand, the second leaves at once (a rerun goes on).

    They are caught while the block lasts.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing the shards in hand; once more to leave at once", file=sys.stderr)

    def __call__(self) -> bool:
        """Whether a first signal has come."""
        return self.asked


def label_here(job: Job, ranges: Sequence[RowRange], tally: Tally, stopping: Callable[[], bool]) -> None:
    """Label the ranges in this process, with a progress bar."""
    asyncio.run(_label_with_bar(job, ranges, tally, stopping))


async def _label_with_bar(job: Job, ranges: Sequence[RowRange], tally: Tally, stopping: Callable[[], bool]) -> None:
    bar = asyncio.create_task(show(tally))
    try:
        await label_ranges(job, ranges, tally, lambda record: None, stopping)
    finally:
        bar.cancel()
        await asyncio.gather(bar, return_exceptions=True)


def run_corpus(
    settings: RunSettings,
    candidates: CandidateFile,
    out: Path,
    shard_rows: int,
    make_job: MakeJob,
    label: LabelRanges = label_here,
) -> int:
    """Bring the labels folder `out` to completion, or as far as the signals allow. Returns the exit code."""
    with settings.telemetry("disranker-labeller"), StopSignals() as stopping:
        run = _Run(settings, shard_rows, make_job, label, stopping)
        if settings.store is not None:
            return run.through_store(candidates, out, settings.store)
        return run.complete(candidates, out)


@dataclass(frozen=True)
class _Run:
    """What stays the same while one program run labels a candidates file, with or without a store."""

    settings: RunSettings
    shard_rows: int
    make_job: MakeJob
    label: LabelRanges
    stopping: StopSignals

    def complete(self, candidates: CandidateFile, out: Path) -> int:
        """Ask the teacher for every score that `out` lacks."""
        with one_writer(out):
            job = self.make_job(candidates, out, self.shard_rows)
            folder = LabelFolder(out, candidates, job.origin)
            pending = folder.pending(self.settings.retry_rejects)
            tally = Tally(total=candidates.rows, already=candidates.rows - sum(covered.rows for covered in pending))
            if self.settings.metrics_port is not None:
                serve_metrics(tally, self.settings.metrics_port, self.settings.metrics_address)
            started, clock = datetime.now().astimezone(), monotonic()
            try:
                if pending:
                    self.label(job, pending, tally, self.stopping)
                    folder.note_run(started, monotonic() - clock, tally.scored)
                # a shard whose rejects are tried again has its earlier record until it is labelled anew
                left = folder.pending() or pending[tally.shards :]
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

    def through_store(self, candidates: CandidateFile, out: Path, store_folder: Path) -> int:
        """Label what the store lacks into OUT/new, add it to the store, and fill `out` from the store."""
        with one_writer(out):
            origin = self.make_job(candidates, out, self.shard_rows).origin
            folder = LabelFolder(out, candidates, origin)
            store = LabelStore(store_folder, origin.teacher_id)
            if folder.pending(self.settings.retry_rejects):
                store.check()  # a damaged run joins with other keys and scores, and nobody would notice
                missing = find_missing(store, candidates, out)
                if missing.rows:
                    code = self.complete(missing, out / NEW_FOLDER)
                    if code not in (0, EXIT_REJECTS):
                        return code
                    store_new_labels(store, missing, out)
                fill_folder(store, folder, self.settings.retry_rejects)
            counts = folder.finish()["counts"]
        logger.info("%s: %d labels, %d rejects, out of %s", out, counts["labels"], counts["rejects"], store.folder)
        return EXIT_REJECTS if counts["rejects"] else 0
