"""Tasks on the loop of the vLLM backend's engine, without an engine."""

from __future__ import annotations

import asyncio
import threading

import pytest

from serving.backends.vllm.engine import Engine


@pytest.fixture
def engine():
    made = Engine.__new__(Engine)
    made._loop = asyncio.new_event_loop()
    thread = threading.Thread(target=made._loop.run_forever)
    thread.start()
    yield made
    made._loop.call_soon_threadsafe(made._loop.stop)
    thread.join()
    made._loop.close()


def test_a_task_that_is_cancelled_before_its_first_step_is_still_reported(engine):
    ran, over = [], threading.Event()
    ended = []

    async def work():
        ran.append(True)

    cancelled = threading.Event()
    engine._loop.call_soon_threadsafe(cancelled.wait, 60)  # the loop is busy until the cancellation is there too
    cancel = engine.run(work(), lambda task: (ended.append(task.cancelled()), over.set()))
    cancel()
    cancelled.set()
    assert over.wait(60)
    assert (ran, ended) == ([], [True])


def test_a_cancelled_task_is_reported_when_it_is_over_and_not_before(engine):
    seen, started, over = [], threading.Event(), threading.Event()

    async def work():
        try:
            started.set()
            await asyncio.sleep(600)
        finally:
            await asyncio.sleep(0.2)  # an end that takes its time
            seen.append("let go")

    cancel = engine.run(work(), lambda task: (seen.append("ended"), over.set()))
    assert started.wait(60)
    cancel()
    assert over.wait(60)
    assert seen == ["let go", "ended"]
