"""The Triton model behind `student`, `baseline` and any further arm: text in, scores out.

    query BYTES [1], title BYTES [n], summary BYTES [n]  ->  score FP32 [n]

It tokenises with the checkpoint's own fast tokenizer and text format, cuts the pairs into length buckets and sends each
bucket to `<name>_encoder`, version for version, which runs on TensorRT, OpenVINO or whatever the build chose. A version
folder holds this file, buckets.py, request_fields.py, the tokenizer, the score card and the `ranking` modules that make
the text, so a version goes on reading text as it was built to. In a container it needs `pip install tokenizers`,
nothing else.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

# one tokenisation thread per instance: the encoder has the cores, and more instances tokenise in parallel
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAYON_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from buckets import Bucket, cut
from request_fields import BadRequest, read_fields

from ranking.encoder_inputs import OUTPUT, pad
from ranking.text import EncodedPair, StudentFormat


class TritonPythonModel:
    """One instance: one request at a time; several instances overlap tokenisation with the encoder's work."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the text format from the version folder. ValueError if a pair may be longer than the longest bucket."""
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        self.encoder = parameters["encoder"]
        self.version = int(args["model_version"])
        self.max_documents = int(parameters["max_documents"])
        self.max_batch = int(parameters["max_batch"])
        self.batch_tokens = int(parameters["batch_tokens"])
        self.call_tokens = int(parameters["call_tokens"])
        self.edges = [int(edge) for edge in parameters["lengths"].split(",")]
        self.text = StudentFormat.of_checkpoint(Path(__file__).parent)
        if self.edges[-1] < self.text.max_tokens():
            raise ValueError(f"the longest bucket is {self.edges[-1]}, a pair can have {self.text.max_tokens()} tokens")
        self.text.encode(["warm"], ["up"], ["the tokenizer"])

    async def execute(self, requests: list) -> list:
        """One response per request, in order: its scores, or what is wrong with it."""
        return await asyncio.gather(*(self._answer(request) for request in requests))

    async def _answer(self, request):
        try:
            if request.is_cancelled():
                raise BadRequest("cancelled by the caller")
            pairs = self.text.encode(*read_fields(request, self.max_documents))
            scores = await self._score(pairs)
        except BadRequest as problem:
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(str(problem), pb_utils.TritonError.INVALID_ARG)
            )
        except pb_utils.TritonModelException as problem:  # the encoder's own message: queue full, timeout, not loaded
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(f"{self.encoder}: {problem}", pb_utils.TritonError.UNAVAILABLE)
            )
        return pb_utils.InferenceResponse([pb_utils.Tensor("score", scores)])

    async def _score(self, pairs: list[EncodedPair]) -> np.ndarray:
        lengths = [len(pair.ids) for pair in pairs]
        buckets = cut(lengths, self.edges, self.max_batch, self.batch_tokens, self.call_tokens)
        answers = await asyncio.gather(*(self._encode(bucket, pairs).async_exec() for bucket in buckets))
        scores = np.empty(len(pairs), np.float32)
        for bucket, answer in zip(buckets, answers):
            if answer.has_error():
                raise pb_utils.TritonModelException(answer.error().message())
            scores[bucket.rows] = pb_utils.get_output_tensor_by_name(answer, OUTPUT).as_numpy()[:, 0]
        return scores

    def _encode(self, bucket: Bucket, pairs: list[EncodedPair]):
        feed = pad([pairs[row] for row in bucket.rows], bucket.length, self.text.pad_id)
        return pb_utils.InferenceRequest(
            model_name=self.encoder,
            model_version=self.version,
            requested_output_names=[OUTPUT],
            inputs=[pb_utils.Tensor(name, values) for name, values in feed.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
