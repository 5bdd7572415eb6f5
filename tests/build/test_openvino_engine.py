"""OpenVINO engines in the process that builds them."""

from __future__ import annotations

import ctypes
import gc

import pytest

from build import openvino_engine
from build.judged_pairs import read_candidates
from ranking.text import StudentFormat

POSITIONS = 128


class SignalStack(ctypes.Structure):
    """stack_t of sigaltstack(2)."""

    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def signal_stack() -> int | None:
    """Where this thread's signal handlers run; None: on the thread's own stack."""
    found = SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
    return found.address


def test_engines_that_come_and_go_leave_the_signal_stack_as_it_is(checkpoint, exported, data, tmp_path):
    """Seen: one freed it, another put it back, and the next signal with a handler ended the process with SIGSEGV."""
    openvino_engine.cpu_precisions()  # from here on there is a Core, with the stack of its plugin
    before = signal_stack()
    first, second = (openvino_engine.runner(exported, "fp32", 1) for _ in range(2))
    del first
    gc.collect()
    del second
    gc.collect()
    assert signal_stack() == before
    text = StudentFormat.of_checkpoint(checkpoint)
    feeds = openvino_engine.calibration_feeds(read_candidates(data, text, 16), text.pad_id)
    openvino_engine.build_ir(exported, tmp_path, "int8", POSITIONS, feeds)
    gc.collect()
    assert signal_stack() == before


@pytest.mark.parametrize(
    ("flags", "has"), [("flags : avx2 avx512f", False), ("flags : avx_vnni", True), ("Features : asimd", True)]
)
def test_vnni_is_read_from_the_processors_flags(monkeypatch, flags, has):
    monkeypatch.setattr(openvino_engine.Path, "read_text", lambda *_, **__: f"processor : 0\n{flags}\n")
    assert openvino_engine.multiplies_int8() == has
