"""Requests to a teacher over one gRPC stream, each answered by a score or by the server's reason."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

MODEL = "teacher"
Request = service_pb2.ModelInferRequest


class Refused(Exception):
    """The server's reason for not answering a request with a result."""


def score_token_id(address: str, model: str = MODEL) -> int:
    """The token whose logit is the score, asked from the server as any client does."""
    return int(parameter(address, "score_token_id", model))


def parameter(address: str, name: str, model: str = MODEL) -> str:
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        config = stub.ModelConfig(service_pb2.ModelConfigRequest(name=model)).config
    return config.parameters[name].string_value


def request(model: str = MODEL, **inputs: Any) -> Request:
    """A request with one tensor per keyword: str and bytes as BYTES [1], a list of them as BYTES [n], bool as BOOL [1],
    int as INT32 [1].
    """
    made = Request(model_name=model)
    for name, value in inputs.items():
        if isinstance(value, bool):
            kind, raw = "BOOL", np.array([value]).tobytes()
        elif isinstance(value, int):
            kind, raw = "INT32", np.array([value], np.int32).tobytes()
        else:
            values = np.array(value if isinstance(value, list) else [value], dtype=object)
            kind, raw = "BYTES", serialize_byte_tensor(values).item() if len(values) else b""
        made.inputs.add(name=name, datatype=kind, shape=[len(value) if isinstance(value, list) else 1])
        made.raw_input_contents.append(raw)
    return made


def sampling(token: int, **changes: Any) -> str:
    return json.dumps({"max_tokens": 1, "temperature": 0, "logprobs": 0, "allowed_token_ids": [token], **changes})


def score_request(prompt: str | bytes | list[str], parameters: str | bytes, **more: Any) -> Request:
    tensors = {"return_cumulative_logprob": True, "exclude_input_in_output": True, **more}
    return request(text_input=prompt, sampling_parameters=parameters, **tensors)


def output(response: service_pb2.ModelInferResponse, name: str) -> list[Any]:
    """The values of one output tensor: floats, ints or strings."""
    position = [tensor.name for tensor in response.outputs].index(name)
    raw, kind = response.raw_output_contents[position], response.outputs[position].datatype
    if kind == "BYTES":
        return [text.decode() for text in deserialize_bytes_tensor(raw)]
    return np.frombuffer(raw, {"FP32": np.float32, "UINT32": np.uint32}[kind]).tolist()


def read_score(response: service_pb2.ModelInferResponse) -> float:
    (score,) = output(response, "cumulative_logprob")
    return score


def stream(address: str, requests: Iterator[Request]) -> Iterator[service_pb2.ModelStreamInferResponse]:
    with grpc.insecure_channel(address) as channel:
        yield from service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(requests)


def ask_all(
    address: str,
    requests: Sequence[Request],
    *,
    read: Callable[[service_pb2.ModelInferResponse], Any] = read_score,
    seconds: float = 120.0,
) -> list[Any]:
    """One answer per request, in order: what `read` makes of the response, or Refused.

    AssertionError if a request is answered twice; grpc.RpcError if not all are answered within `seconds`.
    """
    for number, each in enumerate(requests):
        each.id = str(number)
    end: queue.SimpleQueue = queue.SimpleQueue()
    got: dict[int, Any] = {}
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        call = stub.ModelStreamInfer(_until(requests, end), timeout=seconds)
        for answer in call:
            number = int(answer.infer_response.id)
            assert number not in got, f"request {number} was answered twice"
            got[number] = Refused(answer.error_message) if answer.error_message else read(answer.infer_response)
            if len(got) == len(requests):
                end.put(None)
    return [got[number] for number in range(len(requests))]


def _until(requests: Sequence[Request], end: queue.SimpleQueue) -> Iterator[Request]:
    """Send all requests, then hold the stream open until every answer has come."""
    yield from requests
    end.get()


def scores(address: str, prompts: Sequence[str]) -> list[float]:
    """The served score of each prompt. Raises the server's reason if one is refused."""
    parameters = sampling(score_token_id(address))
    found = ask_all(address, [score_request(prompt, parameters) for prompt in prompts])
    for each in found:
        if isinstance(each, Refused):
            raise each
    return found
