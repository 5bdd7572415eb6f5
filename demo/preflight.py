"""What a machine needs before anything is started: said in one line at once, not by a failure half an hour later."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import psutil

from ranking.errors import InputError

GIB = 2**30
DISK_GIB = 4  # checkpoints, engines, labels and logs of a run
MEMORY_GIB = {True: 8, False: 5}  # with and without a decoder teacher, whose server holds vLLM


def check_machine(out: Path, decoder_teacher: bool) -> None:
    """InputError if the disk of `out` or the free memory is too small for a run of the demo."""
    free = shutil.disk_usage(_existing(out)).free / GIB
    if free < DISK_GIB:
        raise InputError(f"{out}: {free:.1f} GiB are free on its disk, a run needs {DISK_GIB}; another OUT= may do")
    memory, wanted = psutil.virtual_memory().available / GIB, MEMORY_GIB[decoder_teacher]
    if memory < wanted:
        raise InputError(f"{memory:.1f} GiB of memory are free, this run needs {wanted}: end other programs first")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_ports(flags: dict[int, str]) -> None:
    """InputError if another program listens on a port of 127.0.0.1. flags: port -> the flag that sets it."""
    for port, flag in flags.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as problem:
                raise InputError(
                    f"port {port} is taken ({problem.strerror}): give another, such as "
                    f"`python -m demo.serve start {flag} {port + 10}`"
                ) from problem


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
