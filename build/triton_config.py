"""config.pbtxt of a student's two Triton models, made as protobuf messages, so that a misspelt field cannot be written.

`<name>` is the front (text in, scores out: serving/front/model.py), `<name>_encoder` runs the network. Both carry the
arm in their metric tags. Version numbers go together: front version 3 calls encoder version 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from build.runners import padded_length
from ranking.encoder_inputs import INPUTS, OUTPUT
from ranking.errors import InputError
from ranking.limits import MAX_DOCUMENTS
from ranking.prior import PriorBlend

Target = Literal["openvino", "tensorrt"]
CONFIG_NAME = "config.pbtxt"
CPU, GPU = pb.ModelInstanceGroup.KIND_CPU, pb.ModelInstanceGroup.KIND_GPU


@dataclass
class ServingLimits:
    """How the published model serves.

    Args:
        max_documents: documents in one request; more is refused with a clear error
        max_batch: pairs in one encoder call; on TensorRT also the largest batch that requests are merged to
        batch_tokens: padded tokens in one encoder call; lower it for shorter waits between requests, raise it on a GPU
        call_tokens: what one more encoder call costs, in tokens: a length bucket is split only where that saves more
            padding
        bucket_step: bucket lengths are multiples of this (OpenVINO)
        lengths: bucket lengths for TensorRT, one optimisation profile each; the longest pair's length is added
        front_instances: processes that tokenise; two overlap one request's text with the other's encoding
        encoder_instances: copies of the encoder
        threads: CPU threads of the encoder, 0 for all cores
        streams: requests that OpenVINO works on at the same time
        queue_size: requests waiting for the front; a request that finds the queue full is refused at once
        queue_timeout_ms: a request that waited longer is refused; callers may ask for less
        queue_delay_us: how long TensorRT's batcher waits for more requests to merge
    """

    max_documents: int = MAX_DOCUMENTS
    max_batch: int = 64
    batch_tokens: int = 4096
    call_tokens: int = 128
    bucket_step: int = 16
    lengths: list[int] = field(default_factory=lambda: [32, 64, 96, 128])
    front_instances: int = 2
    encoder_instances: int = 1
    threads: int = 0
    streams: int = 1
    queue_size: int = 64
    queue_timeout_ms: int = 2000
    queue_delay_us: int = 300

    def __post_init__(self) -> None:
        for name in ("max_documents", "max_batch", "batch_tokens", "bucket_step", "front_instances", "queue_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        if any(length < 1 for length in self.lengths) or not self.lengths:
            raise ValueError(f"lengths is {self.lengths}: bucket lengths in tokens are needed")


def bucket_lengths(limits: ServingLimits, target: Target, longest: int) -> list[int]:
    """Ascending padded lengths that the encoder is called with; the last one holds the longest pair."""
    if target == "openvino":
        step = limits.bucket_step
        return [*range(step, longest, step), longest]
    # tensor cores want multiples of 8
    return sorted({padded_length(min(length, longest)) for length in (*limits.lengths, longest)})


def encoder_name(name: str) -> str:
    """Name of the Triton model that runs the network of the front model `name`."""
    return f"{name}_encoder"


def front_config(
    name: str, limits: ServingLimits, lengths: Sequence[int], tags: Mapping[str, str], prior: PriorBlend
) -> pb.ModelConfig:
    """The model that callers see: query BYTES [1], title, summary BYTES [n], optional prior FP32 [n] -> score FP32 [n].

    prior: how much of the first stage's score the arm blends in where a caller sends it.
    """
    text = pb.TYPE_STRING
    parameters = {
        "encoder": encoder_name(name),
        "max_documents": str(limits.max_documents),
        "max_batch": str(limits.max_batch),
        "batch_tokens": str(limits.batch_tokens),
        "call_tokens": str(limits.call_tokens),
        "lengths": ",".join(map(str, lengths)),
        "prior_weight": repr(prior.weight),
        "prior_mean": repr(prior.mean),
        "prior_spread": repr(prior.spread),
    }
    return pb.ModelConfig(
        name=name,
        backend="python",
        # a request is a query with its documents: it has no batch dimension to merge along (docs/serving.md)
        max_batch_size=0,
        input=[
            pb.ModelInput(name="query", data_type=text, dims=[1]),
            pb.ModelInput(name="title", data_type=text, dims=[-1]),
            pb.ModelInput(name="summary", data_type=text, dims=[-1]),
            pb.ModelInput(name="prior", data_type=pb.TYPE_FP32, dims=[-1], optional=True),
        ],
        output=[pb.ModelOutput(name="score", data_type=pb.TYPE_FP32, dims=[-1])],
        instance_group=[pb.ModelInstanceGroup(count=limits.front_instances, kind=CPU)],
        dynamic_batching=pb.ModelDynamicBatching(default_queue_policy=queue_policy(limits)),
        metric_tags=dict(tags),
        parameters=as_parameters(parameters),
    )


def encoder_config(
    name: str,
    target: Target,
    limits: ServingLimits,
    lengths: Sequence[int],
    tags: Mapping[str, str],
    parameters: Mapping[str, str],
) -> pb.ModelConfig:
    """The network: three INT32 inputs -> logits. parameters: of the backend.

    For OpenVINO max_batch_size is 0 and the first dimension free: with a batch size the official backend refuses every
    smaller batch or pads it to the full size, and one request's buckets fill a CPU already. TensorRT merges requests
    whose bucket lengths agree.
    """
    batched = target == "tensorrt"
    pair = [-1] if batched else [-1, -1]
    config = pb.ModelConfig(
        name=encoder_name(name),
        max_batch_size=limits.max_batch if batched else 0,
        input=[pb.ModelInput(name=tensor, data_type=pb.TYPE_INT32, dims=pair) for tensor in INPUTS],
        output=[pb.ModelOutput(name=OUTPUT, data_type=pb.TYPE_FP32, dims=[1] if batched else [-1, 1])],
        metric_tags=dict(tags),
        parameters=as_parameters(parameters),
        model_warmup=[_warmup(length, limits, batched) for length in lengths],
    )
    if batched:
        config.platform = "tensorrt_plan"
        config.default_model_filename = "model.plan"
        profiles = [str(i) for i in range(len(lengths))]
        config.instance_group.add(count=limits.encoder_instances, kind=GPU, profile=profiles)
        config.dynamic_batching.max_queue_delay_microseconds = limits.queue_delay_us
        config.dynamic_batching.preferred_batch_size.append(limits.max_batch)
    else:
        config.backend = "openvino"
        config.default_model_filename = "model.xml"
        config.instance_group.add(count=limits.encoder_instances, kind=CPU)
    return config


def _warmup(length: int, limits: ServingLimits, batched: bool) -> pb.ModelWarmup:
    """One run per bucket length before the version counts as ready. Zeros: padding ids, everything masked."""
    rows = max(1, min(limits.max_batch, limits.batch_tokens // length))
    dims = [length] if batched else [rows, length]
    inputs = {tensor: pb.ModelWarmup.Input(data_type=pb.TYPE_INT32, dims=dims, zero_data=True) for tensor in INPUTS}
    return pb.ModelWarmup(name=f"length_{length}", batch_size=rows if batched else 0, inputs=inputs, count=1)


def queue_policy(limits: ServingLimits) -> pb.ModelQueuePolicy:
    """Bounded, and with an end to the wait: an overloaded server says so at once, and callers fall back in time."""
    return pb.ModelQueuePolicy(
        timeout_action=pb.ModelQueuePolicy.REJECT,
        default_timeout_microseconds=limits.queue_timeout_ms * 1000,
        allow_timeout_override=True,
        max_queue_size=limits.queue_size,
    )


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
