"""The labeller under faults, with real tritonservers and a real vLLM teacher, at a size too large for tests.

    python -m benchmarks.teacher.labelling_faults --pairs 3000

Faults, one after the other: the labeller killed (-9) 20 times at random moments; one of two servers killed mid-run and
started again on its port; a proxy that turns 10% of the answers into errors, delays 5% and breaks streams. After each,
every pair must be labelled once, in order, with a score within 1e-3 of an undisturbed run. Prints one JSON object;
exits 1 if one of them is not so.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.teacher.labelling import VLLM
from benchmarks.teacher.labelling_corpus import ROOT, make_teacher, publish, write_candidates
from ranking.labels import read_labels
from ranking.program import run
from serving.temporary_server import TritonServer, start_triton
from tests.helpers.faulty_proxy import FaultyProxy

TOLERANCE = 1e-3


@dataclass
class Config:
    """Label under faults.

    Args:
        pairs: pairs of each run; enough for a server to restart while they are labelled
        hidden: width of the random teacher
        layers: depth of the random teacher
        seed: of the moments at which processes are killed
        fault: which of labeller (killed 20 times), server (killed and restarted), proxy
    """

    pairs: int = 3000
    hidden: int = 256
    layers: int = 4
    seed: int = 0
    fault: list[str] = field(default_factory=lambda: list(FAULTS))

    def __post_init__(self) -> None:
        unknown = set(self.fault) - set(FAULTS)
        if unknown:
            raise ValueError(f"--fault {', '.join(unknown)}: {', '.join(FAULTS)} are known")


@dataclass
class Bench:
    """What the faults share: the corpus, the published teacher, a server that stays up, a place for output folders."""

    candidates: Path
    repository: Path
    server: TritonServer
    folder: Path
    draw: random.Random

    def start(self, name: str, urls: list[str], *flags: str) -> subprocess.Popen:
        """Start the labeller on these servers; its labels go to the folder of that name."""
        command = [sys.executable, str(ROOT / "clients/label_corpus.py"), f"--candidates={self.candidates}"]
        command += [
            f"--out={self.folder / name}",
            f"--url={','.join(urls)}",
            f"--teacher={self.repository / 'teacher'}",
        ]
        return subprocess.Popen([*command, "--shard-rows=200", *flags], stderr=subprocess.PIPE, text=True)

    def finish(self, process: subprocess.Popen) -> str:
        """Wait for the labeller and return its log. RuntimeError if it failed."""
        text = process.communicate()[1]
        if process.returncode:
            raise RuntimeError(f"label_corpus.py exited with {process.returncode}: {text[-2000:]}")
        return text

    def shards(self, name: str) -> int:
        """How many shards of labels the folder of that name holds."""
        return len(list((self.folder / name).glob("labels-*.json")))


def kill_labeller(bench: Bench) -> dict[str, Any]:
    """kill -9 at random moments; a folder that gets finished on the way is checked like the last one."""
    found = []
    for _ in range(20):
        process = bench.start("killed", [bench.server.grpc])
        lock = bench.folder / "killed/.lock"
        while process.poll() is None and not (lock.exists() and lock.read_text() == str(process.pid)):
            time.sleep(0.05)
        time.sleep(bench.draw.uniform(0, 3))
        process.kill()
        process.communicate()
        found.append(bench.shards("killed"))
    bench.finish(bench.start("killed", [bench.server.grpc]))
    return {"folders": ["killed"], "shards_found_after_each_kill": found}


def kill_server(bench: Bench) -> dict[str, Any]:
    """Kill one of two tritonservers (-9) with all its processes and start a new one on its port."""
    with ExitStack() as stack:
        second = stack.enter_context(start_triton(bench.repository, environment=VLLM))
        process = bench.start("server", [bench.server.grpc, second.grpc], "--in-flight=1")
        while bench.shards("server") < 2 and process.poll() is None:
            time.sleep(0.05)
        before = bench.shards("server")
        for child in [*second.children()]:
            child.kill()
        os.kill(second.pid, signal.SIGKILL)
        port = second.grpc.rpartition(":")[2]
        stack.enter_context(start_triton(bench.repository, f"--grpc-port={port}", environment=VLLM))
        back = bench.shards("server")
        still_running = process.poll() is None
        text = bench.finish(process)
    shares = text.rsplit("shares ", 1)[-1].split("]")[0]
    return {
        "folders": ["server"],
        "shards_at_the_kill": before,
        "shards_when_it_was_back": back,
        "back_before_the_end": still_running,
        "times_lost": text.count(f"{second.grpc} lost"),
        "shares_at_the_end": shares,
    }


def faulty_proxy(bench: Bench) -> dict[str, Any]:
    """Label through a proxy that answers with errors, delays and broken streams."""
    with FaultyProxy(bench.server.grpc) as proxy:
        text = bench.finish(bench.start("proxy", [proxy.url], "--deadline-ms=10000", "--retries=8"))
    retries = int(text.rsplit("retries ", 1)[-1].split(",")[0])
    return {"folders": ["proxy"], "errors": proxy.errors, "streams_broken": proxy.drops, "retries": retries}


FAULTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "labeller": kill_labeller,
    "server": kill_server,
    "proxy": faulty_proxy,
}


def against_undisturbed(bench: Bench, name: str) -> dict[str, Any]:
    """How a folder differs from the undisturbed one: pairs missing or moved, and the largest score difference."""
    labels, undisturbed = read_labels(bench.folder / name), read_labels(bench.folder / "undisturbed")
    same_pairs = all(labels.column(key).equals(undisturbed.column(key)) for key in ("query_id", "doc_id"))
    scores, expected = (table.column("teacher_score").to_numpy() for table in (labels, undisturbed))
    apart = float(np.abs(scores - expected).max()) if same_pairs else float("inf")
    return {"labels": len(labels), "same_pairs_in_order": same_pairs, "largest_difference": apart}


def main(config: Config) -> int:
    """Label once undisturbed, then under each fault; 1 if a fault changed the labels, else 0."""
    results: dict[str, Any] = {"pairs": config.pairs}
    with tempfile.TemporaryDirectory(prefix="labelling-faults-") as name:
        folder = Path(name)
        candidates = write_candidates(folder / "candidates.parquet", config.pairs, config.seed)
        repository = publish(make_teacher(folder / "teacher", config.hidden, config.layers), folder / "repository")
        with start_triton(repository, environment=VLLM) as server:
            bench = Bench(candidates, repository, server, folder, random.Random(config.seed))
            bench.finish(bench.start("undisturbed", [server.grpc]))
            for fault in config.fault:
                began = time.monotonic()
                seen = FAULTS[fault](bench)
                checked = [against_undisturbed(bench, each) for each in seen.pop("folders")]
                results[fault] = {**seen, **checked[0], "seconds": round(time.monotonic() - began)}
                print(f"{fault}: {results[fault]}", file=sys.stderr)
    differences = [result["largest_difference"] for result in results.values() if isinstance(result, dict)]
    results["passed"] = max(differences) < TOLERANCE
    print(json.dumps(results, indent=1))
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.teacher.labelling_faults --pairs 2000")
