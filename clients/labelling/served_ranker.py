"""A ranker that a server has loaded, as a teacher: text in, scores out, the tensors of every student and baseline.

Any arm that build/build_student.py published can label: an encoder that is too slow to serve, or one trained on clicks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from clients.labelling.served_teacher import bytes_tensor
from ranking.errors import InputError
from ranking.request_tensors import SCORE


@dataclass(frozen=True)
class ServedRanker:
    """A served ranker, from its model config. teacher_id: its checkpoint's fingerprint and the precision it runs in;
    version: as of ServedTeacher.
    """

    model: str
    teacher_id: str
    version: str = ""
    head_dtype: ClassVar[str] = ""  # the number format that a model's config promises for its score
    documents_per_request: ClassVar[int] = 32
    one_query_a_request: ClassVar[bool] = True

    @classmethod
    def of_config(cls, model: str, config: pb.ModelConfigResponse, where: str) -> ServedRanker:
        """InputError if the model was not published by build/build_student.py: nothing says what its scores are."""
        tags = config.config.metric_tags
        if not tags.get("checkpoint") or not tags.get("precision"):
            raise InputError(
                f"{where}: model {model!r} does not say which checkpoint it serves (metric tags `checkpoint` and "
                "`precision`); build it with build/build_student.py"
            )
        return cls(model, f"{tags['checkpoint']}-{tags['precision']}")

    def texts(self, folder: Path) -> Callable[[list[str], list[str], list[str]], list[tuple[bytes, ...]]]:
        """How queries, titles and summaries become (query, title, summary) in UTF-8; the server cuts and tokenises.

        folder is not read.
        """
        return lambda queries, titles, summaries: [
            tuple(text.encode("utf-8", "replace") for text in pair) for pair in zip(queries, titles, summaries)
        ]

    def request(self, texts: Sequence[tuple[bytes, ...]]) -> pb.ModelInferRequest:
        """The request for the scores of (query, title, summary) of one query's documents, less its id."""
        request = pb.ModelInferRequest(model_name=self.model, model_version=self.version)
        columns = {"query": [texts[0][0]], "title": [t[1] for t in texts], "summary": [t[2] for t in texts]}
        for name, column in columns.items():
            request.inputs.add(name=name, datatype="BYTES", shape=[len(column)])
            request.raw_input_contents.append(b"".join(map(bytes_tensor, column)))
        request.outputs.add(name=SCORE)
        return request

    def scores(self, response: pb.ModelInferResponse, documents: int) -> list[float | None]:
        """The answer's scores, one per document; all None if it has not as many."""
        for output, raw in zip(response.outputs, response.raw_output_contents):
            if output.name == SCORE and len(raw) == 4 * documents:
                return np.frombuffer(raw, "<f4").tolist()
        return [None] * documents
