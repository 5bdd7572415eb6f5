"""The labeller's speed and memory, each against what it has to live up to (docs/results/labelling.md).

    python -m benchmarks.teacher.labelling --part throughput  # through Triton against in-process vLLM, same checkpoint
    python -m benchmarks.teacher.labelling --part prefix      # the server's prefix cache on against off
    python -m benchmarks.teacher.labelling --part endpoints   # two simulated servers of a fixed latency against one
    python -m benchmarks.teacher.labelling --part memory      # memory at 10,000 and 5,000,000 candidates, stub teacher

Prints one JSON object a part. Rounds take turns, each on pairs that no server has seen, so that a busy machine hits
both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import psutil
import pyarrow.parquet as pq

from benchmarks.paired_rounds import interleaved, ratio_of_medians
from benchmarks.teacher.labelling_corpus import (
    ROOT,
    Timed,
    label,
    make_teacher,
    publish,
    stub_servers,
    write_candidates,
)
from ranking.program import run
from ranking.text import TeacherFormat
from serving.temporary_server import start_triton

# One thread computes, on both sides: a second one waits for its fellow by spinning, and where the server and the
# labeller take its core in between, that is most of what it does.
VLLM = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


@dataclass
class Config:
    """Measure the labeller.

    Args:
        part: what to measure
        pairs: pairs of a round
        rounds: turns of each side
        hidden: width of the random teacher
        layers: depth of the random teacher
        query_words: words of a query; the prefix that a query's candidates share grows with it
        large: candidates of the large memory run
        small: candidates of the small memory run
        client_flags: further flags of the labeller, e.g. --in-flight=64
        folder: keep candidates and labels here; a memory run that was stopped goes on when it is started again
        session_seconds: stop the labeller of the memory run after this long; 0 lets it finish
    """

    part: Literal["throughput", "prefix", "endpoints", "memory", "inprocess"]
    pairs: int = 800
    rounds: int = 8
    hidden: int = 256
    layers: int = 4
    query_words: int = 8
    large: int = 5_000_000
    small: int = 10_000
    client_flags: list[str] | None = None
    folder: Path | None = None
    session_seconds: float = 0


class InProcess:
    """vLLM in a process of its own without a server: takes candidate files on stdin, answers with seconds."""

    def __init__(self, checkpoint: Path):
        command = [sys.executable, "-m", "benchmarks.teacher.labelling", "--part=inprocess"]
        environment = {**os.environ, **VLLM, "LABELLING_CHECKPOINT": str(checkpoint)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )

    def rate(self, candidates: Path, rows: int) -> float:
        """Pairs a second of scoring a candidates file with that many rows."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{candidates}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return rows / float(line.split()[1])
        raise RuntimeError("in-process vLLM ended")

    def close(self) -> None:
        """End the process and wait for it."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and all below it so far. On a shared machine it tells work from waiting."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(times.user + times.system for times in (process.cpu_times() for process in family))


def serve_in_process() -> None:
    """The other side of InProcess: the same engine arguments, prompts and sampling as the served teacher's."""
    from google.protobuf import text_format as protobuf_text
    from tritonclient.grpc import model_config_pb2
    from vllm import LLM, SamplingParams

    checkpoint = Path(os.environ["LABELLING_CHECKPOINT"])
    arguments = json.loads((checkpoint.parent / "model.json").read_text())
    config_text = (checkpoint.parents[1] / "config.pbtxt").read_text()
    served = protobuf_text.Parse(config_text, model_config_pb2.ModelConfig())
    token = int(served.parameters["score_token_id"].string_value)
    llm = LLM(**arguments | {"model": str(checkpoint), "tokenizer": str(checkpoint)})
    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=0, allowed_token_ids=[token])
    text_format = TeacherFormat.of_checkpoint(checkpoint)
    for line in sys.stdin:
        rows = pq.read_table(line.strip())
        began = time.monotonic()
        texts = text_format.texts(*(rows.column(name).to_pylist() for name in ("query", "title", "summary")))
        outputs = llm.generate([text.text for text in texts], sampling, use_tqdm=False)
        assert len(outputs) == len(rows)
        print(f"seconds {time.monotonic() - began}", flush=True)


def throughput(config: Config, folder: Path) -> dict[str, Any]:
    """Pairs a second and processor time of vLLM in process and through Triton, in alternating rounds on the same pairs.

    The labeller is a program that starts anew in every round, vLLM in process has started before. A finished run that
    is started again labels nothing: what it takes is the labeller's start, which a corpus pays once.
    """
    repository = publish(make_teacher(folder / "teacher", config.hidden, config.layers), folder / "repository")
    checkpoint = repository / "teacher/1/checkpoint"
    paths = [
        write_candidates(folder / f"{number}.parquet", config.pairs, seed=number, query_words=config.query_words)
        for number in range(config.rounds + 1)
    ]
    with start_triton(repository, environment=VLLM) as server:
        alone = InProcess(checkpoint)

        def in_process(path: Path) -> Side:
            before = cpu_seconds(alone.process.pid)
            rate = alone.rate(path, config.pairs)
            return Side(rate, 1000 * (cpu_seconds(alone.process.pid) - before) / config.pairs, 0.0, 0.0)

        def through_triton(path: Path) -> Side:
            def run_labeller() -> Timed:
                return label(path, path.with_suffix(""), [server.grpc], checkpoint, *config.client_flags or [])

            before = cpu_seconds(server.pid)
            timed = run_labeller()
            serving = cpu_seconds(server.pid) - before
            start = run_labeller()
            parts = (serving, timed.cpu_seconds - start.cpu_seconds, start.cpu_seconds)
            return Side(timed.pairs_per_second, *(1000 * part / config.pairs for part in parts))

        sides = {"in process": in_process, "through Triton": through_triton}
        for way in sides.values():
            way(paths[-1])  # warms both up
        found = interleaved({name: partial(_next_of, way, iter(paths)) for name, way in sides.items()}, config.rounds)
        alone.close()
    here, served = found["in process"], found["through Triton"]
    here_ms, labelled_ms = [side.engine_ms for side in here], [side.engine_ms + side.client_ms for side in served]
    started_ms = [side.engine_ms + side.client_ms + side.start_ms for side in served]
    rates = [side.rate for side in served], [side.rate for side in here]
    return {
        "pairs_per_second": {name: [round(side.rate, 1) for side in rounds] for name, rounds in found.items()},
        "processor_ms_a_pair": {
            "in process": [round(each, 2) for each in here_ms],
            "server": [round(side.engine_ms, 2) for side in served],
            "labeller": [round(side.client_ms, 2) for side in served],
            "labeller's start": [round(side.start_ms, 2) for side in served],
        },
        "ratio of medians": {
            "pairs a second": str(ratio_of_medians(*rates)),
            "by processor time": str(ratio_of_medians(here_ms, labelled_ms)),
            "by processor time, with the labeller's start": str(ratio_of_medians(here_ms, started_ms)),
        },
    }


@dataclass(frozen=True)
class Side:
    """One round of one side: pairs a second; ms of processor time a pair in vLLM and its server, in the labeller, and
    in the labeller's start.
    """

    rate: float
    engine_ms: float
    client_ms: float
    start_ms: float


def _next_of(way: Callable[[Path], Side], paths: Iterator[Path]) -> Side:
    return way(next(paths))


def prefix(config: Config, folder: Path) -> dict[str, Any]:
    """Pairs a second with the server's prefix cache and without it, in alternating rounds."""
    teacher = make_teacher(folder / "teacher", config.hidden, config.layers)
    repositories = {on: publish(teacher, folder / f"cache-{on}", enable_prefix_caching=on) for on in (True, False)}
    rates: dict[bool, list[float]] = {True: [], False: []}
    with (
        start_triton(repositories[True], environment=VLLM) as cached,
        start_triton(repositories[False], environment=VLLM) as plain,
    ):
        for number in range(-1, config.rounds):
            rows = config.pairs if number >= 0 else min(config.pairs, 400)
            path = write_candidates(folder / f"{number}.parquet", rows, seed=number, query_words=config.query_words)
            for on, server in ((True, cached), (False, plain)):
                checkpoint = repositories[on] / "teacher/1/checkpoint"
                timed = label(
                    path, folder / f"labels-{on}-{number}", [server.grpc], checkpoint, *config.client_flags or []
                )
                rates[on].append(timed.pairs_per_second)
    ratios = [a / b for a, b in zip(rates[True][1:], rates[False][1:])]
    return {"cache_on": rates[True][1:], "cache_off": rates[False][1:], "ratio": median(ratios), "ratios": ratios}


def endpoints(config: Config, folder: Path) -> dict[str, Any]:
    """Servers of 100 ms and 32 places: at most 320 pairs a second each."""
    teacher = make_teacher(folder / "teacher", 64, 2)
    path = write_candidates(folder / "c.parquet", config.pairs, seed=0)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(config.rounds):
        for count in rates:
            with stub_servers(count, teacher, "--latency=0.1", "--capacity=32") as urls:
                timed = label(path, folder / f"labels-{count}-{number}", urls, teacher, *config.client_flags or [])
            rates[count].append(timed.pairs_per_second)
    return {"one": rates[1], "two": rates[2], "ratio": median(rates[2]) / median(rates[1])}


def memory(config: Config, folder: Path) -> dict[str, Any]:
    """Peak memory of the labeller at a small and at a large number of candidates."""
    teacher = folder / "teacher"
    if not teacher.exists():
        make_teacher(teacher, 64, 2)
    figures = {}
    for rows in (config.small, config.large):
        path = folder / f"{rows}.parquet"
        if not path.exists():
            write_candidates(path, rows, seed=0)
        with stub_servers(1, teacher) as urls:
            flags = config.client_flags or []
            timed = label(path, folder / f"labels-{rows}", urls, teacher, *flags, stop_after=config.session_seconds)
        figures[str(rows)] = timed.__dict__
    difference = figures[str(config.large)]["peak_mb"] - figures[str(config.small)]["peak_mb"]
    return {"runs": figures, "difference_mb": round(difference, 1)}


def main(config: Config) -> None:
    """Measure one part and print its figures as JSON."""
    if config.part == "inprocess":
        serve_in_process()
        return
    parts = {"throughput": throughput, "prefix": prefix, "endpoints": endpoints, "memory": memory}
    with tempfile.TemporaryDirectory(prefix="labelling-") as scratch:
        folder = config.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps({"part": config.part, **parts[config.part](config, folder)}, indent=1))


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.teacher.labelling --part endpoints --pairs 2000")
