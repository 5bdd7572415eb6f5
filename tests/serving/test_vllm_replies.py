"""The thread that sends the vLLM backend's answers, with Triton's side played by objects that record what happens."""

from __future__ import annotations

import gc
import importlib
import sys
import types
import weakref

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


class Asked(Sender):
    """Notes that it was asked."""

    def __init__(self, asked, number, cancelled):
        super().__init__()
        self.asked, self.number, self.cancelled = asked, number, cancelled

    def is_cancelled(self):
        self.asked.append(self.number)
        return self.cancelled


@pytest.fixture
def opened(replies):
    """A reply thread that has ended, with `count` replies open for long: returns it, what is asked, what is ended."""

    def make(count, cancelled):
        thread, asked, ended = replies.ReplyThread(), [], []
        thread.close()  # the polls are the test's
        for number in range(count):
            sender = Asked(asked, number, number in cancelled)
            thread._open[replies.Reply(sender, cancel=lambda number=number: ended.append(number), opened=0.0)] = None
        return thread, asked, ended

    return make


def test_each_poll_asks_few_and_all_have_their_turn(opened):
    thread, asked, ended = opened(150, cancelled={})
    for number in range(1, 6):
        thread._poll()
        assert len(asked) == 64 * number
    assert asked == [*range(150), *range(150), *range(20)] and not ended


def test_all_requests_of_a_cancelled_stream_are_found_by_one_poll_and_asked_once(opened):
    thread, asked, ended = opened(200, cancelled=range(200))
    thread._poll()
    thread._poll()
    assert asked == ended == list(range(200))


def test_a_request_that_has_just_come_is_not_asked(opened, replies):
    thread, asked, _ = opened(0, cancelled={})
    thread._open[replies.Reply(Asked(asked, 1, True), cancel=list)] = None
    thread._poll()
    assert asked == []
