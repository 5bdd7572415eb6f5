"""Label a corpus: every (query, title, summary) candidate gets the teacher's score, whatever fails (docs/labelling.md).

    python clients/label_corpus.py --candidates data/world/candidates.parquet --out runs/world/labels --url
    localhost:8001

Exit code: 0 every pair labelled; 3 finished, some pairs are in rejects.parquet; 130 interrupted, run it again to go on;
1 it cannot go on (the line says why; what is finished stays finished).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from clients.labelling.candidate_file import CandidateFile, RowRange
from clients.labelling.corpus_run import EXIT_REJECTS, RunSettings, check_above_zero, label_here, run_corpus
from clients.labelling.first_sample import describe_sample, draw_sample, show_scores
from clients.labelling.label_ranges import Job, StreamedTeacher, find_teacher
from clients.labelling.label_shards import Origin
from clients.labelling.run_forecast import forecast, probe
from clients.labelling.served_teacher import checkpoint_folder
from clients.labelling.teacher_endpoint import TeacherKind
from clients.labelling.work_queue import Tally
from clients.triton.connection import TritonAccess
from ranking.labels import MANIFEST_NAME, load_manifest
from ranking.program import run
from ranking.reranker_prompts import format_of_teacher


@dataclass(kw_only=True)
class Config(RunSettings, TritonAccess):
    """Score every candidate with the teacher behind Triton; run it again after any interruption and it goes on.

    Args:
        url: teacher servers, host:port or grpcs://host:port, separated by commas
        teacher_kind: decoder, served by the vLLM backend, or ranker: any published arm that takes query, title and
            summary and gives scores
        teacher: a decoder's checkpoint folder that the servers were built from, for its tokenizer and text limits; of a
            published model's folder the highest version is taken; a ranker's server needs nothing of it
        model: name of the served model
        in_flight: pairs in flight per endpoint; left out, the number is found by trying
        engine: local labels from this process; ray spreads shards over a Ray cluster
        ray_address: address of the Ray cluster; left out, Ray is started on this machine
        ray_workers: labelling processes of the ray engine
        rate: pairs a second for the dry run; left out, it is measured on the servers for a few seconds
        price_per_hour: price of one teacher server's hour, for the dry run
        sample: label only this many pairs, into OUT/sample, and show the scores' distribution
        stratify: draw the sample from all over the file, whole queries, instead of its first rows
        seed: of the stratified sample
    """

    url: list[str] = field(default_factory=lambda: ["localhost:8001"])
    teacher_kind: TeacherKind = "decoder"
    teacher: Path = Path("model_repository/teacher")
    model: str = "teacher"
    in_flight: int | None = None
    engine: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    ray_workers: int = 2
    rate: float | None = None
    price_per_hour: float | None = None
    sample: int | None = None
    stratify: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero(self, "in_flight", "ray_workers", "rate", "sample")
        if len(set(self.url)) < len(self.url) or not self.url:
            raise ValueError("--url: name each endpoint once")


def label(config: Config, candidates: CandidateFile, out: Path, shard_rows: int) -> int:
    """Bring the folder `out` to completion, or as far as the signals allow. Returns the exit code."""

    def over_ray(job: Job, ranges: Sequence[RowRange], tally: Tally, stopping: Callable[[], bool]) -> None:
        from clients.labelling.ray_engine import label_over_ray  # Ray takes seconds to import

        label_over_ray(job, ranges, tally, stopping, config.ray_address, config.ray_workers)

    engine = over_ray if config.engine == "ray" else label_here
    return run_corpus(config, candidates, out, shard_rows, partial(make_job, config), engine)


def make_job(config: Config, candidates: CandidateFile, out: Path, shard_rows: int) -> Job:
    """Ask the servers who they are, check the local checkpoint against them, and put together what the workers need."""
    credentials = config.credentials()
    wait_seconds = min(config.give_up_seconds, 60.0)
    teacher = asyncio.run(find_teacher(config.url, credentials, config.model, config.teacher_kind, wait_seconds))
    checkpoint = checkpoint_folder(config.teacher)
    teacher.texts(checkpoint)  # a wrong folder must be known before anything is written
    # absolute, because Ray's workers run elsewhere
    folder, credentials = checkpoint.absolute(), credentials.absolute()
    asked = StreamedTeacher(teacher, folder, tuple(config.url), credentials, config.in_flight, config.patience())
    origin = Origin.of(candidates, shard_rows, teacher.teacher_id)
    return Job(candidates, out, origin, asked, config.give_up_seconds, config.max_refused)


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
        text_format = format_of_teacher(checkpoint_folder(config.teacher))
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
