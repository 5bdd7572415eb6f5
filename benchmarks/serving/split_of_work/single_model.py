"""Variant of the front that runs the encoder in its own process: no second model, no hop, one engine per instance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import openvino as ov
from buckets import cut
from front import TritonPythonModel as Front

from ranking.encoder_inputs import pad


class TritonPythonModel(Front):
    """The front with the encoder compiled into it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Compile the encoder beside what the front prepares."""
        super().initialize(args)
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        properties = {"NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": parameters["precision"]}
        self.compiled = ov.Core().compile_model(str(Path(__file__).parent / "model.xml"), "CPU", properties)
        self.job = self.compiled.create_infer_request()

    async def _scores(self, page, blend, caller):
        encoder = self.encoder
        documents = page.encode(encoder.text)
        pairs, scores = documents.together, np.empty(len(documents.together), np.float32)
        limits = (encoder.max_batch, encoder.batch_tokens, encoder.call_tokens)
        for bucket in cut(pairs.lengths.tolist(), encoder.edges, *limits):
            self.job.infer(pad(pairs.take(bucket.rows), bucket.length, encoder.text.pad_id))
            scores[bucket.rows] = self.job.get_output_tensor(0).data[:, 0]
        return blend(documents.pool(scores)), documents.chunks
