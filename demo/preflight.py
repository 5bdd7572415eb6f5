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
    """InputError if the disk of `out`, the free memory or the processor is too small for a run of the demo."""
    if decoder_teacher and not processor_has("avx2"):
        raise InputError(
            "this processor has no AVX2, without which vLLM serves no teacher on a CPU: run on a newer machine, or "
            "`make demo DATA=PATH`, whose teacher needs no vLLM"
        )
    free = shutil.disk_usage(_existing(out)).free / GIB
    if free < DISK_GIB:
        raise InputError(f"{out}: {free:.1f} GiB are free on its disk, a run needs {DISK_GIB}; another OUT= may do")
    memory, wanted = psutil.virtual_memory().available / GIB, MEMORY_GIB[decoder_teacher]
    if memory < wanted:
        raise InputError(f"{memory:.1f} GiB of memory are free, this run needs {wanted}: end other programs first")


def slower_processor() -> str:
    """A line for whoever runs the demo where bf16 is no faster than fp32; "" where the processor multiplies bf16."""
    if processor_has("avx512_bf16") or processor_has("amx_bf16"):
        return ""
    wide = "no AVX-512 BF16 and no AMX" if processor_has("avx512f") else "no AVX-512"
    return f"This processor has {wide}: training runs in fp32 there, about half as fast."


def processor_has(feature: str) -> bool:
    """Whether the processor has a feature, as Linux names it. True where nothing says which it has."""
    flags = {word for line in _processor().splitlines() if line.startswith("flags") for word in line.split()}
    return feature in flags or not flags


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system
        return ""


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
