"""Everything that goes back to Triton goes through one thread: responses in order, and the question "cancelled?".

A response sender must not be asked anything after its last response: the server has freed it by then. One thread for
both makes that order certain, and keeps the engine's event loop free of waiting for the server.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import triton_python_backend_utils as pb_utils

CANCELLATION_POLL_SECONDS = 0.25
ASKED_A_POLL = 64  # open replies at most: each question is a call to the server's process


@dataclass(eq=False)
class Reply:
    """The open answer to one request. `cancel` is called (on the reply thread) once the caller has given up."""

    sender: Any
    cancel: Callable[[], object] | None = None
    ended: bool = False  # its last response has been sent, or was refused by the server
    opened: float = field(default_factory=time.monotonic)


class ReplyThread:
    """Sends responses and watches open replies for cancellation."""

    def __init__(self) -> None:
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()
        self._open: dict[Reply, None] = {}  # those that were not asked for the longest time come first
        self._next_poll = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="replies", daemon=True)
        self._thread.start()

    def watch(self, reply: Reply) -> None:
        """Ask from now on whether the caller of this reply has cancelled."""
        self._outbox.put((reply, None, False))

    def send(self, reply: Reply, response: Any, final: bool) -> None:
        """Queue a response; final: the reply's last one."""
        self._outbox.put((reply, response, final))

    def refuse(self, reply: Reply, message: str, code: Any) -> None:
        """End a reply with an error, unless it has ended by then."""
        self.send(reply, pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code)), final=True)

    def close(self) -> None:
        """Send what is queued, then end the thread."""
        self._outbox.put(None)
        self._thread.join()

    @property
    def open_count(self) -> int:
        """Replies that are watched and have not ended."""
        return len(self._open)

    def _run(self) -> None:
        while True:
            try:
                item = self._outbox.get(timeout=CANCELLATION_POLL_SECONDS)
            except queue.Empty:
                self._poll()
                continue
            if item is None:
                return
            reply, response, final = item
            if response is None:
                self._open[reply] = None
                continue
            self._send(reply, response, final)
            if time.monotonic() > self._next_poll:
                self._poll()

    def _send(self, reply: Reply, response: Any, final: bool) -> None:
        if reply.ended:  # a cancellation that came while the last response was already queued
            return
        if final:
            reply.ended = True
            self._open.pop(reply, None)
        # send() runs without the interpreter's lock and may drop tensors that the caller did not ask for. Were that
        # their last reference, their arrays would be freed beside another thread's allocations (docs/decisions.md:
        # crashes).
        kept = response.output_tensors()
        try:
            reply.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)
        except Exception:  # one caller's broken connection must not end the thread that answers all others
            pb_utils.Logger.log_error(f"[vllm] a response could not be sent: {traceback.format_exc()}")
        del kept

    def _poll(self) -> None:
        while self._find_cancelled():
            pass  # the requests of a stream are cancelled together, so others wait to be found
        self._next_poll = time.monotonic() + CANCELLATION_POLL_SECONDS

    def _find_cancelled(self) -> bool:
        """Ask some of the open replies, and whether one of them was cancelled."""
        oldest = time.monotonic() - CANCELLATION_POLL_SECONDS
        found = False
        waiting = (reply for reply in self._open if reply.cancel and reply.opened < oldest)
        for reply in list(islice(waiting, ASKED_A_POLL)):
            self._open[reply] = self._open.pop(reply)  # to the end
            if reply.cancel and reply.sender.is_cancelled():
                reply.cancel()
                reply.cancel = None
                found = True
        return found
