"""vLLM's asynchronous engine on an event loop of its own thread: start, generate, restart after a crash, stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import multiprocessing.spawn
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

SERVER = os.getppid()  # as early as it can be asked: a parent that dies later is replaced by another process's number
CPU_CACHE_GIB = "1"  # vLLM would otherwise ask for most of the machine's memory
RENDERED_AT_ONCE = 16
SHUTDOWN_SECONDS = 5.0  # for vLLM's own way out, which a busy machine makes long; Triton waits 30 s for all of it


def engine_arguments(version_folder: Path) -> dict[str, Any]:
    """vLLM's engine arguments from model.json of a version folder.

    ValueError if the file is absent or not an object. A path is taken relative to the server's working
    directory, as NVIDIA's backend does; but a folder of that name inside the version folder goes first, so that a
    repository that was moved still loads its own.
    """
    path = version_folder / "model.json"
    try:
        arguments = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path}: vLLM's engine arguments cannot be read: {problem}") from problem
    if not isinstance(arguments, dict) or not isinstance(arguments.get("model"), str):
        raise ValueError(f"{path}: a JSON object with a string 'model' is expected")
    for name in ("model", "tokenizer"):
        inside = version_folder / Path(str(arguments.get(name, ""))).name
        if arguments.get(name) and inside.is_dir():
            arguments[name] = str(inside)
    if str(arguments.get("enable_lora", "false")).lower() == "true":
        raise ValueError(f"{path}: enable_lora is not offered here; build a merged model")
    return arguments


class Engine:
    """A running engine. Its coroutines run on the loop of its own thread; `submit` hands one over from any thread.

    arguments: vLLM engine arguments. Raises what vLLM raised if the engine cannot start.
    """

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments
        self._watchdog = _start_watchdog()
        self._sockets = tempfile.TemporaryDirectory(prefix="vllm-")  # vLLM leaves its sockets where it makes them
        os.environ["VLLM_RPC_BASE_PATH"] = self._sockets.name
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-engine", daemon=True)
        self._thread.start()
        self._renderer = ThreadPoolExecutor(1, "renderer")  # vLLM copies the tokenizer for each thread that uses it
        try:
            self.submit(self.start()).result()
            self.submit(self._warm_up()).result()
        except BaseException:
            self._end_thread()
            raise

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future:
        """Run a coroutine on the engine's loop, from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(
        self, coroutine: Coroutine[Any, Any, None], ended: Callable[[asyncio.Task], object]
    ) -> Callable[[], object]:
        """Start a task from any thread; `ended` is called with it on the loop when it is over, cancelled or not.

        Returns a function that cancels it, for any thread too.
        """
        tasks: list[asyncio.Task] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(coroutine))
            tasks[0].add_done_callback(ended)

        self._loop.call_soon_threadsafe(begin)
        return lambda: self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())  # calls run in order: after begin

    async def start(self) -> None:
        """(Re)start vLLM. Done off the loop, so that requests are still refused in time while it loads."""
        self._llm: Any = await asyncio.to_thread(_new_llm, self.arguments)
        # without Python's resource tracker, which frees shared memory when all others have gone
        children = psutil.Process().children(recursive=True)
        self._processes = [process for process in children if process.name().startswith("VLLM::")]
        self._tell_watchdog(f"engine {' '.join(str(process.pid) for process in self._processes)}")

    @property
    def is_dead(self) -> bool:
        """Whether vLLM's engine process has ended or failed beyond use."""
        return self._llm.errored

    async def stream(self, prompt: str, sampling: dict[str, Any], key: str) -> AsyncIterator[Any]:
        """vLLM's outputs for a prompt as they grow. ValueError for bad sampling parameters."""
        async for output in self._llm.generate({"prompt": prompt}, _sampling_parameters(sampling, stream=True), key):
            yield output

    async def finished(self, prompts: Sequence[str], sampling: dict[str, Any], key: str) -> list[Any]:
        """vLLM's final output for each prompt. ValueError for bad sampling parameters or a prompt that is too long.

        One failure is that of all: those that were begun are given up, as they are when this is cancelled. Tokenised
        together in one thread, begun without a task for each: beside a small teacher both cost more than its scheduler.
        EngineGenerateError, from what vLLM raised, where it is not the prompts' fault.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        parameters = _sampling_parameters(sampling, stream=False)
        llm = self._llm  # it may be started again meanwhile
        begun: list[Any] = []
        try:
            for start in range(0, len(prompts), RENDERED_AT_ONCE):  # long requests let others in between
                part = prompts[start : start + RENDERED_AT_ONCE]
                for prompt in await self._loop.run_in_executor(self._renderer, _rendered, llm, part):
                    begun.append(await llm.add_request(f"{key}-{len(begun)}", prompt, parameters))
            return [collector.get_nowait() or await collector.get() for collector in begun]
        except BaseException as problem:
            if not llm.errored:
                await llm.abort([collector.request_id for collector in begun], internal=True)
            if isinstance(problem, Exception) and not isinstance(problem, VLLMClientError | EngineDeadError):
                raise EngineGenerateError from problem
            raise

    async def discard(self) -> None:
        """End the engine and what is left of its processes: workers outlive an engine that died. It holds no state."""
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()  # it would report the end that is wanted here as a failure
        await asyncio.to_thread(self._llm.shutdown, SHUTDOWN_SECONDS)
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # is_running also tells a reused process id apart
                if process.is_running():
                    process.kill()

    async def _warm_up(self) -> None:
        """One request, so that what vLLM compiles or imports at the first one is done before the model is ready."""
        await self.finished(["warm-up"], {"max_tokens": 1, "temperature": 0, "logprobs": 0}, "warm-up")

    def close(self) -> None:
        """Stop vLLM and its processes, then the thread."""
        self.submit(self._close()).result()
        self._end_thread()
        gc.collect()  # the engine's reference cycles hold sockets that would keep this process from ending

    async def _close(self) -> None:
        await self.discard()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await self._loop.shutdown_default_executor()

    def _tell_watchdog(self, line: str) -> None:
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.write(f"{line}\n")
        self._watchdog.stdin.flush()

    def _end_thread(self) -> None:
        self._renderer.shutdown(cancel_futures=True)
        self._tell_watchdog("bye")
        self._watchdog.wait()
        self._sockets.cleanup()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _start_watchdog() -> subprocess.Popen:
    """The process that ends vLLM's and the server if this one dies without a word. In a session of its own, out of the
    reach of the terminal's Ctrl-C, which would end it first.
    """
    script = str(Path(__file__).with_name("watchdog.py"))
    command = [sys.executable, "-I", script, str(SERVER), str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)


def _new_llm(arguments: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    if current_platform.is_cpu() and arguments.get("kv_cache_memory_bytes") is None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
    if current_platform.is_cpu() and arguments.get("enforce_eager"):
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # vLLM would still compile parts of its sampler, for 10 s
    multiprocessing.spawn.set_executable(sys.executable)
    # vLLM's statistics of each request end in this process: what the page shows is counted in meters.py
    chosen = AsyncEngineArgs(**{"disable_log_stats": True, **arguments})
    # A teacher labels: batches are as large as vLLM makes them offline, where nobody waits for the next token.
    return AsyncLLM.from_engine_args(chosen, usage_context=UsageContext.LLM_CLASS)


def _rendered(llm: Any, prompts: Sequence[str]) -> list[Any]:
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    return llm.renderer.render_cmpl([parse_model_prompt(llm.model_config, {"prompt": text}) for text in prompts])


def _sampling_parameters(values: dict[str, Any], stream: bool) -> Any:
    """SamplingParams with every type checked: a wrong one would otherwise only fail inside the engine, and end it.

    Numbers written as strings are accepted, as NVIDIA's backend does.
    """
    import msgspec
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    names = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")} - {"output_kind"}
    unknown = sorted(set(values) - names)
    if unknown:
        raise ValueError(f"sampling_parameters: unknown: {', '.join(unknown)}")
    try:
        parameters = msgspec.convert(values, SamplingParams, strict=False)
    except msgspec.ValidationError as problem:
        raise ValueError(f"sampling_parameters: {problem}") from problem
    parameters.output_kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    return parameters
