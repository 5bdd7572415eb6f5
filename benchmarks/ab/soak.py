"""An hour of trouble for the A/B router: all kinds of callers at once, while servers, disk and network fail in turn.

python -m benchmarks.ab.soak                    # an hour; --seconds 300 for a first look

Good, bad, slow and huge callers ask. A real tritonserver serves toy rankers behind a proxy. One fault after the other
happens: the server is killed with -9 and started again, every sync of the log's disk takes six seconds for a while,
open connections to the server go silent, the experiment file is found half-written and is then edited, a model is
unloaded and loaded again. Good pages come at a share of the router's measured capacity whether answers come or not.
What is told at the end: pages that got no ranking, exposures whose answer said that they were on disk and which the log
does not hold exactly once, what strangers got, the slope of the router's memory, and the pauses of its event loop.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as triton

from benchmarks.ab.soak_callers import GoodCallers, Router, Strangers
from benchmarks.ab.toy_rankers import write_toy_repository
from clients.ab.log.reader import ReadCounts, read_folder
from clients.ab.router.local_router import LocalRouter, start_router
from ranking.program import run
from serving.temporary_server import TritonServer, start_triton
from tests.helpers.stub_ranker import TcpProxy

EXPERIMENT = """
default_model: baseline
experiments:
  - name: soak
    arms: [{name: baseline, model: baseline}, {name: student, model: student}]
    coverage: %s
"""
SLOW_CALLERS = 20
SAMPLE_SECONDS = 2.0  # between two looks at the router's memory
WARM_UP_SHARE = 0.25  # of the run, before the slope of the memory is taken: caches have their size by then


@dataclass
class Config:
    """Soak a router.

    Args:
        seconds: length of the run
        fault_seconds: from the beginning of one fault to that of the next
        share: good pages come at this share of the capacity
        capacity_seconds: how long the capacity is measured, before anything fails
        rate: good pages a second, in place of a share of the capacity
        documents: candidates of a page
        model_ms: how long a model takes, without using the processor
        out: also write the figures here as JSON
    """

    seconds: float = 3600.0
    fault_seconds: float = 60.0
    share: float = 0.6
    capacity_seconds: float = 20.0
    rate: float = 0.0
    documents: int = 48
    model_ms: float = 5.0
    out: Path | None = None


@dataclass
class Surroundings:
    """What a router needs and what fails: its server behind a proxy, the disk's stall file, the experiment file."""

    folder: Path
    repository: Path
    proxy: TcpProxy
    server: TritonServer
    servers: ExitStack
    happened: Counter[str] = field(default_factory=Counter)

    @property
    def stall_file(self) -> Path:
        """Holds the seconds that a sync of the log takes, while there is such a file."""
        return self.folder / "stall"

    async def kill_the_server(self) -> None:
        """Kill with -9; another one serves five seconds later."""
        self.server.process.kill()
        await asyncio.sleep(5)
        self.server = await asyncio.to_thread(self.servers.enter_context, explicit_server(self.repository))
        self.proxy.lead_to(self.server.grpc)

    async def stall_the_disk(self) -> None:
        """Every sync takes six seconds, for twelve."""
        self.stall_file.write_text("6")
        await asyncio.sleep(12)
        self.stall_file.unlink()

    async def freeze_the_peer(self) -> None:
        """All open connections to the server go silent for ever, without being closed."""
        self.proxy.freeze()

    async def edit_the_experiment(self) -> None:
        """An editor that writes slowly: half of the file, and two seconds later the whole new one."""
        coverage = "0.9" if self.happened["edit_the_experiment"] % 2 else "1.0"
        text = EXPERIMENT % coverage
        path = self.folder / "experiment.yaml"
        path.write_text(text[: len(text) // 2])
        await asyncio.sleep(2)
        path.write_text(text)

    async def reload_a_model(self) -> None:
        """The student is unloaded, and loaded again three seconds later."""
        with triton.InferenceServerClient(self.server.grpc) as client:
            await asyncio.to_thread(client.unload_model, "student")
            await asyncio.sleep(3)
            await asyncio.to_thread(client.load_model, "student")

    async def fail_in_turn(self, seconds: float, fault_seconds: float) -> None:
        """One fault after the other; the last third of the last turn is quiet."""
        faults: list[Callable[[], Awaitable[None]]] = [
            self.kill_the_server, self.stall_the_disk, self.freeze_the_peer, self.edit_the_experiment,
            self.reload_a_model,
        ]  # fmt: skip
        started = time.monotonic()
        for turn in range(int(seconds / fault_seconds - 0.34) + 1):
            await asyncio.sleep(max(0.0, started + (turn + 0.2) * fault_seconds - time.monotonic()))
            fault = faults[turn % len(faults)]
            await fault()
            self.happened[getattr(fault, "__name__", str(turn))] += 1


def explicit_server(repository: Path):
    """A server whose models can be unloaded."""
    return start_triton(repository, "--model-control-mode=explicit", "--load-model=*")


@dataclass
class Samples:
    """The router's memory over time. rows: (seconds, pages so far, MiB)."""

    rows: list[tuple[float, int, float]] = field(default_factory=list)

    async def take(self, process: psutil.Process, callers: GoodCallers) -> None:
        """Until cancelled."""
        started = time.monotonic()
        while True:
            mib = process.memory_info().rss / (1 << 20)
            self.rows.append((time.monotonic() - started, callers.pages.count, mib))
            await asyncio.sleep(SAMPLE_SECONDS)

    def figures(self) -> dict[str, float]:
        """First, largest and last MiB, and the slope after the warm-up: MiB an hour, and that per 100,000 pages."""
        kept = np.array(self.rows[int(len(self.rows) * WARM_UP_SHARE) :])
        an_hour = float(np.polyfit(kept[:, 0], kept[:, 2], 1)[0]) * 3600
        pages = float(kept[-1, 1] - kept[0, 1]) or 1.0
        hours = float(kept[-1, 0] - kept[0, 0]) / 3600
        return {
            "first_mib": self.rows[0][2],
            "largest_mib": max(mib for _, _, mib in self.rows),
            "last_mib": self.rows[-1][2],
            "slope_mib_an_hour": an_hour,
            "slope_mib_per_100000_pages": an_hour * hours / pages * 100_000,
        }


async def soak(config: Config, local: LocalRouter, surroundings: Surroundings) -> dict[str, Any]:
    """Run everything at once for config.seconds. Returns the figures but those of the log."""
    router = Router(local.url)
    callers, strangers = GoodCallers(router, config.documents), Strangers(router)
    rate = config.rate
    figures: dict[str, Any] = {}
    if not rate:
        figures["capacity"] = await callers.closed_loop(8, config.capacity_seconds)
        rate = config.share * figures["capacity"]
    samples = Samples()
    beside = [
        asyncio.create_task(samples.take(psutil.Process(local.process.pid), callers)),
        asyncio.create_task(strangers.bad(0.2)),
        asyncio.create_task(strangers.huge(5.0)),
        *(asyncio.create_task(strangers.slow()) for _ in range(SLOW_CALLERS)),
    ]
    async with asyncio.TaskGroup() as group:
        group.create_task(callers.steady(rate, config.seconds))
        group.create_task(surroundings.fail_in_turn(config.seconds, config.fault_seconds))
    for task in beside:
        task.cancel()
    for problem in await asyncio.gather(*beside, return_exceptions=True):
        if not isinstance(problem, asyncio.CancelledError):
            raise RuntimeError("a caller ended by itself") from (problem if isinstance(problem, Exception) else None)
    _, page = await router.ask("GET", "/metrics")
    router.close()
    pages = callers.pages
    return figures | {
        "rate": rate,
        "pages": pages.count,
        "unanswered": dict(pages.unanswered),
        "served_by": dict(pages.served_by),
        "latency_ms": dict(zip(("p50", "p99", "max"), np.percentile(pages.latencies_ms, (50, 99, 100)).tolist())),
        "logged": pages.logged,
        "pending": pages.pending,
        "unlogged": pages.unlogged,
        "faults": dict(surroundings.happened),
        "strangers": dict(sorted(strangers.statuses.items())),
        "surprises": dict(strangers.surprises),
        "memory": samples.figures(),
        "loop_pauses": loop_pauses(page.decode()),
    }


def loop_pauses(page: str) -> dict[str, float]:
    """The longest pause of the router's event loop in seconds, and how many were longer than 50 ms."""
    (longest,) = re.findall(r"^ab_loop_pause_longest_seconds (\S+)", page, re.M)
    buckets = dict(re.findall(r'^ab_loop_pause_seconds_bucket{le="(\S+)"} (\S+)', page, re.M))
    return {"longest_seconds": float(longest), "over_50_ms": float(buckets["+Inf"]) - float(buckets["0.05"])}


def lost_exposures(folder: Path, logged: list[str]) -> dict[str, int]:
    """Request ids whose answer said `logged: true`: how many the log does not hold at all, and how many twice."""
    counts = ReadCounts()
    held = Counter(record["request_id"] for record in read_folder(folder, counts) if record["type"] == "exposure")
    return {
        "lost": sum(not held[request_id] for request_id in logged),
        "twice": sum(held[request_id] > 1 for request_id in logged),
        "damaged_lines": len(counts.damaged),
    }


def main(config: Config) -> int:
    """Soak, read the log, print. Returns 1 if a page went unanswered, an exposure is lost, or a stranger surprised."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as servers:
        folder = Path(name)
        (folder / "experiment.yaml").write_text(EXPERIMENT % "1.0")
        repository = write_toy_repository(folder / "repository", config.model_ms / 1000, instances=4)
        server = servers.enter_context(explicit_server(repository))
        os.environ["STALL_FILE"] = str(folder / "stall")
        command = [sys.executable, "-m", "benchmarks.ab.stalling_router"]
        with (
            TcpProxy(server.grpc) as proxy,
            start_router(folder / "experiment.yaml", proxy.url, folder / "log", command=command) as local,
        ):
            surroundings = Surroundings(folder, repository, proxy, server, servers)
            figures = asyncio.run(soak(config, local, surroundings))
            figures["router_lives"] = local.process.poll() is None
        # the router has ended: what waited for the disk is written
        figures["log"] = lost_exposures(folder / "log", figures["logged"])
        figures["logged"] = len(figures["logged"])
    text = json.dumps(figures, indent=2)
    print(text)
    if config.out:
        config.out.write_text(text + "\n")
    good = figures["router_lives"] and not figures["unanswered"] and not figures["surprises"]
    return 0 if good and not any(figures["log"].values()) else 1


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.ab.soak --seconds 300")
