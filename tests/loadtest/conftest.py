"""A real tritonserver with two small ranking models that can be made to stall, and a dataset to draw requests from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from ranking.schema import TABLES, write_table
from serving.temporary_server import TritonServer, start_triton

# scores by content, so that equal requests get equal answers; a `stall` file holds the model up for that many seconds
MODEL = """
import json, os, time, zlib
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.stall = os.path.join(args["model_repository"], "stall")

    def execute(self, requests):
        if os.path.exists(self.stall):
            seconds = float(open(self.stall).read())
            os.remove(self.stall)
            time.sleep(seconds)
        responses = []
        for request in requests:
            titles = pb_utils.get_input_tensor_by_name(request, "title").as_numpy()
            scores = np.array([zlib.crc32(t) % 1000 / 100 for t in titles], dtype=np.float32)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("score", scores)]))
        return responses
"""
CONFIG = """backend: "python"
max_batch_size: 0
input { name: "query" data_type: TYPE_STRING dims: 1 }
input { name: "title" data_type: TYPE_STRING dims: -1 }
input { name: "summary" data_type: TYPE_STRING dims: -1 }
output { name: "score" data_type: TYPE_FP32 dims: -1 }
"""


@dataclass
class Rig:
    """The server and where to make a model of it stall."""

    server: TritonServer
    repository: Path
    data: Path

    def stall(self, model: str, seconds: float) -> None:
        aside = self.repository / model / ".stall"
        aside.write_text(str(seconds))
        aside.rename(self.repository / model / "stall")


@pytest.fixture(scope="session")
def rig(tmp_path_factory) -> Rig:
    repository = tmp_path_factory.mktemp("repository")
    for name in ("student", "baseline"):
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "1" / "model.py").write_text(MODEL)
        (repository / name / "config.pbtxt").write_text(CONFIG)
    data = tmp_path_factory.mktemp("data")
    rows = [
        (f"q{q}", f"d{q}-{d}", f"query {q}", f"title {q} {d}", f"summary {d}", d % 5)
        for q in range(30)
        for d in range(12)
    ]
    columns = dict(zip(TABLES["judgments"].schema.names, zip(*rows)))
    write_table(data / "judgments" / "test.parquet", "judgments", pa.table({k: list(v) for k, v in columns.items()}))
    with start_triton(repository) as server:
        yield Rig(server, repository, data)
