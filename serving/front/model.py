"""The Triton model behind `student`, `baseline` and any further arm: text or token ids in, scores out.

    query BYTES [1], title BYTES [n], summary BYTES [n], or the same as token ids (pages.py); optional prior FP32 [n]
    ->  score FP32 [n], and where the arm has a calibration probability FP32 [n]

    of an arm that reads long documents in chunks also
    optional max_chunks INT32 [1]  ->  chunks INT32 [n], how many were read of each document

It tokenises with the checkpoint's own fast tokenizer and text format, cuts the pairs into calls (length buckets, or
packed lists without padding, as the build chose) and sends each to `<name>_encoder`, version for version, which runs on
TensorRT, OpenVINO or whatever the build chose. A version folder holds this file and its neighbours, the tokenizer, the
score card, the calibration and the `ranking` modules that make the text, so a version goes on reading text as it was
built to. In a container it needs `pip install tokenizers`, nothing else.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

# one tokenisation thread per instance: the encoder has the cores, and more instances tokenise in parallel
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAYON_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from cache_metrics import CacheMetrics
from field_cache import FieldCache
from pages import Page, TokenPage, read_page
from request_fields import BadRequest
from score_cache import ScoreCache
from served_encoder import Caller, ServedEncoder

from ranking import tracing
from ranking.calibration import probability
from ranking.card import fingerprint
from ranking.cascade import Blend, Cascade, without_prior
from ranking.prior import PriorBlend

HERE = Path(__file__).parent  # the version folder

TRACING = "DISRANKER_TRACING"  # variable of Triton's environment: 1 to send spans to an OpenTelemetry collector


class TritonPythonModel:
    """One instance: one request at a time; several instances overlap tokenisation with the encoder's work."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the text format from the version folder. ValueError if a pair may be longer than the longest bucket."""
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        self.max_documents = int(parameters["max_documents"])
        self.prior = PriorBlend(*(float(parameters[f"prior_{name}"]) for name in ("weight", "mean", "spread")))
        calibration = HERE / "probabilities.json"
        # maps from score to probability, of scores alone and with a prior; None for an arm that gives none
        self.calibration = json.loads(calibration.read_text()) if calibration.is_file() else None
        self.encoder = ServedEncoder(HERE, parameters, int(args["model_version"]))
        encoders = [self.encoder]
        self.cascade = None
        if "cascade_k" in parameters:
            scales = ("mean", "spread", "first_mean", "first_spread")
            self.cascade = Cascade(
                int(parameters["cascade_k"]), *(float(parameters[f"cascade_{name}"]) for name in scales)
            )
            self.first = ServedEncoder(HERE / "first", parameters, self.encoder.version, "first_")
            encoders.append(self.first)
        # fingerprint of each encoder's tokenizer -> the cache of its fields; two encoders may share one
        caches: dict[str, FieldCache] = {}
        for encoder in encoders:
            text, vocabulary = encoder.text, fingerprint(encoder.folder / "tokenizer.json")
            if vocabulary not in caches:
                caches[vocabulary] = FieldCache(text.tokenise_fields, int(parameters["cached_fields"]))
                text.tokenise_fields(["warm up the tokenizer"], 8)
            text.field_ids = caches[vocabulary]
        self.vocabulary = next(iter(caches))
        self.takes_tokens = len(caches) == 1
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self.metrics = [
            *(field_metrics(cache, {**labels, "vocabulary": name}) for name, cache in caches.items()),
            *(score_metrics(e.cache, {**labels, "encoder": e.name}) for e in encoders if e.cache is not None),
        ]
        # its spans go where OpenTelemetry's variables in Triton's environment say
        self.tracer = tracing.begin(f"disranker-{args['model_name']}") if os.environ.get(TRACING) == "1" else None
        self._report()  # the series stand at 0 before the first request

    def _report(self) -> None:
        for metrics in self.metrics:
            metrics.report()

    def finalize(self) -> None:
        """Take this instance's series off the metrics page, and send the spans that still wait."""
        for metrics in self.metrics:
            metrics.close()
        if self.tracer is not None:
            self.tracer.stop(1.0)

    async def execute(self, requests: list) -> list:
        """One response per request, in order: its scores, or what is wrong with it."""
        answers = await asyncio.gather(*(self._answer(request) for request in requests))
        self._report()
        return answers

    async def _answer(self, request):
        try:
            if request.is_cancelled():
                raise BadRequest("cancelled by the caller")
            page = read_page(request, self.max_documents, self.encoder.text, self.vocabulary)
            if isinstance(page, TokenPage) and not self.takes_tokens:
                raise BadRequest(
                    "this arm is a cascade of two vocabularies, so it cannot take token_ids: send the text"
                )
            prior = read_prior(request, len(page))
            blend = without_prior if prior is None else partial(self.prior.blend, prior=prior)
            scores, chunks = await self._scores(page, blend, self._caller(request))
        except BadRequest as problem:
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(str(problem), pb_utils.TritonError.INVALID_ARG)
            )
        except pb_utils.TritonModelException as problem:  # an encoder's own message: queue full, timeout, not loaded
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(str(problem), pb_utils.TritonError.UNAVAILABLE)
            )
        answer = [pb_utils.Tensor("score", scores)]
        if self.calibration is not None and "probability" in request.requested_output_names():
            # a list without any prior keeps the model's own scores
            blended = prior is not None and not np.isnan(prior).all()
            chances = probability(scores, self.calibration["with_prior" if blended else "alone"])
            answer.append(pb_utils.Tensor("probability", chances.astype(np.float32)))
        if "chunks" in request.requested_output_names():
            answer.append(pb_utils.Tensor("chunks", chunks))
        return pb_utils.InferenceResponse(answer)

    async def _scores(self, page: Page, blend: Blend, caller: Caller) -> tuple[np.ndarray, np.ndarray]:
        """The arm's score of every document, float32 [n], one model's or both of a cascade joined; and its chunks."""
        if self.cascade is None or len(page) <= self.cascade.k:
            scores, chunks = await self.encoder.scores(page, caller)
            return blend(scores), chunks
        raw, chunks = await self.first.scores(page, caller)
        first = self.cascade.on_scale(raw)
        top = self.cascade.top(first, blend)
        scores, _ = await self.encoder.scores(page.take(top), caller)
        return self.cascade.join(first, top, scores, blend), chunks

    def _caller(self, request) -> Caller:
        trace = read_trace(request) if self.tracer else {}
        # where the server traces requests itself, its spans of the encoder belong to this request
        server_trace = request.trace() if request.trace().get_context() else None
        return Caller(request.timeout(), server_trace, partial(self._span, trace=trace))

    def _span(self, name: str, trace: dict[str, str]) -> tracing.Span:
        """A span of this request in the trace that it came with; none if it came with none."""
        return self.tracer.span(name, "internal", trace, {}) if self.tracer and trace else tracing.NO_SPAN


def field_metrics(cache: FieldCache, labels: dict[str, str]) -> CacheMetrics:
    """The metrics of a field cache."""
    counted = {
        "disranker_field_cache_hits_total": ("fields whose token ids were kept", lambda: cache.hits),
        "disranker_field_cache_misses_total": ("fields that were tokenised", lambda: cache.misses),
        "disranker_field_cache_fields": ("fields kept now", lambda: len(cache)),
        "disranker_field_cache_bytes": ("memory of the fields kept now", lambda: cache.bytes),
    }
    return CacheMetrics(counted, labels)


def score_metrics(cache: ScoreCache, labels: dict[str, str]) -> CacheMetrics:
    """The metrics of an encoder's score cache."""
    counted = {
        "disranker_score_cache_hits_total": ("documents whose score was kept", lambda: cache.hits),
        "disranker_score_cache_misses_total": ("documents that were encoded", lambda: cache.misses),
        "disranker_score_cache_audits_total": ("lookups computed all the same", lambda: cache.audits),
        "disranker_score_cache_moved_total": ("kept scores that were not exact", lambda: cache.moved),
        "disranker_score_cache_bytes": ("memory of the scores kept now", lambda: cache.used_bytes),
    }
    return CacheMetrics(counted, labels)


def read_trace(request) -> dict[str, str]:
    """The trace that a request belongs to, as W3C fields: the server's own span of it, else the caller's, else none."""
    context = request.trace().get_context()
    given = json.loads(context or request.parameters() or "{}")
    return {name: given[name] for name in (tracing.TRACEPARENT, tracing.TRACESTATE) if isinstance(given.get(name), str)}


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
