"""The teacher that a server has loaded: which one it is, how to ask it for a score, and its tokenizer on this
machine."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2 as pb

from ranking.card import ScoreCard, fingerprint
from ranking.errors import InputError
from ranking.text import TeacherFormat


@dataclass(frozen=True)
class ServedTeacher:
    """A served teacher, from its model config.

    card: its score card as JSON, which carries the text format and limits.
    """

    model: str
    teacher_id: str
    score_token_id: int
    card: str

    @classmethod
    def of_config(cls, model: str, config: pb.ModelConfigResponse, where: str) -> ServedTeacher:
        """InputError if the model was not built by build/build_teacher.py: then nothing says what its scores are."""
        given = {name: parameter.string_value for name, parameter in config.config.parameters.items()}
        try:
            return cls(model, given["teacher_id"], int(given["score_token_id"]), given["ranker_card"])
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
        return TeacherFormat.of_checkpoint(folder)

    def request(self) -> pb.ModelInferRequest:
        """The request that asks for a score, less its id and text: one token out of one, whose raw logit is the
        score."""
        request = pb.ModelInferRequest(model_name=self.model)
        for name, kind in (
            ("text_input", "BYTES"),
            ("sampling_parameters", "BYTES"),
            ("return_cumulative_logprob", "BOOL"),
            ("exclude_input_in_output", "BOOL"),
        ):
            request.inputs.add(name=name, datatype=kind, shape=[1])
        request.outputs.add(name="cumulative_logprob")
        return request

    def sampling_parameters(self) -> bytes:
        """The tensor that asks vLLM for one token, the score token, at temperature 0."""
        asked = {"max_tokens": 1, "temperature": 0, "logprobs": 0, "allowed_token_ids": [self.score_token_id]}
        return bytes_tensor(json.dumps(asked).encode())


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
    return f"{code.name if code else type(problem).__name__}: {' '.join(details.split())}"[:300]
