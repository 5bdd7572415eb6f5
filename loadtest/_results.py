"""The result of a run as one JSON file, and the line that a person reads."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

from loadtest._recorder import Recorder, Tally
from ranking.files import write_json

SLICES = 10  # a run is cut into this many stretches, so that two runs can be compared with their noise
LATE_MS = 10.0  # a request that leaves this much after its intended start was held up by the generator
QUANTILES = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}


def finite(value: float | None) -> float | None:
    """JSON has no infinity: a quantile that lies among failed requests is null, and `errors` says why."""
    return None if value is None or math.isinf(value) else round(value, 3)


def summary(tally: Tally, seconds: float) -> dict[str, Any]:
    return {
        "sent": tally.sent,
        "answered": tally.answered,
        "failed": tally.failed,
        "unanswered": max(tally.outstanding, 0),
        "sent_per_second": round(tally.sent / seconds, 3),
        "answered_per_second": round(tally.answered / seconds, 3),
        "pairs_per_second": round(tally.documents / seconds, 1),
        "chunks_per_page": round(tally.chunks / tally.answered, 1) if tally.answered else None,
        "chunks_per_second": round(tally.chunks / seconds, 1),
        **{name: finite(tally.quantile(level)) for name, level in QUANTILES.items()},
        "errors": dict(tally.errors.most_common()),
    }


def slices(recorder: Recorder, arm: str, first: int, last: int) -> list[dict[str, Any]]:
    """The run in up to SLICES stretches of whole seconds."""
    length = max(1, math.ceil((last - first) / SLICES))
    found = []
    for start in range(first, last, length):
        end = min(start + length, last)
        tally = recorder.window(arm, start, end)
        if tally.sent and end - start == length:
            found.append(
                {
                    "answered_per_second": tally.answered / length,
                    **{n: finite(tally.quantile(q)) for n, q in QUANTILES.items()},
                }
            )
    return found


def generator(recorder: Recorder, cpu_share: float | None) -> dict[str, Any]:
    """Whether the figures are the server's: requests must have left when they were meant to."""
    lag = recorder.lag_quantile(0.99)
    saturated = lag > LATE_MS
    return {
        "send_lag_p50_ms": round(recorder.lag_quantile(0.5), 3),
        "send_lag_p99_ms": round(lag, 3),
        "cpu_share": None if cpu_share is None else round(cpu_share, 3),
        "saturated": saturated,
        "meaning": (
            f"requests left late (p99 {lag:.0f} ms after their time): the generator was short of CPU, the "
            "latencies are not the server's alone; use --processes or another machine"
            if saturated
            else "requests left on time: the latencies are the server's"
        ),
    }


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"cpus": os.cpu_count(), "cpu": model, "system": platform.platform(terse=True)}


def versions() -> dict[str, str]:
    names = ("disranker", "locust", "tritonclient", "grpcio", "gevent")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def result(
    recorder: Recorder, settings: dict[str, Any], cpu_share: float | None, server: dict, capacity: dict | None
) -> dict[str, Any]:
    """Everything a run found. settings: how it was made; server: the difference of Triton's counters."""
    seconds = [second for second, _ in recorder.tallies]
    first, last = (min(seconds), max(seconds) + 1) if seconds else (0, 1)
    arms = {}
    for arm in recorder.arms():
        arms[arm] = summary(recorder.window(arm, first, last), last - first)
        arms[arm]["slices"] = slices(recorder, arm, first, last)
    return {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": last - first,
        "settings": settings,
        "arms": arms,
        "capacity": capacity,
        "generator": generator(recorder, cpu_share),
        "server": server,
        "machine": machine(),
        "versions": versions(),
    }


def write(found: dict[str, Any], path: Path) -> None:
    """Aside and renamed, so that a watcher never reads half a file."""
    write_json(path, found)


def exit_code(found: dict[str, Any], searched: list[str] | None) -> int:
    """1 if a request failed, or, where capacity was searched, if one of the searched arms held no rate.

    The steps above an arm's capacity fail by design.
    """
    if searched is None:
        return int(any(row["failed"] or row["unanswered"] for row in found["arms"].values()))
    return int(any(found["capacity"].get(arm, {"rate": 0})["rate"] <= 0 for arm in searched))


def _of_chunks(row: dict[str, Any]) -> str:
    """What the load test says of chunks, where documents were read in several."""
    if row["chunks_per_second"] == row["pairs_per_second"]:
        return ""
    return f" in {row['chunks_per_second']:.0f} chunks/s, {row['chunks_per_page']:.0f} a page"


def lines(found: dict[str, Any]) -> list[str]:
    """The run in plain words, for the terminal."""

    def ms(value: float | None) -> str:
        return "failed" if value is None else f"{value:.1f} ms"

    out = []
    for arm, row in found["arms"].items():
        out.append(
            f"{arm}: {row['answered_per_second']:.1f} answers/s ({row['pairs_per_second']:.0f} pairs/s"
            f"{_of_chunks(row)}), "
            f"p50 {ms(row['p50_ms'])}, p95 {ms(row['p95_ms'])}, p99 {ms(row['p99_ms'])}, "
            f"{row['failed']} failed, {row['unanswered']} unanswered of {row['sent']}"
        )
    for arm, row in (found["capacity"] or {}).items():
        out.append(
            f"{arm}: capacity {row['rate']:.1f} requests/s at p99 <= {row['p99_target_ms']:g} ms "
            f"(limited by {row['limited_by']})"
        )
    out.append(f"generator: {found['generator']['meaning']}")
    return out
