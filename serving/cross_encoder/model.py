"""The Triton model of an encoder reranker that others trained: text in, scores out, run by PyTorch and transformers.

    query BYTES [1], title BYTES [n], summary BYTES [n]  ->  score FP32 [n]

A foreign encoder labels offline, so it is run as it was published and not compiled: any architecture that transformers
knows as a sequence classifier with one score is served, on a GPU where there is one. A version folder holds this file,
request_fields.py, the checkpoint, and the `ranking` modules that make the text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))
import torch
from request_fields import BadRequest, read_fields
from transformers import AutoModelForSequenceClassification

from ranking.cross_encoder_text import CrossEncoderFormat
from ranking.encoder_inputs import pad
from ranking.text import EncodedPair


class TritonPythonModel:
    """One instance of the network; requests are answered one after the other."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the checkpoint beside this file in the number format that the model's config states."""
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        self.max_documents, self.batch_tokens = int(parameters["max_documents"]), int(parameters["batch_tokens"])
        torch.set_num_threads(int(parameters["threads"]) or torch.get_num_threads())
        checkpoint = Path(__file__).parent / "checkpoint"
        self.text = CrossEncoderFormat.of_checkpoint(checkpoint)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = (
            AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=getattr(torch, parameters["dtype"]))
            .to(self.device)
            .eval()
        )
        self.has_token_types = getattr(self.model.config, "type_vocab_size", 0) > 1
        self._score(self.text.encode(["warm"], ["up"], ["the network"]))

    def execute(self, requests: list) -> list:
        """One response per request, in order: its scores, or what is wrong with it."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        try:
            if request.is_cancelled():
                raise BadRequest("cancelled by the caller")
            scores = self._score(self.text.encode(*read_fields(request, self.max_documents)))
        except BadRequest as problem:
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(str(problem), pb_utils.TritonError.INVALID_ARG)
            )
        return pb_utils.InferenceResponse([pb_utils.Tensor("score", scores)])

    @torch.inference_mode()
    def _score(self, pairs: list[EncodedPair]) -> np.ndarray:
        """float32 [n]. Pairs of like length share a forward of at most batch_tokens padded tokens."""
        scores = np.empty(len(pairs), np.float32)
        order = sorted(range(len(pairs)), key=lambda row: len(pairs[row].ids))
        while order:
            rows = [order.pop()]  # the longest left sets the width
            width = len(pairs[rows[0]].ids)
            while order and (len(rows) + 1) * width <= self.batch_tokens:
                rows.append(order.pop())
            logits = self.model(**self._feed([pairs[row] for row in rows], width)).logits
            scores[rows] = logits[:, 0].float().cpu().numpy()
        return scores

    def _feed(self, pairs: list[EncodedPair], width: int) -> dict[str, torch.Tensor]:
        """The network's inputs, int64 [pairs, width], padded on the right."""
        feed = pad(pairs, width, self.model.config.pad_token_id or 0)
        if not self.has_token_types:
            del feed["token_type_ids"]
        return {name: torch.from_numpy(values).long().to(self.device) for name, values in feed.items()}
