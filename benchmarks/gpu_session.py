"""Half an hour on one GPU, used well: every measurement worth having, in order of worth, each bounded and resumable.

    python -m benchmarks.gpu_session --out runs/gpu
    python -m benchmarks.gpu_session --out runs/gpu --tiny true          # the same steps at toy size, on a CPU too

Each step runs in a process of its own under its own time limit, and results.json is written after each: what is done is
not done again, what failed or ran out of time is recorded with its reason and tried again by the next call. All weights
are random, since time does not depend on them.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import gpu_steps
from ranking.errors import InputError
from ranking.files import replacing
from ranking.program import run

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One measurement. work: what runs (tiny or not) and returns plain JSON; minutes: its limit; needs: a module that
    must be installed."""

    work: Callable[[bool], dict[str, Any]]
    minutes: float
    needs: str = "torch"


STEPS = {
    "device": Step(gpu_steps.device, 2),
    "bert": Step(gpu_steps.bert_latency, 4),
    "tensorrt": Step(gpu_steps.tensorrt_latency, 8, needs="tensorrt"),
    "tensorrt_half_softmax": Step(partial(gpu_steps.tensorrt_latency, half_softmax=True), 8, needs="tensorrt"),
    "teacher_7b": Step(gpu_steps.teacher_latency, 3),
    "layouts": Step(gpu_steps.student_layouts, 4),
    "finetune": Step(gpu_steps.finetune_steps, 4),
    "finetune_fsdp": Step(gpu_steps.finetune_under_fsdp, 3),
    "distill": Step(gpu_steps.distill_steps, 4),
    "vllm": Step(gpu_steps.vllm_labels, 9, needs="vllm"),
}


@dataclass
class Config:
    """Run the measurements that are not done yet.

    Args:
        out: folder of results.json
        minutes: no step is started that could end later than this
        steps: names of steps, in order; none for all
        tiny: toy sizes, on whatever device there is: a rehearsal
        only: run this step alone, in this process, and print its result; the program starts each of its steps so
    """

    out: Path
    minutes: float = 30.0
    steps: list[str] = field(default_factory=list)
    tiny: bool = False
    only: str = ""

    def __post_init__(self) -> None:
        unknown = sorted({*self.steps, *filter(None, [self.only])} - set(STEPS))
        if unknown:
            raise ValueError(f"steps {', '.join(unknown)}: {', '.join(STEPS)} are known")


def main(config: Config) -> None:
    """Run each step that results.json lacks, within the time that is left. InputError without a GPU, unless tiny."""
    if config.only:
        print(json.dumps(STEPS[config.only].work(config.tiny)))
        return
    if not config.tiny and not gpu_steps.has_gpu():
        raise InputError("no CUDA device; --tiny true rehearses the steps on a CPU")
    config.out.mkdir(parents=True, exist_ok=True)
    results_file = config.out / "results.json"
    results = json.loads(results_file.read_text(encoding="utf-8")) if results_file.is_file() else {}
    end = time.monotonic() + config.minutes * 60
    for name in config.steps or STEPS:
        if "result" in results.get(name, {}):
            continue
        results[name] = attempt(config, name, end - time.monotonic())
        LOGGER.info("%s: %s", name, json.dumps(results[name]))
        with replacing(results_file) as aside:
            aside.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


def attempt(config: Config, name: str, seconds_left: float) -> dict[str, Any]:
    """Run one step in a child process: {"result": ...}, or {"failed": why}, and the seconds that it took."""
    step = STEPS[name]
    if importlib.util.find_spec(step.needs) is None:
        return {"failed": f"{step.needs} is not installed"}
    if step.minutes * 60 > seconds_left:
        return {"failed": f"{seconds_left:.0f} s were left, the step may take {step.minutes * 60:.0f}"}
    words = ["--out", str(config.out), "--tiny", str(config.tiny).lower(), "--only", name]
    command = [sys.executable, "-m", "benchmarks.gpu_session", *words]
    started = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=step.minutes * 60)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {step.minutes} minutes"}
    seconds = round(time.monotonic() - started, 1)
    if done.returncode:
        return {"failed": "\n".join(done.stderr.strip().splitlines()[-5:]), "seconds": seconds}
    return {"result": json.loads(done.stdout.strip().splitlines()[-1]), "seconds": seconds}


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.gpu_session --out runs/gpu")
