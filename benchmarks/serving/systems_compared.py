"""Compare ways to serve one student on this machine: pairs a second and latency on real candidate lists.

    python benchmarks/serving/systems_compared.py --data data/msrd --model minilm

The limit is the engine in process on tokens made beforehand, with the served model's length buckets and no server.
Rounds of the systems alternate (benchmarks/paired_rounds.py); a figure is the median of its rounds. Writes a Markdown
table to stdout and --out.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.stats import kendalltau

# run as a file, this module's own name would hide the package `serving`
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.paired_rounds import interleaved, ratio_of_medians
from benchmarks.serving import systems
from benchmarks.serving.closed_loop import Round, measure
from benchmarks.serving.rerank_lists import RerankList, Size, make_checkpoint, read_lists
from build import releases
from build.build_student import Config as BuildConfig
from build.build_student import Precision
from build.build_student import main as build_student
from build.triton_config import ServingLimits
from ranking.program import run
from ranking.text import StudentFormat

LIMIT = "limit: encoder alone, tokens made beforehand"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
FP32 = "CrossEncoder fp32, FastAPI"


@dataclass
class Config:
    """Compare ways to serve one student.

    Args:
        data: dataset folder with dev and test judgments, e.g. from prepare_data --source msrd
        model: "minilm" (6 layers of 384) or "bert768" (6 layers of 768)
        checkpoint: a trained student to measure instead
        precision: of the served engine, see build_student.py; the gate's figures are printed whatever it says
        lengths: documents in a list
        clients: clients at the same time
        rounds: rounds per system; the median counts
        seconds: length of a round
        lists: different requests
        gate_queries: judged queries that the precision's cost is measured on
        peers: dtypes in which the other servers run, fp32 always among them; bf16 only where the processor multiplies
            it, elsewhere it is emulated
        infinity_python: python of a venv with infinity-emb; left out if not given
        optimum_python: python of a venv with optimum-intel, whose CrossEncoder runs in OpenVINO; left out if not given
        work: folder for checkpoint and repository
        out: also write the table to this file
        serving: sizes of the served model; by default its front keeps no document's tokens, as if all were new
    """

    data: Path
    model: Size = "minilm"
    checkpoint: Path | None = None
    precision: Precision = "bf16"
    lengths: list[int] = field(default_factory=lambda: [24, 48])
    clients: list[int] = field(default_factory=lambda: [1, 8])
    rounds: int = 3
    seconds: float = 4.0
    lists: int = 24
    gate_queries: int = 30
    peers: list[Literal["fp32", "bf16"]] = field(default_factory=lambda: ["fp32", "bf16"])
    infinity_python: Path | None = None
    optimum_python: Path | None = None
    work: Path = Path("runs/benchmark-serving")
    out: Path | None = None
    # no request is refused here, however slow the machine is
    serving: ServingLimits = field(default_factory=lambda: ServingLimits(queue_timeout_ms=600_000, cached_fields=0))

    def __post_init__(self) -> None:
        if "fp32" not in self.peers:
            raise ValueError(f"peers are {self.peers}: fp32 must be among them, all others are compared with it")


def main(config: Config) -> None:
    """Build and publish the student, start every system, measure them in turns and write the table."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    folder = config.work / config.model
    checkpoint = config.checkpoint or make_checkpoint(config.model, folder / "checkpoint")
    repository = folder / "repository"
    # speed is measured here; what the precision costs is on the table beside it
    build_student(
        BuildConfig(
            checkpoint,
            "student",
            "openvino",
            config.data,
            repository=repository,
            precision=config.precision,
            gate_queries=config.gate_queries,
            accept_drop=True,
            accept_worse="its speed is measured, not its order",
            serving=config.serving,
        )
    )
    version = releases.versions(repository, "student")[-1]
    manifest = releases.manifest(repository, "student", version)
    text = StudentFormat.of_checkpoint(checkpoint)
    engine = systems.PublishedEngine(
        repository / "student" / str(version),
        repository / "student_encoder" / str(version),
        manifest["precision"],
        manifest["lengths"],
        ServingLimits(**manifest["serving"]),
    )
    lists = {n: read_lists(config.data, text, config.lists, n) for n in config.lengths}
    with ExitStack() as stack:
        running = {
            LIMIT: systems.in_process(engine, [request for each in lists.values() for request in each]),
            "tokeniser + encoder in process": systems.in_process(engine),
            "Triton `student`": stack.enter_context(systems.triton(repository)),
            **{name: stack.enter_context(system) for name, system in peers(config, checkpoint).items()},
        }
        agreement = {name: agreement_with(running[FP32].make, system.make, lists) for name, system in running.items()}
        results: dict[tuple[str, int, int], list[Round]] = {}
        for n in config.lengths:
            results |= rounds(config, running, lists[n], n)
            write(
                config, report(config, manifest, text, lists[n], results, agreement)
            )  # a run cut short keeps its lengths
    print(report(config, manifest, text, lists[config.lengths[-1]], results, agreement))


def peers(config: Config, checkpoint: Path) -> dict[str, AbstractContextManager[systems.System]]:
    """The other servers of the checkpoint, not started yet, in each of the dtypes."""
    found: dict[str, AbstractContextManager[systems.System]] = {}
    for name in config.peers:
        dtype = DTYPES[name]
        found[f"CrossEncoder {name}, FastAPI"] = systems.cross_encoder(checkpoint, dtype)
        if config.optimum_python:
            server = systems.cross_encoder(checkpoint, dtype, "openvino", config.optimum_python)
            found[f"CrossEncoder {name} by optimum-intel, FastAPI"] = server
        if config.infinity_python:
            found[f"infinity-emb {name} (torch)"] = systems.infinity(config.infinity_python, checkpoint, dtype)
    return found


def rounds(
    config: Config, running: dict[str, systems.System], lists: list[RerankList], n: int
) -> dict[tuple[str, int, int], list[Round]]:
    """(system, list length, clients) -> its rounds.

    In process there is one caller, measured again beside every number of clients.
    """
    measurements = {}
    for clients in config.clients:
        for name, system in running.items():
            callers = 1 if system.server is None else clients
            measurements[name, n, clients] = partial(
                measure, system.make, lists, callers, config.seconds, system.server
            )
    return interleaved(measurements, config.rounds, progress=f"lists of {n}")


def agreement_with(reference: systems.MakeAsk, make: systems.MakeAsk, lists: dict[int, list[RerankList]]) -> float:
    """Mean Kendall tau with the fp32 CrossEncoder over two lists of each length. Also warms the system up."""
    one, other = reference(), make()
    sample = [request for each in lists.values() for request in each[:2]]
    return float(np.mean([kendalltau(one(request), other(request)).statistic for request in sample]))


def report(
    config: Config, manifest: dict, text: StudentFormat, lists: list[RerankList], results: dict, agreement: dict
) -> str:
    """The table of what has been measured so far, as Markdown."""
    lines = [f"### {config.model}: {manifest['precision']}, lists of {' and '.join(map(str, config.lengths))}", ""]
    gate = manifest["gate"]
    tokens = [
        len(pair.ids)
        for request in lists
        for pair in text.encode([request.query] * len(request.titles), request.titles, request.summaries)
    ]
    lines += [
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores {platform.machine()}, "
        f"load average {os.getloadavg()[1]:.1f}; pairs of {np.mean(tokens):.0f} tokens (5th to 95th percentile "
        f"{np.percentile(tokens, 5):.0f} to {np.percentile(tokens, 95):.0f}); "
        f"gate against the fp32 checkpoint: "
        f"tau {gate['tau']:.4f}, NDCG@5 {gate['ndcg5_reference']:.4f} -> {gate['ndcg5']:.4f}; "
        f"median of {config.rounds} rounds of "
        f"{config.seconds:g} s.",
        "",
        f"| system | documents | clients | pairs/s | of the limit | by processor time "
        f"| {' | '.join(f'x CE {name}' for name in config.peers)} | p50 ms | p99 ms | CPU ms/pair | tau |",
        "|---|--:|--:|--:|--:|--:|" + "--:|" * len(config.peers) + "--:|--:|--:|--:|",
    ]
    speed = {key: [r.pairs_per_second for r in found] for key, found in results.items()}
    cost = {key: [r.cpu_ms_per_pair for r in found] for key, found in results.items()}
    for (name, n, clients), found in sorted(results.items(), key=lambda entry: entry[0][1:]):
        own = speed[name, n, clients]
        latencies = np.concatenate([r.latencies_ms for r in found])
        ratios = [
            ratio_of_medians(own, speed[LIMIT, n, clients]),
            ratio_of_medians(cost[LIMIT, n, clients], cost[name, n, clients]),
            *(ratio_of_medians(own, speed[f"CrossEncoder {peer}, FastAPI", n, clients]) for peer in config.peers),
        ]
        lines.append(
            f"| {name} | {n} | {clients} | {np.median(own):.0f} | {' | '.join(map(str, ratios))} "
            f"| {np.percentile(latencies, 50):.0f} | {np.percentile(latencies, 99):.0f} "
            f"| {np.median(cost[name, n, clients]):.2f} | {agreement[name]:.3f} |"
        )
    return "\n".join(lines) + "\n"


def write(config: Config, table: str) -> None:
    """Write the table to --out, where one was given."""
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, example="python benchmarks/serving/systems_compared.py --data data/msrd --model minilm")
