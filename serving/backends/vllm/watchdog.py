"""Ends what a dead model process or a dead server leaves behind.

Run by the vLLM backend as `python -I watchdog.py SERVER_PID MODEL_PROCESS_PID`. Lines on stdin: `engine PID PID ...`
(vLLM's processes, whenever they are new), `bye` (an orderly end).

If stdin closes with no `bye`, the model process was killed or crashed: vLLM's processes would live on and hold their
memory, and the server, which does not notice, would let every caller wait for ever. So both are ended, and whoever runs
the server sees it exit. If the server is gone and the model process does not follow, as when it is killed while the
model loads, the model process is ended with everything it started.

Numbers of processes are used again, so a process is known by its number and its start.

Standard library only: this process lives as long as the server and should stay small. Linux, as the server is.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PATIENCE_SECONDS = 10.0


def main() -> None:
    """Wait until the model process or the server is gone, and then end what is left."""
    server, model_process = known(int(sys.argv[1])), int(sys.argv[2])
    engine: list[Process] = []
    for line in lines_until_abandoned(server):
        word, *rest = line.split()
        if word == "bye":
            return
        engine = [known(int(pid)) for pid in rest]
    if os.getppid() == model_process:  # it lives, and its server is gone; it may be loading: no engine known yet
        kill(map(known, [model_process, *descendants(model_process)]))
        say("the server is gone; the model process that it left was ended")
    kill(engine)
    if alive(server):
        kill([server], signal.SIGTERM)
        say("the model process has died; the server was told to end")
        time.sleep(PATIENCE_SECONDS)
        kill([server])  # it may wait for ever for answers that the dead process owes


class Process(NamedTuple):
    """A process by its number and its start, in clock ticks since boot; None: it had ended when it was asked for."""

    pid: int
    start: str | None


def known(pid: int) -> Process:
    """The process that has this number now."""
    return Process(pid, _start(pid))


def _start(pid: int) -> str | None:
    """When a process started; None if it has ended, also where its parent has not collected it yet."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else fields[18]


def lines_until_abandoned(server: Process) -> Iterator[str]:
    """The lines of stdin, until it closes or the server has been gone for PATIENCE_SECONDS."""
    rest = b""
    give_up: float | None = None
    while give_up is None or time.monotonic() < give_up:
        if select.select([0], [], [], 1.0)[0]:
            read = os.read(0, 65536)
            if not read:
                return
            *lines, rest = (rest + read).split(b"\n")
            yield from (line.decode() for line in lines)
        if give_up is None and not alive(server):
            give_up = time.monotonic() + PATIENCE_SECONDS  # an orderly end says bye in this time


def alive(process: Process) -> bool:
    """Whether a process still runs, and its number is not another one's by now."""
    return process.start is not None and _start(process.pid) == process.start


def descendants(pid: int) -> list[int]:
    """Every process below one, but for this one and Python's resource trackers, which free shared memory at the end."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return []
    below = [found for child in children for found in (child, *descendants(child))]
    return [found for found in below if found != os.getpid() and b"resource_tracker" not in command_line(found)]


def command_line(pid: int) -> bytes:
    """A process's arguments, each ended by a zero byte; empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill(processes: Iterable[Process], how: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to each process that still runs."""
    for process in processes:
        if alive(process):
            with contextlib.suppress(ProcessLookupError):  # ended this moment
                os.kill(process.pid, how)


def say(message: str) -> None:
    """Write a line to the server's log."""
    with contextlib.suppress(OSError):  # whoever read the log may have gone with the server
        print(f"[vllm] {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
