"""The stock vLLM backend's tensors: their declaration, how a request is read and how an output becomes a response.

Names and types are those of triton-inference-server/vllm_backend (src/model.py, src/utils/request.py), and whatever is
asked of that one is answered the same here. What is not offered (images, LoRA names, embeddings) is refused with a
reason. One thing is more: `text_input` may hold several texts, which the model's configuration says by its shape [-1];
outputs then hold the values of one text after another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

_OPTIONAL_FLAGS = (
    "stream",
    "exclude_input_in_output",
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
)
INPUTS: list[dict[str, Any]] = [
    {"name": "text_input", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "image", "data_type": "TYPE_STRING", "dims": [-1], "optional": True},
    {"name": "sampling_parameters", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
    *({"name": name, "data_type": "TYPE_BOOL", "dims": [1], "optional": True} for name in _OPTIONAL_FLAGS),
    {"name": "embedding_request", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
]
OUTPUTS: list[dict[str, Any]] = [
    {"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "finish_reason", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "cumulative_logprob", "data_type": "TYPE_FP32", "dims": [-1]},
    {"name": "logprobs", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "num_input_tokens", "data_type": "TYPE_UINT32", "dims": [-1]},
    {"name": "num_output_tokens", "data_type": "TYPE_UINT32", "dims": [-1]},
]
MOST_TEXTS = 256  # of one request: a request is refused, cancelled and answered as a whole


class RefusedRequest(ValueError):
    """A request that cannot be served as it was asked; the message goes to the caller."""


def declare(config: Any) -> Any:
    """Complete a model configuration: every tensor that it lacks, decoupled responses, no batching in Triton."""
    present = config.as_dict()
    for declared, known, add in (
        (INPUTS, present["input"], config.add_input),
        (OUTPUTS, present["output"], config.add_output),
    ):
        names = {tensor["name"] for tensor in known}
        for tensor in declared:
            if tensor["name"] not in names:
                add(tensor)
    config.set_model_transaction_policy({"decoupled": True})
    config.set_max_batch_size(0)
    return config


@dataclass(frozen=True)
class Call:
    """One request: its prompts, vLLM's sampling parameters by name, and what the caller wants back."""

    prompts: list[str]
    sampling: dict[str, Any]
    stream: bool
    prepend_input: bool
    wanted: frozenset[str]

    @classmethod
    def of_request(cls, request: Any) -> Call:
        """Read a Triton request. RefusedRequest names the tensor and what is wrong with it."""
        if pb_utils.get_input_tensor_by_name(request, "embedding_request") is not None:
            raise RefusedRequest("embedding_request: this model generates, it does not embed")
        images = pb_utils.get_input_tensor_by_name(request, "image")
        if images is not None and images.as_numpy().size:
            raise RefusedRequest("image: this server takes text only")
        flags = {name: _flag(request, name) for name in _OPTIONAL_FLAGS}
        stream = bool(flags["stream"])
        exclude = flags["exclude_input_in_output"]
        prepend = not stream if exclude is None else not exclude
        if stream and prepend:
            raise RefusedRequest("exclude_input_in_output: must be true when stream is true")
        prompts = _texts(request, "text_input")
        if not 1 <= len(prompts) <= (1 if stream else MOST_TEXTS):
            allowed = "one text" if stream else f"1 to {MOST_TEXTS} texts"
            raise RefusedRequest(f"text_input: {allowed} expected, not {len(prompts)}")
        return cls(
            prompts=prompts,
            sampling=_sampling_parameters(request),
            stream=stream,
            prepend_input=prepend,
            wanted=frozenset(name for name, value in flags.items() if name.startswith("return_") and value),
        )

    def response(self, outputs: Sequence[Any]) -> Any:
        """The response for vLLM's RequestOutputs, one a prompt: final, or (streaming) the part since the last one."""
        before = self.prompts if self.prepend_input else [""] * len(outputs)
        texts = [start + part.text for start, output in zip(before, outputs) for part in output.outputs]
        parts = [part for output in outputs for part in output.outputs]
        tensors = [_strings("text_output", texts)]
        if "return_finish_reason" in self.wanted:
            tensors.append(_strings("finish_reason", [str(part.finish_reason) for part in parts]))
        if "return_cumulative_logprob" in self.wanted:
            scores = np.array([part.cumulative_logprob for part in parts], dtype=np.float32)
            tensors.append(pb_utils.Tensor("cumulative_logprob", scores))
        if "return_logprobs" in self.wanted:
            tensors.append(_strings("logprobs", [_logprobs_json(part.logprobs) for part in parts]))
        if "return_num_input_tokens" in self.wanted:
            counts = np.array([len(output.prompt_token_ids) for output in outputs], dtype=np.uint32)
            tensors.append(pb_utils.Tensor("num_input_tokens", counts))
        if "return_num_output_tokens" in self.wanted:
            counts = np.array([len(part.token_ids) for part in parts], dtype=np.uint32)
            tensors.append(pb_utils.Tensor("num_output_tokens", counts))
        return pb_utils.InferenceResponse(output_tensors=tensors)


def _flag(request: Any, name: str) -> bool | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else bool(tensor.as_numpy().reshape(-1)[0])


def _texts(request: Any, name: str) -> list[str]:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        raise RefusedRequest(f"{name}: missing")
    try:
        return [value if isinstance(value, str) else value.decode("utf-8") for value in tensor.as_numpy().reshape(-1)]
    except UnicodeDecodeError as problem:
        raise RefusedRequest(f"{name}: not UTF-8: {problem}") from problem


def _sampling_parameters(request: Any) -> dict[str, Any]:
    """The tensor's JSON object, else the request's own parameters (which carry no lists). Null means the default."""
    given = pb_utils.get_input_tensor_by_name(request, "sampling_parameters") is not None
    source = _texts(request, "sampling_parameters")[0] if given else request.parameters()
    try:
        values = json.loads(source)
    except (ValueError, RecursionError) as problem:
        raise RefusedRequest(f"sampling_parameters: not JSON: {problem}") from problem
    if not isinstance(values, dict):
        raise RefusedRequest(f"sampling_parameters: a JSON object is expected, not {type(values).__name__}")
    if values.get("lora_name") is not None:
        raise RefusedRequest("sampling_parameters: lora_name: this server has no LoRA adapters; build a merged model")
    return {name: value for name, value in values.items() if value is not None}


def _logprobs_json(positions: Any) -> str:
    if positions is None:
        return "null"
    return json.dumps(
        [
            {
                token: {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": entry.decoded_token}
                for token, entry in position.items()
            }
            for position in positions
        ]
    )


def _strings(name: str, values: list[str]) -> Any:
    return pb_utils.Tensor(name, np.array([value.encode("utf-8") for value in values], dtype=np.object_))
