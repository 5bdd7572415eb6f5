"""The venv's `tritonserver` command on a real server."""

from __future__ import annotations

import signal
import urllib.request

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpc

from ranking.errors import InputError
from serving.temporary_server import start_triton

UPPER = """
import numpy as np
import ranking.errors
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        def upper(request):
            text = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()
            text = np.array([t.decode().upper() for t in text], dtype=object)
            return pb_utils.InferenceResponse([pb_utils.Tensor("text", text)])

        return [upper(request) for request in requests]
"""


def infer(address: str, model: str, texts: list[str]) -> list[str]:
    tensor = grpc.InferInput("text", [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array(texts, dtype=object))
    with grpc.InferenceServerClient(address) as client:
        return [text.decode() for text in client.infer(model, [tensor]).as_numpy("text")]


def test_it_serves_a_python_model_that_imports_this_repository_and_leaves_no_process(python_model):
    with start_triton(python_model("upper", UPPER), "--log-verbose=1") as server:
        assert infer(server.grpc, "upper", ["schuhe", "größe", ""]) == ["SCHUHE", "GRÖSSE", ""]
        assert b"nv_inference_request_success" in urllib.request.urlopen(f"http://{server.metrics}/metrics").read()
        assert "log-verbose" in " ".join(psutil.Process(server.pid).cmdline())
        children = server.children()
        assert any("triton_python_backend_stub" in child.name() for child in children)
    assert server.process.returncode == 0
    assert server.stragglers == []
    assert not any(child.is_running() for child in children)


def test_the_process_is_the_server_itself_so_that_signals_reach_it(python_model):
    with start_triton(python_model("upper", UPPER)) as server:
        assert psutil.Process(server.pid).name() == "tritonserver"
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(120) == 0


def test_a_model_that_cannot_load_ends_the_start_with_its_reason(python_model):
    with (
        pytest.raises(InputError, match="no_such_package"),
        start_triton(python_model("bad", "import no_such_package")),
    ):
        pass


def test_two_servers_run_beside_each_other(python_model):
    repository = python_model("upper", UPPER)
    with start_triton(repository) as first, start_triton(repository) as second:
        assert len({first.http, first.grpc, first.metrics, second.http, second.grpc, second.metrics}) == 6
        assert infer(first.grpc, "upper", ["a"]) == infer(second.grpc, "upper", ["a"]) == ["A"]
