"""What the labeller sends, read as the stock vLLM backend reads it (triton-inference-server/vllm_backend).

That backend runs in NVIDIA's container alone. It takes `sampling_parameters` as a JSON string, drops nulls, converts
values whose annotation is a plain int, float, bool, str or Optional[int], and gives the rest to vLLM's SamplingParams
as they are; a failure there becomes no parameters at all. The same is done here with the installed vLLM.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import Any, Optional

import pytest
from tritonclient.grpc import service_pb2 as pb

from clients.labelling.served_teacher import ServedTeacher

SamplingParams = pytest.importorskip("vllm.sampling_params").SamplingParams

PLAIN = {int: int, float: float, bool: bool, str: str, Optional[int]: int}  # noqa: UP045 - the backend's own table
# inputs of a generation request that the backend declares, with their types
INPUTS = {
    "text_input": "BYTES", "stream": "BOOL", "sampling_parameters": "BYTES", "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL", "return_cumulative_logprob": "BOOL", "return_logprobs": "BOOL",
    "return_num_input_tokens": "BOOL", "return_num_output_tokens": "BOOL",
}  # fmt: skip
TEACHER = ServedTeacher("teacher", "id", 36, "{}")


def as_the_backend_reads(text: str) -> Any:
    values = {name: value for name, value in json.loads(text).items() if value is not None}
    annotations = SamplingParams.__annotations__
    read = {n: PLAIN[annotations[n]](v) if annotations.get(n) in PLAIN else v for n, v in values.items()}
    return SamplingParams(**read)


def test_the_sampling_parameters_ask_for_the_score_tokens_logit():
    element = TEACHER.request([(b"text",)]).raw_input_contents[1]
    assert struct.unpack("<I", element[:4])[0] == len(element) - 4  # a BYTES tensor [1]
    read = as_the_backend_reads(element[4:].decode("utf-8"))
    assert (read.max_tokens, read.temperature, read.logprobs, read.allowed_token_ids) == (1, 0.0, 0, [36])
    assert read.n == 1 and not read.stop and read.prompt_logprobs is None and read.detokenize is False


def test_the_request_has_the_backends_tensors_and_asks_for_no_text_back():
    request = TEACHER.request([(b"text",)])
    assert {tensor.name: tensor.datatype for tensor in request.inputs}.items() <= INPUTS.items()
    assert [tensor.name for tensor in request.outputs] == ["cumulative_logprob"]
    assert list(request.raw_input_contents[2:]) == [b"\x01", b"\x01"]
    assert [tensor.name for tensor in request.inputs] == [
        "text_input", "sampling_parameters", "return_cumulative_logprob", "exclude_input_in_output",
    ]  # fmt: skip


def test_a_request_carries_several_prompts_where_the_models_configuration_says_so():
    config = pb.ModelConfigResponse()
    for name, value in (("teacher_id", "id"), ("score_token_id", "36"), ("ranker_card", "{}")):
        config.config.parameters[name].string_value = value
    text_input = config.config.input.add(name="text_input", dims=[1])  # as the stock backend declares it
    assert ServedTeacher.of_config("teacher", config, "here") == replace(TEACHER, documents_per_request=1)
    text_input.dims[0] = -1
    teacher = ServedTeacher.of_config("teacher", config, "here")
    assert teacher.documents_per_request > 1
    request = teacher.request([(b"one",), ("zw\N{LATIN SMALL LETTER O WITH DIAERESIS}lf".encode(),)])
    assert [list(tensor.shape) for tensor in request.inputs] == [[2], [1], [1], [1]]
    assert request.raw_input_contents[0] == b"\3\0\0\0one\6\0\0\0zw\xc3\xb6lf"
    alone = TEACHER.request([(b"one",)])
    assert list(alone.inputs[0].shape) == [1]  # the next request has its own shape


def test_an_answer_with_another_number_of_scores_gives_none():
    answer = pb.ModelInferResponse()
    answer.outputs.add(name="cumulative_logprob", datatype="FP32", shape=[2])
    answer.raw_output_contents.append(struct.pack("<2f", 1.5, -2.0))
    assert TEACHER.scores(answer, 2) == [1.5, -2.0]
    assert TEACHER.scores(answer, 1) == [None]
