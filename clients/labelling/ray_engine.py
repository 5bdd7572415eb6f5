"""The same labelling over a Ray cluster: Ray Data hands out row ranges, each worker labels its own and writes their
shards.

Workers read the candidate file and write into the output folder by path, so both lie on storage that every node mounts.
The driver holds the folder's lock and assembles the manifest; what is finished is known by the shards' records alone,
so a run may be begun by one engine and finished by the other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from clients.labelling.candidate_file import RowRange
from clients.labelling.label_ranges import Job, label_ranges
from clients.labelling.progress_and_metrics import progress
from clients.labelling.work_queue import Tally
from ranking.errors import InputError

logger = logging.getLogger("labels")

RANGES_A_CALL = 4  # labelled in one go, so that a worker's window stays full from shard to shard
STOP_NAME = ".stop"  # while it stands in the folder, workers begin no shard


class RangeLabeller:
    """A Ray worker's state: the job. Called with a block of range numbers, it labels them and returns what it did."""

    def __init__(self, job: Job):
        self.job = job

    def __call__(self, block: dict[str, Any]) -> dict[str, list[int]]:
        """Label the ranges of a block. block: index, first_row and rows, each int [ranges]."""
        ranges = [
            RowRange(int(i), int(f), int(n)) for i, f, n in zip(block["index"], block["first_row"], block["rows"])
        ]
        tally = Tally()
        records: list[dict[str, Any]] = []
        stop = self.job.folder / STOP_NAME
        asyncio.run(label_ranges(self.job, ranges, tally, records.append, stop.exists))
        return {
            "shard_rows": [record["rows"] for record in records],
            "labels": [record["labels"] for record in records],
            "refused_input": [sum(cause == "input" for *_, cause, _ in record["rejects"]) for record in records],
            "retries": [tally.retries if number == 0 else 0 for number in range(len(records))],
        }


def label_over_ray(
    job: Job,
    ranges: Sequence[RowRange],
    tally: Tally,
    stopping: Callable[[], bool],
    address: str | None,
    workers: int,
) -> None:
    """Label the ranges with `workers` actors of a cluster, or of a local Ray if address is None.

    InputError if the cluster cannot be reached or a worker fails; finished shards are kept.
    """
    own = not ray.is_initialized()
    if own:
        _connect(address, workers)
    stop = job.folder / STOP_NAME
    stop.unlink(missing_ok=True)
    # actors run elsewhere: relative paths would mean another folder
    job = replace(
        job,
        folder=job.folder.absolute(),
        candidates=replace(job.candidates, path=job.candidates.path.absolute()),
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    items = [{"index": r.index, "first_row": r.first_row, "rows": r.rows} for r in ranges]
    # blocks cut here and not by a repartition, which would wait for the processors that the actors hold
    blocks = ray.data.from_items(items, override_num_blocks=-(-len(ranges) // RANGES_A_CALL))
    done = blocks.map_batches(
        RangeLabeller,
        fn_constructor_args=(job,),
        batch_size=RANGES_A_CALL,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(ranges))),
        num_cpus=1,
    )
    watching = threading.Event()
    watcher = threading.Thread(target=_pass_on, args=(stopping, stop, watching), daemon=True)
    watcher.start()
    try:
        with progress(tally) as redraw:
            for row in done.iter_rows():
                tally.scored += row["labels"]
                tally.refused["input"] += row["refused_input"]
                tally.refused["teacher"] += row["shard_rows"] - row["labels"] - row["refused_input"]
                tally.retries += row["retries"]
                tally.shards += 1
                redraw()
    except ray.exceptions.RayError as problem:
        raise InputError(f"a Ray worker failed: {_last_line(problem)}") from problem
    finally:
        watching.set()
        watcher.join()
        stop.unlink(missing_ok=True)
        if own:
            ray.shutdown()


def _pass_on(stopping: Callable[[], bool], stop: Path, ended: threading.Event) -> None:
    """Tell the workers of a signal as soon as it comes, and not with the next finished block."""
    while not ended.wait(0.2):
        if stopping():
            stop.touch()
            return


def _connect(address: str | None, workers: int) -> None:
    root = str(Path(__file__).parents[2])
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}}
    local: dict[str, Any] = {} if address else {"num_cpus": workers + 1, "include_dashboard": False}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address=address or "local", runtime_env=environment, log_to_driver=False, **local)
    except (ConnectionError, RuntimeError, ValueError) as problem:
        raise InputError(f"no Ray cluster at {address}: {_last_line(problem)}") from problem
    for number, handler in handlers.items():  # Ray puts its own in their place
        signal.signal(number, handler)


def _last_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(problem).__name__
