"""How much memory and time the label store's joins take: labels by the ten million, a corpus that it knows in part.

    python -m benchmarks.teacher.label_store --labels 50000000 --asked 1000000

Makes a store of random keys in five runs, the last one added by the store itself, and a corpus of which it knows 99%.
Each join runs in a process of its own, whose peak memory is read at its end. Prints one JSON object a step
(docs/results/label_store.md).
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from clients.labelling.candidate_file import CandidateFile
from clients.labelling.label_store import (
    CANDIDATE_COLUMNS,
    KEYS_SCHEMA,
    RECORD_VERSION,
    RUN_SCHEMA,
    LabelStore,
    Run,
    candidate_schema,
    file_sha256,
    write_batches,
)
from ranking.program import run

PIECE = 1_000_000
RUNS = 5


@dataclass
class Config:
    """Measure the label store's joins.

    Args:
        labels: stored labels
        asked: rows of the corpus
        known: share of the corpus that the store has
        scratch: folder for the store; left out, one that goes away
    """

    labels: int = 50_000_000
    asked: int = 1_000_000
    known: float = 0.99
    scratch: Path | None = None


def keys(piece: int, part: int, parts: int) -> np.ndarray:
    """uint64 [PIECE, 2]: sorted random keys, the same for the same piece.

    part, parts: the highs lie in this part of their range, so that the pieces of a run follow one another.
    """
    draw = np.random.default_rng(piece)
    width = (1 << 64) // parts
    highs = np.sort(draw.integers(part * width, (part + 1) * width - 1, PIECE, np.uint64))
    return np.stack([highs, draw.integers(0, (1 << 64) - 1, PIECE, np.uint64)], axis=1)


def run_batches(number: int, pieces: int) -> Iterator[pa.RecordBatch]:
    """The labels of a run of so many pieces, sorted by key."""
    scores = np.zeros(PIECE, np.float32)
    for part in range(pieces):
        made = keys(number * pieces + part, part, pieces)
        yield pa.record_batch([made[:, 0], made[:, 1], scores], schema=RUN_SCHEMA)


def make_store(store: LabelStore, pieces: int) -> None:
    """Write finished runs without the store's own joins, which would be measured twice."""
    store.folder.mkdir(parents=True)
    for number in range(RUNS - 1):
        each = pieces // RUNS
        path = store.folder / f"run-{number:05d}.parquet"
        rows = write_batches(path, RUN_SCHEMA, run_batches(number, each))
        record = {"version": RECORD_VERSION} | asdict(Run(path.name, rows, file_sha256(path), str(number)))
        path.with_suffix(".json").write_text(json.dumps(record))


def make_corpus(folder: Path, config: Config, each: int) -> CandidateFile:
    """A corpus with its keys.parquet: known keys are drawn from all over the store, of runs of `each` pieces."""
    draw = np.random.default_rng(1 << 40)
    per_piece = int(config.asked * config.known) // (RUNS * each)
    stored = (keys(piece, piece % each, each) for piece in range(RUNS * each))
    known = np.concatenate([made[draw.choice(PIECE, per_piece, replace=False)] for made in stored])
    new = draw.integers(0, (1 << 64) - 1, (config.asked - len(known), 2), np.uint64)
    asked = np.concatenate([known, new])
    draw.shuffle(asked)
    numbers = pa.array(np.arange(len(asked)), pa.int64())
    write_batches(
        folder / "keys.parquet", KEYS_SCHEMA, [pa.record_batch([numbers, asked[:, 0], asked[:, 1]], KEYS_SCHEMA)]
    )
    texts = {name: [f"{name} {number}" for number in range(len(asked))] for name in CANDIDATE_COLUMNS}
    write_batches(folder / "candidates.parquet", candidate_schema(), [pa.record_batch(texts, candidate_schema())])
    return CandidateFile.open(folder / "candidates.parquet")


def measured(name: str, step: Callable[..., int], *arguments) -> None:
    """Run a step in a process of its own and print its rows, seconds and peak memory."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=_measure, args=(its, step, arguments))
    process.start()
    its.close()
    rows, seconds, gibibytes = mine.recv()
    process.join()
    figures = {"step": name, "rows": rows, "seconds": round(seconds, 1), "peak_gib": round(gibibytes, 2)}
    print(json.dumps(figures), flush=True)


def _measure(pipe, step: Callable[..., int], arguments: tuple) -> None:
    started = time.perf_counter()
    rows = step(*arguments)
    pipe.send((rows, time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


def add(store: LabelStore, folder: Path) -> int:
    """Add the prepared labels as one more run."""
    return store.add(folder / "fresh.parquet", source="fresh")


def missing(store: LabelStore, folder: Path, candidates: CandidateFile) -> int:
    """Find the candidates that the store lacks."""
    return store.missing(folder / "keys.parquet", candidates, folder / "missing.parquet")


def read_scores(store: LabelStore, folder: Path) -> int:
    """Read the corpus's scores out of the store."""
    return sum(len(batch) for batch in store.scores(folder / "keys.parquet", folder))


def main(config: Config) -> None:
    """Make the store and the corpus, then measure the three joins."""
    pieces = config.labels // PIECE
    with tempfile.TemporaryDirectory(dir=config.scratch) as name:
        folder = Path(name)
        store = LabelStore(folder / "store", "teacher")
        make_store(store, pieces)
        each = pieces // RUNS
        write_batches(folder / "fresh.parquet", RUN_SCHEMA, run_batches(RUNS - 1, each))
        candidates = make_corpus(folder, config, each)
        measured("add a run", add, store, folder)
        measured("find what is missing", missing, store, folder, candidates)
        measured("read the corpus's scores", read_scores, store, folder)


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.teacher.label_store --labels 50000000 --asked 1000000")
