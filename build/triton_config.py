"""config.pbtxt of a student's two Triton models, made as protobuf messages, so that a misspelt field cannot be written.

`<name>` is the front (text in, scores out: serving/front/model.py), `<name>_encoder` runs the network. Both carry the
arm in their metric tags. Version numbers go together: front version 3 calls encoder version 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from build.runners import padded_length
from ranking.cascade import Cascade
from ranking.encoder_inputs import INPUTS, OUTPUT, PACKED_INPUTS
from ranking.errors import InputError
from ranking.limits import MAX_DOCUMENTS, MAX_FIELD_BYTES
from ranking.prior import PriorBlend

Target = Literal["openvino", "tensorrt"]
Graph = Literal["plain", "fused", "packed"]
CONFIG_NAME = "config.pbtxt"
GRAPH_ROWS = (8, 16, 24, 32, 48, 64)  # row counts that CUDA graphs are captured for; the front pads calls to them
# Settings whose good value depends on where the encoder runs. A GPU wants few large calls, and enough tokenising
# processes: one core tokenises a list of 48 in 10 to 15 ms, which a GPU encodes in less than 1 ms.
DEFAULTS: dict[Target, dict[str, int]] = {
    "openvino": {
        "max_batch": 64,
        "batch_tokens": 4096,
        "call_tokens": 128,
        "front_instances": 2,
        "encoder_instances": 1,
    },
    "tensorrt": {
        "max_batch": 256,
        "batch_tokens": 16384,
        "call_tokens": 1024,
        "front_instances": 8,
        "encoder_instances": 2,
    },
}
# all optional: a caller sends the first three or the others, and the front refuses what is neither
PAGE_INPUTS = (
    ("query", pb.TYPE_STRING, 1), ("title", pb.TYPE_STRING, -1), ("summary", pb.TYPE_STRING, -1),
    ("token_ids", pb.TYPE_INT32, -1), ("token_counts", pb.TYPE_INT32, -1), ("vocabulary", pb.TYPE_STRING, 1),
)  # fmt: skip
CPU, GPU = pb.ModelInstanceGroup.KIND_CPU, pb.ModelInstanceGroup.KIND_GPU


@dataclass
class ServingLimits:
    """How the published model serves. A setting of 0 takes the target's own default (docs/serving.md has both).

    Args:
        max_documents: documents in one request; more is refused with a clear error
        max_chunks: chunks of a long document that are read at most, where the checkpoint reads more; 0 for its own
            number. The gate judges what is served
        max_batch: pairs in one encoder call; on TensorRT also the largest batch that requests are merged to
        batch_tokens: tokens in one encoder call, padding included; lower it for shorter waits between requests
        call_tokens: what one more encoder call costs, in tokens: a length bucket is split only where that saves more
            padding
        bucket_step: bucket lengths are multiples of this (OpenVINO)
        lengths: bucket lengths for TensorRT, one optimisation profile each; the longest pair's length is added
        front_instances: processes that tokenise; several overlap one request's text with another's encoding
        cached_fields: fields (queries, titles, summaries) whose token ids each front instance keeps; 0 for none
        score_cache_mb: OpenVINO: memory of each front instance for scores that it has computed, in MiB; 0 for none
        score_cache_seconds: a score that is older is computed again
        encoder_instances: copies of the encoder; on TensorRT two overlap copies with computing
        threads: CPU threads of the encoder, 0 for all cores
        streams: requests that OpenVINO works on at the same time
        queue_size: requests waiting for the front; a request that finds the queue full is refused at once
        queue_timeout_ms: a request that waited longer is refused; callers may ask for less
        encoder_timeout_ms: TensorRT: an encoder call that waited longer is refused, and its request with it
        queue_delay_us: how long TensorRT's batcher waits for more requests to merge
        graph: for TensorRT: "fused" has the scale in the query's weights and a Boolean mask, "packed" also takes lists
            without padding in one call, "plain" is transformers' own graph
        half_softmax: TensorRT: softmax in fp16 too, for an engine whose attention is not fused; the gate judges it
        merged_lists: lists of different requests in one call of a packed encoder
        cuda_graphs: TensorRT: launch a captured graph per bucket length and row count; the front pads rows to those
        memory_on_profile_change: TensorRT: scratch memory for the profile in use, not for the largest one
    """

    max_documents: int = MAX_DOCUMENTS
    max_chunks: int = 0
    max_batch: int = 0
    batch_tokens: int = 0
    call_tokens: int = 0
    bucket_step: int = 16
    lengths: list[int] = field(default_factory=lambda: [32, 64, 96, 128, 160])
    front_instances: int = 0
    cached_fields: int = 20_000
    score_cache_mb: float = 0.0
    score_cache_seconds: float = 3600.0
    encoder_instances: int = 0
    threads: int = 0
    streams: int = 1
    queue_size: int = 64
    queue_timeout_ms: int = 2000
    encoder_timeout_ms: int = 30_000
    queue_delay_us: int = 300
    graph: Graph = "fused"
    half_softmax: bool = False
    merged_lists: int = 4
    cuda_graphs: bool = False
    memory_on_profile_change: bool = True

    def __post_init__(self) -> None:
        for name in (
            "max_documents", "bucket_step", "streams", "queue_size", "queue_timeout_ms", "encoder_timeout_ms",
            "merged_lists",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        for name in ("threads", "queue_delay_us"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: 0 or more is needed")
        if self.max_chunks < 0:
            raise ValueError(f"max_chunks is {self.max_chunks}: a number of chunks, or 0 for the checkpoint's own")
        if self.cached_fields < 0:
            raise ValueError(f"cached_fields is {self.cached_fields}: a number of fields, or 0 for none")
        if not 0 <= self.score_cache_mb < math.inf or not self.score_cache_seconds > 0:
            raise ValueError(
                f"score_cache_mb is {self.score_cache_mb}, score_cache_seconds {self.score_cache_seconds}: a size of 0 "
                "or more and an age above 0 are needed"
            )
        for name in DEFAULTS["tensorrt"]:
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: at least 1 is needed, or 0 for the target's default"
                )
        if any(length < 1 for length in self.lengths) or not self.lengths:
            raise ValueError(f"lengths is {self.lengths}: bucket lengths in tokens are needed")
        if self.cuda_graphs and self.graph == "packed":
            raise ValueError(
                "cuda_graphs: a packed list has too many possible sizes; choose graph fused, or leave it out"
            )

    def for_target(self, target: Target) -> ServingLimits:
        """A copy in which every setting of 0 has the target's default."""
        chosen: dict[str, Any] = {n: getattr(self, n) or default for n, default in DEFAULTS[target].items()}
        return replace(self, **chosen)


def bucket_lengths(limits: ServingLimits, target: Target, longest: int) -> list[int]:
    """Ascending padded lengths that the encoder is called with; the last one holds the longest pair."""
    if target == "openvino":
        step = limits.bucket_step
        return [*range(step, longest, step), longest]
    # tensor cores want multiples of 8
    if limits.graph == "packed":
        return [padded_length(longest)]
    return sorted({padded_length(min(length, longest)) for length in (*limits.lengths, longest)})


def row_steps(limits: ServingLimits, target: Target) -> tuple[int, ...]:
    """The row counts that the front pads its calls to; empty where any count will do. limits: as of for_target().

    Where scores are cached they are 1, 2, 3, 4, 6, 8, 12 and so on: few enough that a build can try every shape of call
    that the front makes.
    """
    if target == "tensorrt":
        return tuple(rows for rows in GRAPH_ROWS if rows <= limits.max_batch) if limits.cuda_graphs else ()
    if not limits.score_cache_mb:
        return ()
    steps = {first << power for first in (1, 3) for power in range(limits.max_batch.bit_length())}
    return (*sorted(step for step in steps if step < limits.max_batch), limits.max_batch)


def encoder_name(name: str) -> str:
    """Name of the Triton model that runs the network of the front model `name`."""
    return f"{name}_encoder"


def first_encoder_name(name: str) -> str:
    """Name of the Triton model that runs the small network of the front model `name`, where it is a cascade."""
    return f"{name}_first_encoder"


def front_config(
    name: str,
    target: Target,
    limits: ServingLimits,
    lengths: Sequence[int],
    tags: Mapping[str, str],
    prior: PriorBlend,
    probabilities: bool = False,
    cascade: Cascade | None = None,
    first_lengths: Sequence[int] = (),
    chunks: int = 1,
) -> pb.ModelConfig:
    """The model that callers see: text or token ids of n documents, optional prior FP32 [n] -> score FP32 [n].

    prior: how much of the first stage's score the arm blends in where a caller sends it; probabilities: whether it also
    gives probability FP32 [n]; cascade, first_lengths: for an arm that is one, with its small encoder's bucket lengths;
    chunks: of a document that are read at most. Above 1 the model also takes an optional max_chunks INT32 [1], and
    gives chunks INT32 [n].
    """
    on_gpu = target == "tensorrt"
    limits = limits.for_target(target)
    parameters = {
        "encoder": encoder_name(name),
        "max_documents": str(limits.max_documents),
        "max_chunks": str(chunks),  # for callers, as the next: the front reads them from card and code
        "max_field_bytes": str(MAX_FIELD_BYTES),
        "max_batch": str(limits.max_batch),
        "batch_tokens": str(limits.batch_tokens),
        "call_tokens": str(limits.call_tokens),
        "cached_fields": str(limits.cached_fields),
        "score_cache_mb": repr(limits.score_cache_mb),
        "score_cache_seconds": repr(limits.score_cache_seconds),
        "lengths": ",".join(map(str, lengths)),
        "prior_weight": repr(prior.weight),
        "prior_mean": repr(prior.mean),
        "prior_spread": repr(prior.spread),
        "layout": "packed" if on_gpu and limits.graph == "packed" else "padded",
        "row_steps": ",".join(map(str, row_steps(limits, target))),
    }
    if cascade is not None:
        parameters |= {f"cascade_{name}": repr(value) for name, value in asdict(cascade).items()}
        parameters |= {"first_encoder": first_encoder_name(name), "first_lengths": ",".join(map(str, first_lengths))}
    config = pb.ModelConfig(
        name=name,
        backend="python",
        # a request is a query with its documents: it has no batch dimension to merge along (docs/serving.md)
        max_batch_size=0,
        input=[
            *(pb.ModelInput(name=name, data_type=kind, dims=[size], optional=True) for name, kind, size in PAGE_INPUTS),
            pb.ModelInput(name="prior", data_type=pb.TYPE_FP32, dims=[-1], optional=True),
        ],
        output=[
            pb.ModelOutput(name=name, data_type=pb.TYPE_FP32, dims=[-1])
            for name in ("score", *(["probability"] if probabilities else []))
        ],
        instance_group=[pb.ModelInstanceGroup(count=limits.front_instances, kind=CPU)],
        dynamic_batching=bounded_queue(limits.queue_size, limits.queue_timeout_ms),
        metric_tags=dict(tags),
        parameters=as_parameters(parameters),
    )
    if chunks > 1:
        config.input.add(name="max_chunks", data_type=pb.TYPE_INT32, dims=[1], optional=True)
        config.output.add(name="chunks", data_type=pb.TYPE_INT32, dims=[-1])
    return config


def encoder_config(
    name: str,
    target: Target,
    limits: ServingLimits,
    lengths: Sequence[int],
    tags: Mapping[str, str],
    parameters: Mapping[str, str],
    inputs: Sequence[str] = INPUTS,
    chunks: int = 1,
) -> pb.ModelConfig:
    """The network: INT32 inputs -> logits, or four packed ones.

    parameters: of the backend; inputs: of a padded graph; chunks: of a document that the front reads at most.

    For OpenVINO max_batch_size is 0 and the first dimension free: with a batch size the official backend refuses every
    smaller batch or pads it to the full size, and one request's buckets fill a CPU already. TensorRT merges requests
    whose bucket lengths agree, and packed lists of any length. No batch size is preferred: with one, Triton holds a
    smaller batch back for the whole queue delay.

    TensorRT's queue takes every call that the fronts can have under way: it never refuses their work, but that of
    somebody who asks the encoder itself. OpenVINO's has no bound: a batcher with a queue policy over a model that
    merges nothing leaves calls waiting on an idle processor (docs/decisions.md).
    """
    limits = limits.for_target(target)
    config = pb.ModelConfig(name=encoder_name(name), metric_tags=dict(tags), parameters=as_parameters(parameters))
    if target == "openvino":
        config.backend = "openvino"
        config.default_model_filename = "model.xml"
        config.instance_group.add(count=limits.encoder_instances, kind=CPU)
    else:
        config.platform = "tensorrt_plan"
        config.default_model_filename = "model.plan"
        profiles = [str(i) for i in range(len(lengths))]
        config.instance_group.add(count=limits.encoder_instances, kind=GPU, profile=profiles)
        waiting = limits.front_instances * most_calls(limits, lengths, chunks)
        config.dynamic_batching.CopyFrom(bounded_queue(waiting, limits.encoder_timeout_ms))
        config.dynamic_batching.max_queue_delay_microseconds = limits.queue_delay_us
        if limits.memory_on_profile_change:
            strategy = pb.ModelParameter(string_value="ON_PROFILE_CHANGE")
            config.parameters["execution_context_allocation_strategy"].CopyFrom(strategy)
    if target == "tensorrt" and limits.graph == "packed":
        _add_packed_tensors(config, limits)
    else:
        _add_padded_tensors(config, limits, lengths, inputs, batched=target == "tensorrt")
    return config


def _add_padded_tensors(
    config: pb.ModelConfig, limits: ServingLimits, lengths: Sequence[int], inputs: Sequence[str], batched: bool
) -> None:
    """Inputs [batch, length], output [batch, 1], a warm-up run per bucket length, and CUDA graphs where asked for."""
    config.max_batch_size = limits.max_batch if batched else 0
    pair = [-1] if batched else [-1, -1]
    config.input.extend(pb.ModelInput(name=tensor, data_type=pb.TYPE_INT32, dims=pair) for tensor in inputs)
    config.output.add(name=OUTPUT, data_type=pb.TYPE_FP32, dims=[1] if batched else [-1, 1])
    for length in lengths:
        rows = max(1, min(limits.max_batch, limits.batch_tokens // length))
        config.model_warmup.append(
            _warmup(f"length_{length}", inputs, [length] if batched else [rows, length], rows if batched else 0)
        )
    if batched and limits.cuda_graphs:
        cuda = config.optimization.cuda
        cuda.graphs = True
        for length in lengths:
            for rows in (rows for rows in GRAPH_ROWS if rows <= limits.max_batch):
                spec = cuda.graph_spec.add(batch_size=rows)
                for tensor in inputs:
                    spec.input[tensor].dim.append(length)


def _add_packed_tensors(config: pb.ModelConfig, limits: ServingLimits) -> None:
    """Ragged inputs, which Triton concatenates over requests; the output goes back by each request's lengths."""
    config.max_batch_size = limits.merged_lists
    for tensor in PACKED_INPUTS:
        config.input.add(name=tensor, data_type=pb.TYPE_INT32, dims=[-1], allow_ragged_batch=True)
    config.output.add(name=OUTPUT, data_type=pb.TYPE_FP32, dims=[-1])
    scatter = pb.BatchOutput.BATCH_SCATTER_WITH_INPUT_SHAPE
    config.batch_output.add(target_name=[OUTPUT], kind=scatter, source_input=PACKED_INPUTS[-1:])
    # all zeros: as many pairs as tokens, each of which is the first of its pair
    config.model_warmup.append(_warmup("packed", PACKED_INPUTS, [limits.max_batch], 1))


def _warmup(name: str, tensors: Sequence[str], dims: Sequence[int], batch_size: int) -> pb.ModelWarmup:
    """One run before the version counts as ready. Zeros: padding ids, everything masked."""
    inputs = {tensor: pb.ModelWarmup.Input(data_type=pb.TYPE_INT32, dims=dims, zero_data=True) for tensor in tensors}
    return pb.ModelWarmup(name=name, batch_size=batch_size, inputs=inputs, count=1)


def most_calls(limits: ServingLimits, lengths: Sequence[int], chunks: int = 1) -> int:
    """At most so many encoder calls come of one request of max_documents documents; limits as of for_target()."""
    smallest = max(1, min(limits.max_batch, limits.batch_tokens // lengths[-1]))  # rows of a full call of long pairs
    return len(lengths) + math.ceil(limits.max_documents * chunks / smallest)


def bounded_queue(size: int, timeout_ms: int) -> pb.ModelDynamicBatching:
    """At most `size` waiting requests, and an end to the wait: who is too late is told so at once, and can fall back.

    timeout_ms: callers may ask for less, and wait no longer than they ask.
    """
    policy = pb.ModelQueuePolicy(
        timeout_action=pb.ModelQueuePolicy.REJECT,
        default_timeout_microseconds=timeout_ms * 1000,
        allow_timeout_override=True,
        max_queue_size=size,
    )
    return pb.ModelDynamicBatching(default_queue_policy=policy)


def as_parameters(values: Mapping[str, str]) -> dict[str, pb.ModelParameter]:
    """String parameters in the form that a ModelConfig holds them."""
    return {name: pb.ModelParameter(string_value=value) for name, value in values.items()}


def serve_versions(config: pb.ModelConfig, versions: Sequence[int]) -> pb.ModelConfig:
    """A copy of the config that serves exactly these versions."""
    chosen = pb.ModelConfig()
    chosen.CopyFrom(config)
    chosen.version_policy.specific.versions[:] = sorted(versions)
    return chosen


def read_config(path: str | Path) -> pb.ModelConfig:
    """A config.pbtxt as a message. InputError if it is absent or malformed."""
    try:
        return text_format.Parse(Path(path).read_text(encoding="utf-8"), pb.ModelConfig())
    except (OSError, text_format.ParseError) as problem:
        raise InputError(f"{path}: cannot be read as a Triton model config: {problem}") from problem


def as_text(config: pb.ModelConfig) -> str:
    """The message as the text of a config.pbtxt."""
    return text_format.MessageToString(config, as_utf8=True)
