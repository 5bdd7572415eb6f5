"""The thread that sends the vLLM backend's answers, with Triton's side played by objects that record what happens."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
import types
import weakref
from itertools import pairwise

import pytest


@pytest.fixture
def replies(monkeypatch):
    """The module, imported with a stand-in for the stub's utilities: those exist inside tritonserver alone."""
    utilities = types.SimpleNamespace(
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1, Logger=types.SimpleNamespace(log_error=lambda message: None)
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utilities)
    monkeypatch.delitem(sys.modules, "serving.backends.vllm.replies", raising=False)
    yield importlib.import_module("serving.backends.vllm.replies")
    sys.modules.pop("serving.backends.vllm.replies", None)


class Tensor:
    """Counts as freed when nothing refers to it."""


class Response:
    def __init__(self):
        self.tensors = [Tensor()]

    def output_tensors(self):
        return list(self.tensors)


class Sender:
    """Prunes a response as the stub does, and looks whether that freed its tensors."""

    def __init__(self):
        self.freed_inside_send = []

    def send(self, response, flags):
        before = [weakref.ref(tensor) for tensor in response.tensors]
        response.tensors.clear()
        gc.collect()
        self.freed_inside_send += [reference() is None for reference in before]


def test_sending_never_frees_a_tensor(replies):
    sender = Sender()
    thread = replies.ReplyThread()
    for final in (False, True):
        thread.send(replies.Reply(sender), Response(), final=final)
    thread.close()
    assert sender.freed_inside_send == [False, False]


def test_nothing_is_sent_after_the_last_response(replies):
    sender = Sender()
    thread = replies.ReplyThread()
    reply = replies.Reply(sender)
    thread.watch(reply)
    for _ in range(2):  # the second as a cancellation would that came too late
        thread.send(reply, Response(), final=True)
    thread.close()
    assert sender.freed_inside_send == [False]
    assert thread.open_count == 0


def test_a_broken_connection_does_not_end_the_thread(replies):
    class Broken:
        def send(self, response, flags):
            raise RuntimeError("gone")

    sender = Sender()
    thread = replies.ReplyThread()
    thread.send(replies.Reply(Broken()), Response(), final=True)
    thread.send(replies.Reply(sender), Response(), final=True)
    thread.close()
    assert sender.freed_inside_send == [False]


def test_a_cancellation_among_many_open_requests_is_found_and_a_poll_asks_few_of_them(replies, monkeypatch):
    monkeypatch.setattr(replies, "CANCELLATION_POLL_SECONDS", 0.02)
    asked, cancelled, polls = [], threading.Event(), []

    class Asked(Sender):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def is_cancelled(self):
            asked.append(self.number)
            return self.number == 199

    thread = replies.ReplyThread()
    poll = thread._poll
    monkeypatch.setattr(thread, "_poll", lambda: (polls.append(len(asked)), poll()))
    for number in range(200):
        thread.watch(replies.Reply(Asked(number), cancel=cancelled.set if number == 199 else list))
    assert cancelled.wait(10)
    thread.close()
    assert set(asked) == set(range(200))
    assert all(0 <= later - earlier <= replies.ASKED_A_POLL for earlier, later in pairwise(polls))
