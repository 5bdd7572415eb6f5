"""`make serve` and `make stop`: a demo run's models behind tritonserver, with the A/B router and the search page."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from demo.preflight import check_ports
from demo.run import ARMS, experiment_text, only_arms
from demo.stages import ROOT
from ranking.errors import InputError
from ranking.files import write_json
from ranking.program import run

STATE = ROOT / "runs" / "serve"
READY_SECONDS = 120.0
PROGRAMS = ("tritonserver", "ab_router", "search_page")


@dataclass
class Config:
    """Serve the models of a demo run on this machine, or stop serving them.

    Args:
        action: start or stop
        out: folder of the demo run; the newest that published a student when left out
        http_port: Triton's HTTP port; gRPC and metrics are the next two
        router_port: port of the A/B router
        page_port: port of the search page
    """

    action: Literal["start", "stop"] = "start"
    out: Path | None = None
    http_port: int = 8000
    router_port: int = 8080
    page_port: int = 8090

    def __post_init__(self) -> None:
        for name, most in (("http_port", 65533), ("router_port", 65535), ("page_port", 65535)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}: a port from 1 to {most} is needed")


def newest_run() -> Path:
    """The folder below runs/ whose demo was the last to publish a student. InputError if there is none."""
    finished = sorted((ROOT / "runs").glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    served = [path.parent for path in finished if (path.parent / "model_repository" / "student").is_dir()]
    if not served and finished:
        raise InputError(
            f"{finished[-1].parent}: its student was not published (do not ship), so there is none to serve"
        )
    if not served:
        raise InputError("no finished demo run under runs/; run `make demo` first, or name one with OUT=")
    return served[-1]


def commands(config: Config, out: Path) -> dict[str, tuple[list[str], str]]:
    """name -> (command, address that answers once it is ready)."""
    grpc = f"127.0.0.1:{config.http_port + 1}"
    ports = {"http": config.http_port, "grpc": config.http_port + 1, "metrics": config.http_port + 2}
    triton = [
        *("-m", "serving.tritonserver", f"--model-repository={out / 'model_repository'}", *only_arms(*ARMS)),
        *(f"--{protocol}-port={port}" for protocol, port in ports.items()),
        *("--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1"),
    ]
    experiment = STATE / "experiment.yaml"
    router = [
        *("clients/ab_router.py", "--experiment", str(experiment), "--url", grpc, "--log", str(STATE / "log")),
        *("--raw-ids", "--drain-seconds", "0"),  # the users are made up, and no balancer is to be told of the end
        *("--port", str(config.router_port), "--deadline-ms", "1000"),
    ]
    page = [
        *("clients/search_page.py", "--data", str(out / "data"), "--url", grpc, "--port", str(config.page_port)),
        *("--judgments", str(STATE / "judgments.csv")),
    ]
    return {
        "tritonserver": (triton, f"http://127.0.0.1:{config.http_port}/v2/models/student/ready"),
        "router": (router, f"http://127.0.0.1:{config.router_port}/health"),
        "search page": (page, f"http://127.0.0.1:{config.page_port}/"),
    }


def start(config: Config) -> None:
    """Start the programs in the background, each once the one before is ready. InputError if one does not start."""
    out = (config.out or newest_run()).resolve()
    if not (out / "model_repository" / "student").is_dir():
        raise InputError(f"{out}: no built student there; run `make demo` first")
    if running():
        raise InputError("already serving; `make stop` first")
    triton = dict.fromkeys(range(config.http_port, config.http_port + 3), "--http-port")
    check_ports(triton | {config.router_port: "--router-port", config.page_port: "--page-port"})
    STATE.mkdir(parents=True, exist_ok=True)
    (STATE / "experiment.yaml").write_text(experiment_text(), encoding="utf-8")
    pids: dict[str, int] = {}
    try:
        for name, (command, address) in commands(config, out).items():
            log = STATE / f"{name.replace(' ', '_')}.log"
            with log.open("wb") as stream:
                process = subprocess.Popen(
                    [sys.executable, *command],
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    start_new_session=True,
                )
            pids[name] = process.pid
            write_json(STATE / "pids.json", pids)
            wait_until_ready(name, process, address, log)
            print(f"{name}: {address}", flush=True)
    except BaseException:  # Ctrl-C too, which does not reach what was started here
        stop()
        raise
    page, router = (f"http://127.0.0.1:{port}" for port in (config.page_port, config.router_port))
    print(f"\nSearch: {page}/   Router: {router}/docs   `make stop` ends it")


def wait_until_ready(name: str, process: subprocess.Popen, address: str, log: Path) -> None:
    """Wait until the address answers. InputError with the log's end if the process exits, or after READY_SECONDS."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise InputError(f"{name} did not start (exit code {process.returncode}); the end of {log}:\n{tail}")
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (OSError, http.client.HTTPException):  # the latter: whatever listens there speaks no HTTP
            time.sleep(0.3)
    raise InputError(f"{name} is not ready after {READY_SECONDS:.0f} s; see {log}")


def running() -> dict[str, psutil.Process]:
    """The processes of the last start that still run. A process id that another program has now does not count."""
    try:
        pids = json.loads((STATE / "pids.json").read_text())
    except FileNotFoundError:
        return {}
    alive = {}
    written = (STATE / "pids.json").stat().st_mtime
    for name, pid in pids.items():
        try:
            process = psutil.Process(pid)
            ours = process.create_time() < written + 1 and process.status() != psutil.STATUS_ZOMBIE
            if ours and any(word in " ".join(process.cmdline()) for word in PROGRAMS):
                alive[name] = process
        except psutil.NoSuchProcess:
            continue
    return alive


def stop() -> None:
    """End what the last start left running, the last one first, and print what it was."""
    alive = running()
    for process in reversed(list(alive.values())):
        family = process.children(recursive=True)
        os.kill(process.pid, signal.SIGTERM)
        _, left = psutil.wait_procs([process, *family], timeout=30)
        for child in left:
            child.kill()
    (STATE / "pids.json").unlink(missing_ok=True)
    print(f"stopped: {', '.join(alive) or 'nothing was running'}")


def main(config: Config) -> None:
    """Start or stop."""
    if config.action == "stop":
        stop()
    else:
        start(config)


if __name__ == "__main__":
    run(main, Config, example="python -m demo.serve start --out runs/demo", positional=("action",))
