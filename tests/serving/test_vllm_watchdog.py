"""The process that clears up after a vLLM backend that was killed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import serving
from serving.backends.vllm import watchdog

BUSY_SECONDS = 90  # a busy machine may take long to start a process; a quiet one never waits for this
WATCHDOG = Path(serving.__file__).parent / "backends" / "vllm" / "watchdog.py"


@pytest.fixture
def sleeper():
    """A function that starts a process which would sleep for long."""
    started = []

    def start() -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def watch(server: subprocess.Popen) -> subprocess.Popen:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-I", str(WATCHDOG), str(server.pid), str(gone.pid)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True)


def test_it_ends_the_engine_and_the_server_when_the_model_process_is_gone(sleeper):
    server, replaced, engine, worker = sleeper(), sleeper(), sleeper(), sleeper()
    process = watch(server)
    process.stdin.write(f"engine {replaced.pid}\nengine {engine.pid} {worker.pid}\n")
    process.stdin.close()
    assert engine.wait(BUSY_SECONDS) != 0
    assert worker.wait(BUSY_SECONDS) != 0
    assert server.wait(BUSY_SECONDS) != 0
    assert replaced.poll() is None  # an earlier engine's process ids may be someone else's by now
    process.kill()
    process.wait()


def test_it_touches_nothing_after_an_orderly_end(sleeper):
    server, engine = sleeper(), sleeper()
    process = watch(server)
    process.communicate(f"engine {engine.pid}\nbye\n", timeout=BUSY_SECONDS)
    assert process.returncode == 0
    assert (server.poll(), engine.poll()) == (None, None)


@pytest.mark.parametrize("log_reader", ["there", "gone"])
def test_a_model_process_whose_server_is_gone_is_ended_with_what_it_started(sleeper, log_reader):
    server = sleeper()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    model_process = subprocess.Popen([sys.executable, "-c", MODEL_PROCESS, str(WATCHDOG), str(server.pid)], **pipes)
    child = psutil.Process(int(model_process.stdout.readline()))
    try:
        if log_reader == "gone":
            model_process.stderr.close()
        server.kill()  # not collected yet: a zombie counts as gone
        assert model_process.wait(BUSY_SECONDS) == -signal.SIGKILL
        child.wait(BUSY_SECONDS)
        if log_reader == "there":
            assert b"the server is gone" in model_process.stderr.readline()
    finally:
        for process in (model_process, child):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_it_spares_a_stranger_that_has_the_model_process_number(sleeper):
    """As when both are killed at once: its parent is then process 1, not the model process."""
    server, stranger = sleeper(), sleeper()
    command = [sys.executable, "-I", str(WATCHDOG), str(server.pid), str(stranger.pid)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    server.kill()
    assert process.wait(BUSY_SECONDS) == 0
    assert stranger.poll() is None


def test_it_spares_a_process_that_has_the_number_of_one_which_ended(sleeper):
    stranger = sleeper()
    ended = watchdog.known(stranger.pid)._replace(start="1")  # started in the first tick after boot
    watchdog.kill([ended])
    assert not watchdog.alive(ended) and watchdog.alive(watchdog.known(stranger.pid))
    watchdog.kill([watchdog.known(stranger.pid)])
    assert stranger.wait(BUSY_SECONDS) == -signal.SIGKILL
    assert not watchdog.alive(watchdog.known(stranger.pid))


# a backend that is loading: it has a watchdog, which does not know its processes yet
MODEL_PROCESS = """
import os, subprocess, sys, time
watchdog = subprocess.Popen([sys.executable, "-I", *sys.argv[1:], str(os.getpid())], stdin=subprocess.PIPE)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
