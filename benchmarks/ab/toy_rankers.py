"""Two toy arms for a real tritonserver: they score by word overlap, with a delay that can be changed while serving.

For tests and benchmarks of what stands in front of a model. `baseline` counts query words in the title, `student` in
the summary, so that their rankings differ. `<repository>/<model>/delay` holds seconds to sleep per request.
"""

from __future__ import annotations

from pathlib import Path

MODELS = ("baseline", "student")

_CONFIG = """backend: "python"
max_batch_size: 0
input [
  { name: "query" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "title" data_type: TYPE_STRING dims: [ -1 ] },
  { name: "summary" data_type: TYPE_STRING dims: [ -1 ] },
  { name: "prior" data_type: TYPE_FP32 dims: [ -1 ] optional: true }
]
output [ { name: "score" data_type: TYPE_FP32 dims: [ -1 ] } ]
instance_group [ { kind: KIND_CPU count: %d } ]
"""

_MODEL = """
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

FIELD = "%s"


class TritonPythonModel:
    def initialize(self, args):
        self.delay = Path(args["model_repository"]) / "delay"

    def execute(self, requests):
        responses = []
        for request in requests:
            time.sleep(float(self.delay.read_text()))
            words = pb_utils.get_input_tensor_by_name(request, "query").as_numpy()[0].decode().split()
            texts = pb_utils.get_input_tensor_by_name(request, FIELD).as_numpy()
            scores = [sum(text.decode().split().count(word) for word in words) for text in texts]
            if words == ["nan"]:
                scores[0] = float("nan")
            tensor = pb_utils.Tensor("score", np.array(scores, dtype=np.float32))
            responses.append(pb_utils.InferenceResponse([tensor]))
        return responses
"""


def write_toy_repository(folder: Path, delay_seconds: float = 0.0, instances: int = 1) -> Path:
    """Write both models into a new model repository; returns its folder. instances: of each model, serving at once."""
    for name in MODELS:
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(_CONFIG % instances)
        (folder / name / "1" / "model.py").write_text(_MODEL % ("title" if name == "baseline" else "summary"))
        set_delay(folder, name, delay_seconds)
    return folder


def set_delay(repository: Path, model: str, seconds: float) -> None:
    """Change a model's delay; the next request sees it."""
    aside = repository / model / "delay.part"
    aside.write_text(str(seconds))
    aside.replace(repository / model / "delay")
