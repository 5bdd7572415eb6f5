"""Variant of the front that runs the encoder in its own process: no second model, no hop, one engine per instance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import openvino as ov
from front import TritonPythonModel as Front
from front import cut, pad


class TritonPythonModel(Front):
    """The front with the encoder compiled into it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Compile the encoder beside what the front prepares."""
        super().initialize(args)
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        properties = {"NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": parameters["precision"]}
        self.compiled = ov.Core().compile_model(str(Path(__file__).parent / "model.xml"), "CPU", properties)
        self.job = self.compiled.create_infer_request()

    async def _score(self, pairs):
        scores = np.empty(len(pairs), np.float32)
        lengths = [len(pair.ids) for pair in pairs]
        for bucket in cut(lengths, self.edges, self.max_batch, self.batch_tokens, self.call_tokens):
            self.job.infer(pad([pairs[row] for row in bucket.rows], bucket.length, self.text.pad_id))
            scores[bucket.rows] = self.job.get_output_tensor(0).data[:, 0]
        return scores
