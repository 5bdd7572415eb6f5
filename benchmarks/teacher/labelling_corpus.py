"""What the labelling benchmarks run on: candidate files, random teachers, stub servers, timed runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ranking.card import ScoreCard, fingerprint
from ranking.limits import FieldLimits
from ranking.schema import TABLES, write_table
from ranking.text import FORMAT_VERSION, TEACHER_FORMAT

EXIT_INTERRUPTED = 130
ROOT = Path(__file__).parents[2]
PER_QUERY = 24
ROOTS = ("run", "shoe", "rain", "city", "trail", "boot", "light", "walk", "summer", "red")
WORDS = [f"{root}{ending}" for root in ROOTS for ending in ("", "s", "er", "ing")]


def write_candidates(path: Path, rows: int, seed: int, query_words: int = 8, document_words: int = 16) -> Path:
    """rows candidates, PER_QUERY a query, streamed to a Parquet file."""

    def pieces() -> Iterator[pa.Table]:
        draw = random.Random(seed)
        for first in range(0, rows, 48_000):
            here = range(first, min(first + 48_000, rows))
            texts = [" ".join(draw.choices(WORDS, k=document_words)) for _ in range(2000)]
            queries = {i // PER_QUERY: " ".join(draw.choices(WORDS, k=query_words)) for i in here}
            columns = [
                [f"q{i // PER_QUERY}" for i in here],
                [f"d{i}" for i in here],
                [f"{queries[i // PER_QUERY]} {seed}" for i in here],
                [f"document {i}" for i in here],
                [texts[i % len(texts)] for i in here],
            ]
            yield pa.table(columns, schema=TABLES["candidates"].schema)

    write_table(path, "candidates", pieces())
    return path


def make_teacher(folder: Path, hidden: int, layers: int) -> Path:
    """A random Llama teacher of that size as training would leave it. Random weights cost what trained ones do."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from tests.helpers.tiny_teacher import family_config, make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = AutoModelForSequenceClassification.from_config(family_config("llama", len(tokenizer), hidden, layers))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    vocabulary = fingerprint(folder / "tokenizer.json")
    ScoreCard(
        "teacher", TEACHER_FORMAT, FORMAT_VERSION, FieldLimits(96, 32, 128), "linear", "last_token",
        vocabulary=vocabulary,
    ).save(folder)  # fmt: skip
    return folder


def publish(checkpoint: Path, repository: Path, **engine_args) -> Path:
    """Publish the checkpoint with build/build_teacher.py into a repository of its own."""
    from build.build_teacher import Config, main

    main(Config(checkpoint=checkpoint, repository=repository, engine_args={"enforce_eager": True, **engine_args}))
    return repository


@contextmanager
def stub_servers(count: int, teacher: Path, *options: str) -> Iterator[list[str]]:
    """Addresses of `count` stub teachers, each a process of its own."""
    command = [sys.executable, str(ROOT / "tests/helpers/stub_teacher.py"), "--teacher", str(teacher), *options]
    servers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(count)]
    try:
        yield [f"127.0.0.1:{server.stdout.readline().strip()}" for server in servers if server.stdout]
    finally:
        for server in servers:
            server.kill()
            server.wait()


@dataclass(frozen=True)
class Timed:
    """One labelling run: pairs a second while it labelled; largest resident memory, time and processor time in all."""

    pairs: int
    pairs_per_second: float
    peak_mb: float
    seconds: float
    cpu_seconds: float


def label(candidates: Path, out: Path, urls: list[str], teacher: Path, *flags: str, stop_after: float = 0) -> Timed:
    """Run clients/label_corpus.py and read its own figures. RuntimeError if it fails.

    stop_after: seconds after which it is asked to stop (SIGTERM), 0 for never; run again with the same out, it goes on.
    """
    command = [sys.executable, str(ROOT / "clients/label_corpus.py"), f"--candidates={candidates}", f"--out={out}"]
    command += [f"--url={','.join(urls)}", f"--teacher={teacher}", *flags]
    began = os.times()
    process = subprocess.Popen(command, cwd=ROOT)
    peak_mb = 0.0
    while process.poll() is None:
        peak_mb = max(peak_mb, _peak_mb(process.pid))
        if stop_after and os.times().elapsed - began.elapsed > stop_after:
            process.terminate()
            stop_after = 0
        time.sleep(0.5)
    if process.returncode not in (0, EXIT_INTERRUPTED):
        raise RuntimeError(f"label_corpus.py exited with {process.returncode}")
    run = json.loads((out / "manifest.json").read_text())["runs"][-1]
    ended = os.times()  # of the children that have ended
    cpu = ended.children_user + ended.children_system - began.children_user - began.children_system
    seconds = round(ended.elapsed - began.elapsed, 1)
    return Timed(run["pairs"], run["pairs_per_second"], round(peak_mb, 1), seconds, round(cpu, 2))


def _peak_mb(pid: int) -> float:
    """A process's largest resident memory so far. Not rusage's: that counts what its parent held when it forked."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)
