"""Start the router beside a test, a benchmark or a demo, on a free port of 127.0.0.1, and stop it by its process id.

with start_router(Path("experiments.yaml"), "127.0.0.1:8001", Path("runs/ab/log")) as router:
    httpx.post(f"{router.url}/rank", json=...)
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ranking.errors import InputError

PROGRAM = Path(__file__).parents[2] / "ab_router.py"


@dataclass
class LocalRouter:
    """A running router. url: where it answers; output: everything it printed."""

    url: str
    process: subprocess.Popen
    output: Path


@contextmanager
def start_router(
    experiment: Path,
    triton_url: str,
    log: Path,
    *flags: str,
    timeout: float = 60.0,
    command: Sequence[str] = (sys.executable, str(PROGRAM)),
) -> Iterator[LocalRouter]:
    """Start `ab_router.py`, or another command that takes its flags, and wait until it listens; SIGTERM at the end.

    The users beside a test or demo are made up, so their ids are stored as they are unless the flags name a salt.
    InputError with its output if it does not start.
    """
    log.mkdir(parents=True, exist_ok=True)
    output = log / f"router-{time.time_ns()}.txt"
    if "--salt-file" not in flags:
        flags += ("--raw-ids",)
    if "--drain-seconds" not in flags:
        flags += ("--drain-seconds", "0")  # no balancer sends requests here that would have to be told
    named = ["--experiment", str(experiment), "--url", triton_url, "--log", str(log), "--port", "0", *flags]
    with output.open("wb") as stream:
        process = subprocess.Popen([*command, *named], stderr=stream, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + timeout
        while not (found := re.search(r'listening on ([^\s"]+)', output.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > deadline:
                raise InputError(f"the router did not start:\n{output.read_text(errors='replace')}")
            time.sleep(0.02)
        yield LocalRouter(found[1], process, output)
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
