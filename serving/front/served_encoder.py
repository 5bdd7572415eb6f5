"""The front's side of one encoder: encodes a page, cuts it into calls, and asks `<name>_encoder` for the scores."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from buckets import cut, fill
from numpy.typing import NDArray
from pages import Page
from score_cache import ScoreCache

from ranking import tracing
from ranking.encoder_inputs import OUTPUT, Feed, chosen, inputs_of, pack, pad
from ranking.text import EncodedPairs, StudentFormat

Scored = tuple[NDArray[np.float32], NDArray[np.int32]]  # of each document: its score, and how many chunks were read


@dataclass(frozen=True)
class Caller:
    """Whose request is answered: its timeout, the server's own trace of it if there is one, and spans by name."""

    timeout_us: int
    server_trace: Any
    span: Callable[[str], tracing.Span]


class ServedEncoder:
    """One encoder, asked by BLS.

    folder: has the tokenizer and the score card that it was trained with; parameters: of the front's config.pbtxt;
    version: of the encoder, that of the front; prefix: of the parameters that name the encoder and its bucket lengths,
    "first_" for a cascade's small one. ValueError if a pair may be longer than the longest bucket.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, str], version: int, prefix: str = ""):
        self.name, self.version = parameters[f"{prefix}encoder"], version
        self.folder = folder
        self.max_batch = int(parameters["max_batch"])
        self.batch_tokens = int(parameters["batch_tokens"])
        self.call_tokens = int(parameters["call_tokens"])
        self.edges = [int(edge) for edge in parameters[f"{prefix}lengths"].split(",")]
        self.packed = parameters["layout"] == "packed"
        # row counts that calls are padded to, for CUDA graphs or a score cache; none where any count will do
        self.row_steps = [int(step) for step in parameters["row_steps"].split(",") if step]
        self.text = StudentFormat.of_checkpoint(folder)
        self.inputs = inputs_of(self.text.token_types)
        if self.edges[-1] < self.text.max_tokens():
            raise ValueError(f"the longest bucket is {self.edges[-1]}, a pair can have {self.text.max_tokens()} tokens")
        size_mb, age = float(parameters["score_cache_mb"]), float(parameters["score_cache_seconds"])
        self.cache = ScoreCache(int(size_mb * 2**20), age) if size_mb else None

    async def scores(self, page: Page, caller: Caller) -> Scored:
        """The raw score of every document and its chunks. TritonModelException with the encoder's own message."""
        if self.cache is None:
            return await self._encode(page, caller)
        keys = page.keys()
        found, chunks = self.cache.find(keys)
        known = ~np.isnan(found)
        if known.any() and self.cache.is_audit_due():
            computed, chunks = await self._encode(page, caller)
            if not self.cache.compare(found, computed):
                pb_utils.Logger.log_error(
                    f"{self.name}: a cached score differs from the computed one, so the score cache is off: this "
                    "processor is of another kind than the build's; build the student here"
                )
            return computed, chunks
        missing = np.flatnonzero(~known)
        if len(missing):
            found[missing], chunks[missing] = await self._encode(page.take(missing), caller)
            self.cache.keep([keys[row] for row in missing], found[missing], chunks[missing])
        return found, chunks

    async def _encode(self, page: Page, caller: Caller) -> Scored:
        with caller.span("tokenise") as span:
            documents = page.encode(self.text)
            span.set(documents=len(documents))
        calls = list(self._calls(documents.together))
        try:
            with caller.span("encode") as span:
                span.set(calls=len(calls))
                answers = await asyncio.gather(*(self._request(feed, caller).async_exec() for _, feed in calls))
        except pb_utils.TritonModelException as problem:
            raise pb_utils.TritonModelException(f"{self.name}: {problem}") from problem
        scores = np.empty(len(documents.together), np.float32)
        for (rows, _), answer in zip(calls, answers):
            if answer.has_error():
                raise pb_utils.TritonModelException(f"{self.name}: {answer.error().message()}")
            logits = pb_utils.get_output_tensor_by_name(answer, OUTPUT).as_numpy()
            scores[rows] = logits.reshape(-1)[: len(rows)]
        return documents.pool(scores), documents.chunks

    def _calls(self, pairs: EncodedPairs) -> Iterator[tuple[list[int], Feed]]:
        """Row numbers of the pairs of each call of the encoder, and the call's tensors."""
        lengths = pairs.lengths.tolist()
        if self.packed:
            for rows in fill(lengths, self.max_batch, self.batch_tokens):
                feed = pack(pairs.take(rows))
                yield rows, {name: values[None] for name, values in feed.items()}  # Triton's batch: one list
            return
        for bucket in cut(lengths, self.edges, self.max_batch, self.batch_tokens, self.call_tokens):
            count = len(bucket.rows)
            rows = next((step for step in self.row_steps if step >= count), count)
            feed = pad(pairs.take(bucket.rows), bucket.length, self.text.pad_id, rows)
            yield bucket.rows, chosen(feed, self.inputs)

    def _request(self, feed: Feed, caller: Caller):
        return pb_utils.InferenceRequest(
            timeout=caller.timeout_us,  # as the caller gave it: a call that nobody waits for leaves the encoder's queue
            model_name=self.name,
            model_version=self.version,
            requested_output_names=[OUTPUT],
            inputs=[pb_utils.Tensor(name, values) for name, values in feed.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
            **({"trace": caller.server_trace} if caller.server_trace else {}),
        )
