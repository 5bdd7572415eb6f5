"""The Triton model behind `student`, `baseline` and any further arm: text in, scores out.

    query BYTES [1], title BYTES [n], summary BYTES [n], optional prior FP32 [n]
    ->  score FP32 [n], and where the arm has a calibration probability FP32 [n]

    of an arm that reads long documents in chunks also
    optional max_chunks INT32 [1]  ->  chunks INT32 [n], how many were read of each document

It tokenises with the checkpoint's own fast tokenizer and text format, cuts the pairs into calls (length buckets, or
packed lists without padding, as the build chose) and sends each to `<name>_encoder`, version for version, which runs on
TensorRT, OpenVINO or whatever the build chose. A version folder holds this file, buckets.py, request_fields.py, the
tokenizer, the score card, the calibration and the `ranking` modules that make the text, so a version goes on reading
text as it was built to. In a container it needs `pip install tokenizers`, nothing else.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

# one tokenisation thread per instance: the encoder has the cores, and more instances tokenise in parallel
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAYON_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from buckets import cut, fill
from field_cache import FieldCache
from request_fields import BadRequest, read_fields

from ranking import tracing
from ranking.calibration import probability
from ranking.encoder_inputs import OUTPUT, Feed, chosen, inputs_of, pack, pad
from ranking.prior import PriorBlend
from ranking.text import EncodedPair, StudentFormat

TRACING = "DISRANKER_TRACING"  # variable of Triton's environment: 1 to send spans to an OpenTelemetry collector


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
        self.prior = PriorBlend(*(float(parameters[f"prior_{name}"]) for name in ("weight", "mean", "spread")))
        calibration = Path(__file__).parent / "probabilities.json"
        # maps from score to probability, of scores alone and with a prior; None for an arm that gives none
        self.calibration = json.loads(calibration.read_text()) if calibration.is_file() else None
        self.packed = parameters["layout"] == "packed"
        # row counts that the encoder has CUDA graphs for; none where it has no graphs
        self.row_steps = [int(step) for step in parameters["row_steps"].split(",") if step]
        self.text = StudentFormat.of_checkpoint(Path(__file__).parent)
        self.inputs = inputs_of(self.text.token_types)
        if self.edges[-1] < self.text.max_tokens():
            raise ValueError(f"the longest bucket is {self.edges[-1]}, a pair can have {self.text.max_tokens()} tokens")
        # its spans go where OpenTelemetry's variables in Triton's environment say
        self.tracer = tracing.begin(f"disranker-{args['model_name']}") if os.environ.get(TRACING) == "1" else None
        self.text.field_ids = FieldCache(self.text.tokenise_fields, int(parameters["cached_fields"]))
        self.text.encode_documents(["warm"], ["up"], ["the tokenizer"])

    async def execute(self, requests: list) -> list:
        """One response per request, in order: its scores, or what is wrong with it."""
        return await asyncio.gather(*(self._answer(request) for request in requests))

    async def _answer(self, request):
        try:
            if request.is_cancelled():
                raise BadRequest("cancelled by the caller")
            trace = read_trace(request) if self.tracer else {}
            with self._span("tokenise", trace) as span:
                queries, titles, summaries = read_fields(request, self.max_documents)
                documents = self.text.encode_documents(queries, titles, summaries, read_max_chunks(request))
                span.set(documents=len(documents))
            prior = read_prior(request, len(documents))
            scores = documents.pool(await self._score(documents.pairs, request, trace))
            if prior is not None:
                scores = self.prior.blend(scores, prior)
        except BadRequest as problem:
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(str(problem), pb_utils.TritonError.INVALID_ARG)
            )
        except pb_utils.TritonModelException as problem:  # the encoder's own message: queue full, timeout, not loaded
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(f"{self.encoder}: {problem}", pb_utils.TritonError.UNAVAILABLE)
            )
        answer = [pb_utils.Tensor("score", scores)]
        if self.calibration is not None and "probability" in request.requested_output_names():
            # a list without any prior keeps the model's own scores
            blended = prior is not None and not np.isnan(prior).all()
            chances = probability(scores, self.calibration["with_prior" if blended else "alone"])
            answer.append(pb_utils.Tensor("probability", chances.astype(np.float32)))
        if "chunks" in request.requested_output_names():
            answer.append(pb_utils.Tensor("chunks", np.diff(documents.starts).astype(np.int32)))
        return pb_utils.InferenceResponse(answer)

    async def _score(self, pairs: list[EncodedPair], request, trace: dict[str, str]) -> np.ndarray:
        calls = list(self._calls(pairs))
        # where the server traces requests itself, its spans of the encoder belong to this request
        server_trace = request.trace() if request.trace().get_context() else None
        with self._span("encode", trace) as span:
            span.set(calls=len(calls))
            asked = (self._encode(feed, request.timeout(), server_trace) for _, feed in calls)
            answers = await asyncio.gather(*(call.async_exec() for call in asked))
        scores = np.empty(len(pairs), np.float32)
        for (rows, _), answer in zip(calls, answers):
            if answer.has_error():
                raise pb_utils.TritonModelException(answer.error().message())
            logits = pb_utils.get_output_tensor_by_name(answer, OUTPUT).as_numpy()
            scores[rows] = logits.reshape(-1)[: len(rows)]
        return scores

    def _calls(self, pairs: list[EncodedPair]) -> Iterator[tuple[list[int], Feed]]:
        """Row numbers of the pairs of each call of the encoder, and the call's tensors."""
        lengths = [len(pair.ids) for pair in pairs]
        if self.packed:
            for rows in fill(lengths, self.max_batch, self.batch_tokens):
                feed = pack([pairs[row] for row in rows])
                yield rows, {name: values[None] for name, values in feed.items()}  # Triton's batch: one list
            return
        for bucket in cut(lengths, self.edges, self.max_batch, self.batch_tokens, self.call_tokens):
            count = len(bucket.rows)
            rows = next((step for step in self.row_steps if step >= count), count)
            feed = pad([pairs[row] for row in bucket.rows], bucket.length, self.text.pad_id, rows)
            yield bucket.rows, chosen(feed, self.inputs)

    def _span(self, name: str, trace: dict[str, str]) -> tracing.Span:
        """A span of this request in the trace that it came with; none if it came with none."""
        return self.tracer.span(name, "internal", trace, {}) if self.tracer and trace else tracing.NO_SPAN

    def _encode(self, feed: Feed, timeout_us: int, server_trace):
        return pb_utils.InferenceRequest(
            timeout=timeout_us,  # as the caller gave it: a call that nobody waits for leaves the encoder's queue
            model_name=self.encoder,
            model_version=self.version,
            requested_output_names=[OUTPUT],
            inputs=[pb_utils.Tensor(name, values) for name, values in feed.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
            **({"trace": server_trace} if server_trace else {}),
        )

    def finalize(self) -> None:
        """Send the spans that still wait."""
        if self.tracer is not None:
            self.tracer.stop(1.0)


def read_trace(request) -> dict[str, str]:
    """The trace that a request belongs to, as W3C fields: the server's own span of it, else the caller's, else none."""
    context = request.trace().get_context()
    given = json.loads(context or request.parameters() or "{}")
    return {name: given[name] for name in (tracing.TRACEPARENT, tracing.TRACESTATE) if isinstance(given.get(name), str)}


def read_max_chunks(request) -> int | None:
    """How many chunks of a document the caller wants read at most; None if he did not say."""
    tensor = pb_utils.get_input_tensor_by_name(request, "max_chunks")
    if tensor is None:
        return None
    wanted = int(tensor.as_numpy()[0])
    if wanted < 1:
        raise BadRequest(f"max_chunks is {wanted}: at least 1 chunk of a document is read")
    return wanted


def read_prior(request, documents: int) -> np.ndarray | None:
    """The first stage's scores, float32 [n], NaN for a document without one; None if the caller sent none."""
    tensor = pb_utils.get_input_tensor_by_name(request, "prior")
    if tensor is None:
        return None
    prior = tensor.as_numpy()
    if len(prior) != documents:
        raise BadRequest(f"prior has {len(prior)} values for {documents} documents: one per document is needed")
    if np.isinf(prior).any():
        raise BadRequest(f"prior[{int(np.isinf(prior).argmax())}] is infinite; NaN stands for a document without one")
    return prior
