"""Two small models whose quality is known, and a dataset that they rank: a good student and an upside-down baseline."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from ranking.schema import TABLES, write_table

# the title tells the grade: the student ranks by it, the baseline the other way round
MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.sign = 1 if args["model_name"] == "student" else -1

    def execute(self, requests):
        responses = []
        for request in requests:
            titles = pb_utils.get_input_tensor_by_name(request, "title").as_numpy()
            scores = [self.sign * float(t.split()[-1]) for t in titles]
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("score", np.array(scores, dtype=np.float32))]))
        return responses
"""
CONFIG = """backend: "python"
input { name: "query" data_type: TYPE_STRING dims: 1 }
input { name: "title" data_type: TYPE_STRING dims: -1 }
input { name: "summary" data_type: TYPE_STRING dims: -1 }
output { name: "score" data_type: TYPE_FP32 dims: -1 }
"""


def write_repository(folder: Path) -> Path:
    """A Triton repository with `student` and `baseline` on the wire of the real ones."""
    for name in ("student", "baseline"):
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / "model.py").write_text(MODEL)
        (folder / name / "config.pbtxt").write_text(CONFIG)
    return folder


def write_data(folder: Path) -> Path:
    """A dataset folder of 40 test queries with 20 documents each, whose titles tell their grade."""
    rows = [
        (f"q{q}", f"d{q}-{d}", f"query {q}", f"grade {d % 5}", f"of query {q}", d % 5)
        for q in range(40)
        for d in range(20)
    ]
    columns = {name: list(values) for name, values in zip(TABLES["judgments"].schema.names, zip(*rows))}
    write_table(folder / "judgments" / "test.parquet", "judgments", pa.table(columns))
    return folder
