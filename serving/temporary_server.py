"""A real tritonserver for the length of a `with` block, on free ports: for tests, benchmarks and the demo.

The server is stopped at the end of the block, with every process that it started.

with start_triton(Path("model_repository")) as server:
    client = tritonclient.grpc.InferenceServerClient(server.grpc)
"""

from __future__ import annotations

import ctypes
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ranking.errors import InputError

START_ATTEMPTS = 3  # another program may take a free port before the server does
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # opened here: a child of a process with threads must not wait for the loader's lock


@dataclass
class TritonServer:
    """A running server. http, grpc, metrics: "host:port"; log: everything it printed; stragglers: see stop()."""

    http: str
    grpc: str
    metrics: str
    log: Path
    process: subprocess.Popen = field(repr=False)
    stragglers: list[str] = field(default_factory=list)
    known_children: list[psutil.Process] = field(default_factory=list, repr=False)

    @property
    def pid(self) -> int:
        """Process id of the server itself."""
        return self.process.pid

    def is_ready(self) -> bool:
        """Whether the server and all its models are ready."""
        return _answers(f"http://{self.http}/v2/health/ready")

    def model_is_ready(self, model: str) -> bool:
        """Whether one model is ready, in its served versions."""
        return _answers(f"http://{self.http}/v2/models/{model}/ready")

    def children(self) -> list[psutil.Process]:
        """Every process below the server: Python stubs, vLLM's engine and its workers. Empty once it has exited."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def log_tail(self, lines: int = 80) -> str:
        """The end of the log without the server's tables, which would push the reason out of sight."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join([line for line in text.splitlines() if not line.startswith(("+-", "| "))][-lines:])

    def stop(self, patience_seconds: float = 45.0) -> int:
        """SIGTERM, wait, and end what is left after patience_seconds. Returns the server's exit code.

        `stragglers` then names the processes that had to be killed: empty after a clean shutdown.
        """
        family = list({*self.known_children, *self.children()})  # known ones matter if the server has died already
        deadline = time.monotonic() + patience_seconds
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            self.stragglers.append(f"tritonserver {self.pid}")
            self.process.kill()
            self.process.wait()
        # a process that left with its parent may be a moment behind it
        _, alive = psutil.wait_procs(family, timeout=max(5.0, deadline - time.monotonic()))
        for child in alive:
            self.stragglers.append(f"{child.name()} {child.pid}")
            child.kill()
        return self.process.returncode


@contextmanager
def start_triton(
    repository: Path, *flags: str, timeout_seconds: float = 240.0, environment: Mapping[str, str] | None = None
) -> Iterator[TritonServer]:
    """Start `tritonserver --model-repository repository` on free ports of 127.0.0.1 and wait until it is ready.

    flags: further server flags; timeout_seconds: to become ready; environment: variables to add to this process's own.
    InputError with the end of the log if it exits early or is not ready in time. Call it on the main thread where you
    can: only then does the server also end when this process is killed outright.
    """
    with tempfile.TemporaryDirectory(prefix="tritonserver-") as folder:
        for attempt in range(1, START_ATTEMPTS + 1):
            server = _launch(repository, flags, Path(folder) / f"server-{attempt}.log", environment or {})
            try:
                _wait_until_ready(server, timeout_seconds)
                server.known_children = server.children()
                yield server
                return
            except _PortTaken:
                if attempt == START_ATTEMPTS:
                    raise
            finally:
                server.stop()


class _PortTaken(InputError):
    """Another program took a port between our look and the server's."""


def _launch(repository: Path, flags: tuple[str, ...], log: Path, environment: Mapping[str, str]) -> TritonServer:
    http, grpc, metrics = free_ports(3)
    command = [
        *(sys.executable, "-m", "serving.tritonserver", f"--model-repository={repository}"),
        *("--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1"),
        *(f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"),
        *flags,
    ]
    follow = threading.current_thread() is threading.main_thread()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            cwd=Path(__file__).resolve().parents[1],
            preexec_fn=end_with_parent if follow else None,
        )
    return TritonServer(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", f"127.0.0.1:{metrics}", log, process)


def end_with_parent() -> None:
    """Before a program starts: have Linux send it SIGTERM once the process (in fact the thread) that starts it is gone.

    Nothing happens on other systems.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that no program listens on now; another one may take them before the caller does.

    They lie below those that Linux gives to whoever asks for any port and to every connection, so that only a program
    that names one itself can. InputError if there are none.
    """
    found: list[int] = []
    for port in random.Random().sample(range(20_000, 32_768), 1000):  # not two callers the same ones
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) >= count:
            return found
    raise InputError("no free ports on 127.0.0.1")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (OSError, http.client.HTTPException):  # the latter: whatever listens there speaks no HTTP
        return False


def _wait_until_ready(server: TritonServer, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not server.is_ready():
        if server.process.poll() is not None:
            tail = server.log_tail()
            taken = "address already in use" in tail.lower() or "failed to bind" in tail.lower()
            raise (_PortTaken if taken else InputError)(
                f"tritonserver exited with {server.process.returncode} before it was ready:\n{tail}"
            )
        if time.monotonic() > deadline:
            raise InputError(f"tritonserver was not ready after {timeout_seconds:.0f} s:\n{server.log_tail()}")
        time.sleep(0.1)
