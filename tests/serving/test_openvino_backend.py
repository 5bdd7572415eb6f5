"""How the openvino backend turns a model's parameters into OpenVINO's properties; what it serves: tests/e2e."""

from __future__ import annotations

import importlib
import sys
import types

import numpy as np
import openvino
import pytest
from openvino import opset13


@pytest.fixture
def backend(monkeypatch):
    """The module, imported with a stand-in for the stub's utilities: those exist inside tritonserver alone."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", types.SimpleNamespace())
    monkeypatch.delitem(sys.modules, "serving.backends.openvino.model", raising=False)
    yield importlib.import_module("serving.backends.openvino.model")
    sys.modules.pop("serving.backends.openvino.model", None)


def test_threads_of_several_instances_do_not_share_one_core(backend):
    """A pinned single thread is always on the first core, in every process: two instances would serve as one does."""
    value = opset13.parameter([1, 2], np.float32)
    model = openvino.Model([opset13.relu(value)], [value])
    parameters = {"INFERENCE_NUM_THREADS": "1", "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(model, "CPU", backend.properties(parameters))
    assert compiled.get_property("ENABLE_CPU_PINNING") is False
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_a_parameter_that_is_no_number_is_named(backend):
    with pytest.raises(ValueError, match="INFERENCE_NUM_THREADS is 'all': a number is needed"):
        backend.properties({"INFERENCE_NUM_THREADS": "all"})
