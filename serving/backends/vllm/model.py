"""`backend: "vllm"` for installs without NVIDIA's vLLM container: the stock backend's tensors on the real vLLM engine.

Requests are handed to vLLM as they come and answered as they finish, so a long one holds up no other. Every request
gets an answer: a score, or an error with its reason. If the engine process dies, waiting callers are told so at once;
under `--model-control-mode=explicit` the model is unloaded (it is then not ready), else the engine is started again and
requests are refused until it runs.
"""

from __future__ import annotations

import asyncio
import faulthandler
import locale
import os
import signal
import sys
import traceback
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

# The embedded interpreter starts in the C locale, where open() reads ASCII and `import vllm` fails on its own sources.
locale.setlocale(locale.LC_CTYPE, "C.UTF-8")

from serving.backends.vllm import tensors  # noqa: E402
from serving.backends.vllm.engine import SERVER, Engine, engine_arguments  # noqa: E402
from serving.backends.vllm.meters import Meters  # noqa: E402
from serving.backends.vllm.replies import Reply, ReplyThread  # noqa: E402

HEALTH_POLL_SECONDS = 1.0
REPORT_SECONDS = 1.0
SHUTDOWN_GRACE_SECONDS = 3.0
FINALIZE_TRACE_SECONDS = 20.0  # less than the 30 s that Triton waits by default before it gives up
RESTART_PAUSES_SECONDS = (0.0, 5.0, 30.0)


class TritonPythonModel:
    """One teacher. Triton calls initialize, execute (with every request that has come) and finalize on one thread."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Triton's model configuration with every tensor of the stock backend."""
        return tensors.declare(config)

    def initialize(self, args: dict[str, str]) -> None:
        """Start vLLM and the reply thread. Raises what vLLM raises if its engine cannot start."""
        self.name = args["model_name"]
        self.down: str | None = None  # why requests are refused, while they are
        self.meters = Meters(args["model_name"], args["model_version"])
        self.engine = Engine(engine_arguments(Path(pb_utils.get_model_dir())))
        self.replies = ReplyThread()
        self.numbers = count()  # of the requests; goes on when the engine is started again
        self.engine.submit(self._watch_health())
        self.engine.submit(self._report())
        pb_utils.Logger.log_info(f"[vllm] {self.name}: engine is running")

    def execute(self, requests: list[Any]) -> None:
        """Hand the requests to vLLM and return; each is answered through its response sender when it is finished."""
        for request in requests:
            reply = Reply(request.get_response_sender())
            try:
                call = tensors.Call.of_request(request)
            except tensors.RefusedRequest as problem:
                self.replies.refuse(reply, str(problem), pb_utils.TritonError.INVALID_ARG)
                continue
            self.replies.watch(reply)  # before it can be answered, so that it is never watched after its last response
            reply.cancel = self.engine.run(self._answer(call, reply), partial(self._refuse_if_cancelled, reply))

    def finalize(self) -> None:
        """Refuse new requests, end vLLM, then the reply thread."""
        self.down = "the server is shutting down"
        faulthandler.dump_traceback_later(FINALIZE_TRACE_SECONDS, file=sys.stderr)  # in the log, should an end hang
        self.engine.close()
        self.replies.close()
        self.meters.close()
        faulthandler.cancel_dump_traceback_later()
        pb_utils.Logger.log_info(f"[vllm] {self.name}: engine has ended")

    async def _answer(self, call: tensors.Call, reply: Reply) -> None:
        from vllm.exceptions import VLLMClientError

        error = pb_utils.TritonError
        if self.down:
            return self.replies.refuse(reply, self.down, error.UNAVAILABLE)
        key = str(next(self.numbers))
        try:
            if not call.stream:
                outputs = await self.engine.finished(call.prompts, call.sampling, key)
                self.replies.send(reply, call.response(outputs), final=True)
                self.meters.count(outputs)
                return
            async for output in self.engine.stream(call.prompts[0], call.sampling, key):
                self.replies.send(reply, call.response([output]), final=output.finished)
                if output.finished:
                    self.meters.count([output])
        except (VLLMClientError, ValueError, TypeError, OverflowError) as problem:
            self.replies.refuse(reply, f"{problem}", error.INVALID_ARG)
        except Exception as problem:
            if self.engine.is_dead:
                self.replies.refuse(reply, "vLLM's engine process has died", error.UNAVAILABLE)
            else:
                pb_utils.Logger.log_error(f"[vllm] {self.name}: {traceback.format_exc()}")
                cause = problem.__cause__ or problem
                self.replies.refuse(reply, f"{type(cause).__name__}: {cause}", error.INTERNAL)

    def _refuse_if_cancelled(self, reply: Reply, answering: asyncio.Task) -> None:
        """Tell a caller whose request was cancelled, once vLLM has let go of it.

        This is no part of _answer, which never runs if it is cancelled before its first step.
        """
        if answering.cancelled():
            self.replies.refuse(reply, "cancelled", pb_utils.TritonError.CANCELLED)

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_POLL_SECONDS)
            if self.engine.is_dead and not self.down:
                await self._bury_and_revive()

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            try:
                self.meters.report(self.replies.open_count)
            except pb_utils.TritonModelException as problem:  # the next report has it
                pb_utils.Logger.log_error(f"[vllm] {self.name}: metrics could not be reported: {problem}")

    async def _bury_and_revive(self) -> None:
        """Make the model not ready where the server allows it (explicit model control), else start a new engine."""
        self.down = "vLLM's engine process has died"
        pb_utils.Logger.log_error(f"[vllm] {self.name}: {self.down}")
        await asyncio.sleep(SHUTDOWN_GRACE_SECONDS)  # Ctrl-C reaches vLLM too; finalize then ends this task
        await self.engine.discard()
        try:
            await asyncio.to_thread(pb_utils.unload_model, self.name)
            return
        except pb_utils.TritonModelException as problem:
            pb_utils.Logger.log_warn(f"[vllm] {self.name}: cannot be unloaded ({problem}); starting the engine again")
        self.down += " and is being started again"
        for pause in RESTART_PAUSES_SECONDS:
            await asyncio.sleep(pause)
            try:
                await self.engine.start()
            except Exception:  # whatever vLLM raises: the next attempt may find the memory that this one lacked
                pb_utils.Logger.log_error(f"[vllm] {self.name}: no new engine: {traceback.format_exc()}")
                continue
            self.down = None
            pb_utils.Logger.log_info(f"[vllm] {self.name}: a new engine is running")
            return
        # A server that says ready and answers nothing is worse than none: whoever runs it sees the exit and its reason.
        pb_utils.Logger.log_error(f"[vllm] {self.name}: the engine cannot be started again; ending the server")
        os.kill(SERVER, signal.SIGTERM)
