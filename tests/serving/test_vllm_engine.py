"""Tasks on the loop of the vLLM backend's engine, without an engine."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.backends.vllm import engine as engine_module
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


class Collector:
    def __init__(self, request_id: str):
        self.request_id, self.answer = request_id, asyncio.get_running_loop().create_future()

    def get_nowait(self):
        return None

    async def get(self):
        return await asyncio.shield(self.answer)


class Llm:
    """vLLM's engine without a model: notes what it is asked and what is given up. `refuse`: a prompt, and the error."""

    errored = False

    def __init__(self, refuse: dict[str, Exception]):
        self.refuse, self.begun, self.aborted = refuse, [], []

    async def add_request(self, key, prompt, parameters):
        if prompt in self.refuse:
            raise self.refuse[prompt]
        self.begun.append(Collector(key))
        return self.begun[-1]

    async def abort(self, keys, internal):
        self.aborted += keys


@pytest.fixture
def finish(engine, monkeypatch):
    """finish(llm, prompts) -> the concurrent future of Engine.finished, on an engine whose vLLM is that one."""
    pytest.importorskip("vllm")
    monkeypatch.setattr(engine_module, "_rendered", lambda llm, prompts: list(prompts))
    engine._renderer = ThreadPoolExecutor(1)

    def begin(llm: Llm, prompts: list[str]):
        engine._llm = llm
        return engine.submit(engine.finished(prompts, {"max_tokens": 1}, "7"))

    yield begin
    engine._renderer.shutdown()


async def until_begun(llm: Llm, count: int) -> None:
    while len(llm.begun) < count:
        await asyncio.sleep(0.01)


def test_prompts_of_a_request_are_answered_in_order_whichever_is_first(engine, finish):
    llm = Llm({})
    answers = finish(llm, [f"prompt {number}" for number in range(40)])
    engine.submit(until_begun(llm, 40)).result(60)
    for number in reversed(range(40)):
        engine._loop.call_soon_threadsafe(llm.begun[number].answer.set_result, number)
    assert answers.result(60) == list(range(40)) and not llm.aborted


def test_a_cancelled_request_gives_up_all_its_prompts(engine, finish):
    llm = Llm({})
    answers = finish(llm, ["a", "b", "c"])
    engine.submit(until_begun(llm, 3)).result(60)
    answers.cancel()

    async def until_given_up():
        while len(llm.aborted) < 3:
            await asyncio.sleep(0.01)

    engine.submit(until_given_up()).result(60)
    assert llm.aborted == ["7-0", "7-1", "7-2"]


def test_a_refused_prompt_gives_up_those_before_it_and_keeps_its_reason(finish):
    from vllm.exceptions import VLLMValidationError

    llm = Llm({"c": VLLMValidationError("too long")})
    with pytest.raises(VLLMValidationError, match="too long"):
        finish(llm, ["a", "b", "c", "d"]).result(60)
    assert llm.aborted == ["7-0", "7-1"] and len(llm.begun) == 2


def test_a_failure_inside_vllm_is_not_taken_for_the_callers(engine, finish):
    from vllm.v1.engine.exceptions import EngineGenerateError

    llm = Llm({})
    answers = finish(llm, ["a", "b"])
    engine.submit(until_begun(llm, 2)).result(60)
    engine._loop.call_soon_threadsafe(llm.begun[0].answer.set_exception, TypeError("inside"))
    with pytest.raises(EngineGenerateError) as raised:
        answers.result(60)
    assert isinstance(raised.value.__cause__, TypeError) and llm.aborted == ["7-0", "7-1"]
