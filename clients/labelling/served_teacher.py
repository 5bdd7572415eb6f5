"""The teacher that a server has loaded: which one it is, how to ask it for a score, and its tokenizer on this
machine."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import grpc
from tritonclient.grpc import service_pb2 as pb

from ranking.card import ScoreCard, fingerprint
from ranking.errors import InputError
from ranking.reranker_prompts import format_of_teacher
from ranking.text import TeacherFormat

PROMPTS_PER_REQUEST = 16  # where a request may carry several


@dataclass(frozen=True)
class ServedTeacher:
    """A served teacher, from its model config.

    card: its score card as JSON, which carries the text format and limits. head_dtype: number format that the score is
    computed in, where the config names one. documents_per_request: prompts that one request may carry; more than one
    where the config says so by the shape of `text_input`, which NVIDIA's backend does not. version: the model's, which
    requests name, so that a server that has put another in its place refuses them; "" asks whichever it has.
    """

    model: str
    teacher_id: str
    score_token_id: int
    card: str
    head_dtype: str = ""
    documents_per_request: int = 1
    version: str = ""
    one_query_a_request: ClassVar[bool] = False  # each prompt has its query

    @classmethod
    def of_config(cls, model: str, config: pb.ModelConfigResponse, where: str) -> ServedTeacher:
        """InputError if the model was not built by build/build_teacher.py: then nothing says what its scores are."""
        given = {name: parameter.string_value for name, parameter in config.config.parameters.items()}
        try:
            token, head = int(given["score_token_id"]), given.get("head_dtype", "")
            several = any(t.name == "text_input" and list(t.dims) == [-1] for t in config.config.input)
            prompts = PROMPTS_PER_REQUEST if several else 1
            return cls(model, given["teacher_id"], token, given["ranker_card"], head, prompts)
        except (KeyError, ValueError) as problem:
            raise InputError(
                f"{where}: model {model!r} does not say which teacher it is ({problem} in its config's parameters); "
                "build it with build/build_teacher.py"
            ) from problem

    def text_format(self, folder: Path) -> TeacherFormat:
        """The text format of the local checkpoint folder, once it is known to be the served teacher's.

        InputError if not.
        """
        card = ScoreCard.load(folder)
        # the published copy has its head folded into the language model, the training checkpoint beside it
        served = ScoreCard.from_json(self.card, f"the served teacher {self.teacher_id}")
        if replace(card, head="linear") != replace(served, head="linear"):
            raise InputError(
                f"{folder}: its score card is not that of the served teacher {self.teacher_id}; "
                "give --teacher the checkpoint folder that the server was built from"
            )
        if card.vocabulary and card.vocabulary != fingerprint(folder / "tokenizer.json"):
            raise InputError(f"{folder}/tokenizer.json: not the tokenizer of the score card; copy the checkpoint again")
        return format_of_teacher(folder)

    def texts(self, folder: Path) -> Callable[[list[str], list[str], list[str]], list[tuple[bytes, ...]]]:
        """How queries, titles and summaries become prompts, (prompt,) each, in the text format of the folder."""
        text_format = self.text_format(folder)
        return lambda queries, titles, summaries: [
            (pair.text.encode(),) for pair in text_format.texts(queries, titles, summaries)
        ]

    def request(self, texts: Sequence[tuple[bytes, ...]]) -> pb.ModelInferRequest:
        """The request for the scores of prompts, less its id: one token out of one, whose raw logit is the score."""
        request = pb.ModelInferRequest()
        request.CopyFrom(self._template)
        request.inputs[0].shape[0] = len(texts)
        request.raw_input_contents[0] = b"".join(bytes_tensor(prompt) for (prompt,) in texts)
        return request

    @cached_property
    def _template(self) -> pb.ModelInferRequest:
        asked = {
            "max_tokens": 1, "temperature": 0, "logprobs": 0, "allowed_token_ids": [self.score_token_id],
            "detokenize": False,  # nobody reads the token's text
        }  # fmt: skip
        request = pb.ModelInferRequest(model_name=self.model, model_version=self.version)
        for name, kind, content in (
            ("text_input", "BYTES", b""),
            ("sampling_parameters", "BYTES", bytes_tensor(json.dumps(asked).encode())),
            ("return_cumulative_logprob", "BOOL", b"\x01"),
            ("exclude_input_in_output", "BOOL", b"\x01"),
        ):
            request.inputs.add(name=name, datatype=kind, shape=[1])
            request.raw_input_contents.append(content)
        request.outputs.add(name="cumulative_logprob")
        return request

    def scores(self, response: pb.ModelInferResponse, documents: int) -> list[float | None]:
        """The FP32 output cumulative_logprob, a score for each prompt; all None if the answer has not as many."""
        for output, raw in zip(response.outputs, response.raw_output_contents):
            if output.name == "cumulative_logprob" and len(raw) == 4 * documents:
                return list(struct.unpack(f"<{documents}f", raw))
        return [None] * documents


def checkpoint_folder(path: Path) -> Path:
    """A checkpoint folder as given, or the highest version's checkpoint of a published model's folder."""
    versions = [int(folder.name) for folder in path.glob("[0-9]*") if folder.name.isdecimal()]
    return path / str(max(versions)) / "checkpoint" if versions else path


def bytes_tensor(value: bytes) -> bytes:
    """One BYTES element as Triton packs it: a little-endian length, then the bytes."""
    return len(value).to_bytes(4, "little") + value


def describe_grpc_error(problem: grpc.RpcError) -> str:
    """`UNAVAILABLE: connection refused`, in one line."""
    code = getattr(problem, "code", lambda: None)()
    details = getattr(problem, "details", lambda: "")() or ""
    if details == "Internal error from Core":  # grpc.aio's, for a write that met a stream's end: its reason is lost
        return "the stream has ended"
    return f"{code.name if code else type(problem).__name__}: {' '.join(details.split())}"[:300]
