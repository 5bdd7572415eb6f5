"""Are served teacher scores the trained scores? Hugging Face against Triton with vLLM, on real judged pairs.

    python -m benchmarks.teacher.parity --checkpoint runs/teacher --data data/msrd

The reference is the sequence classifier in float32, pair by pair from the text of ranking/text.py. The served scores
come over gRPC from a real server: all pairs at once, in float32, in bfloat16 with the float32 head that build_teacher
sets, and in bfloat16 with vLLM's default head. Prints one JSON object a variant (docs/results/teacher_parity.md).
"""

from __future__ import annotations

import json
import logging
import queue
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from build.build_teacher import Config as BuildConfig
from build.build_teacher import main as build_teacher
from clients.labelling.served_teacher import ServedTeacher
from ranking.errors import InputError
from ranking.metrics import kendall_tau, ndcg
from ranking.program import run
from ranking.schema import read_table
from ranking.text import TeacherFormat
from serving.temporary_server import start_triton
from training.evaluation.checkpoint_scores import Scorer

LOGGER = logging.getLogger(__name__)
Variant = Literal["float32", "bfloat16", "bfloat16-model-head"]
TAU = "Kendall tau within queries"
VARIANTS: tuple[Variant, ...] = ("float32", "bfloat16", "bfloat16-model-head")


@dataclass
class Config:
    """Compare served teacher scores with the Hugging Face model's.

    Args:
        checkpoint: teacher checkpoint, as training.finetune_teacher wrote it
        data: dataset folder whose test judgments give the pairs
        pairs: how many pairs, taken query by query
        variants: number formats to serve in: float32, bfloat16, bfloat16-model-head
        eager: start vLLM without compiling the model: faster to start, slower to score
        engine_args: further vLLM engine arguments of every variant, e.g. quantization, as build_teacher takes them
        min_tau: end with an error where Kendall's tau within queries is below; what a quantised teacher should pass
    """

    checkpoint: Path
    data: Path
    pairs: int = 500
    variants: list[Variant] = field(default_factory=lambda: list(VARIANTS))
    eager: bool = True
    engine_args: dict[str, Any] = field(default_factory=dict)
    min_tau: float = 0.0


@dataclass(frozen=True)
class JudgedPairs:
    """Columns of the compared pairs; groups: int [n], the query each belongs to."""

    queries: list[str]
    titles: list[str]
    summaries: list[str]
    grades: NDArray[np.int64]
    groups: NDArray[np.int64]


def main(config: Config) -> None:
    """Score the pairs in process and through a server of each variant, and print how far apart they are.

    InputError at the end where the order of a variant moved more than min_tau allows.
    """
    moved = []
    pairs = read_pairs(config.data, config.pairs)
    texts = (pairs.queries, pairs.titles, pairs.summaries)
    reference = Scorer.load(config.checkpoint).score(*texts)
    LOGGER.info("reference: %d pairs, mean %.3f, deviation %.3f", len(reference), reference.mean(), reference.std())
    prompts = [text.text for text in TeacherFormat.of_checkpoint(config.checkpoint).texts(*texts)]
    for variant in config.variants:
        with tempfile.TemporaryDirectory() as folder:
            publish(config, variant, Path(folder) / "model_repository")
            with start_triton(Path(folder) / "model_repository") as server:
                started = time.monotonic()
                together = ask(server.grpc, prompts)
                seconds = time.monotonic() - started
                alone = np.concatenate([ask(server.grpc, [prompt]) for prompt in prompts[:50]])
        figures = score_differences(reference, together, pairs)
        figures["batch of one, max |diff|"] = float(np.abs(alone - together[:50]).max())
        print(
            json.dumps({"variant": variant, **figures, "pairs a second": round(len(prompts) / seconds, 1)}), flush=True
        )
        if not figures[TAU] >= config.min_tau:
            moved.append(f"{variant} {figures[TAU]:.4f}")
    if moved:
        raise InputError(f"Kendall's tau within queries is below {config.min_tau:g}: {', '.join(moved)}")


def read_pairs(data: Path, count: int) -> JudgedPairs:
    """The first `count` judged test pairs of a dataset folder. InputError if it has fewer."""
    path = data / "judgments" / "test.parquet"
    table = read_table(path, "judgments").slice(0, count)
    if table.num_rows < count:
        raise InputError(f"{path}: {table.num_rows} pairs, {count} asked for")
    _, groups = np.unique(table["query_id"].to_numpy(zero_copy_only=False), return_inverse=True)
    query, title, summary = (table[name].to_pylist() for name in ("query", "title", "summary"))
    return JudgedPairs(query, title, summary, table["grade"].to_numpy().astype(np.int64), groups)


def publish(config: Config, variant: str, repository: Path) -> None:
    """Publish the checkpoint in the variant's number format into a model repository."""
    arguments: dict[str, Any] = {"enforce_eager": config.eager, **config.engine_args}
    if variant == "bfloat16-model-head":
        arguments["hf_overrides"] = {"head_dtype": "model"}
    dtype: Any = variant.split("-")[0]
    measured = "published to be measured"
    build_teacher(
        BuildConfig(
            config.checkpoint, repository=repository, dtype=dtype, engine_args=arguments, accept_quantised=measured
        )
    )


def ask(address: str, prompts: Sequence[str]) -> NDArray[np.float32]:
    """Served scores float32 [n], all prompts in flight at once on one stream."""
    scores = np.full(len(prompts), np.nan, np.float32)
    done: queue.SimpleQueue = queue.SimpleQueue()
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        teacher = ServedTeacher.of_config(
            "teacher", stub.ModelConfig(service_pb2.ModelConfigRequest(name="teacher")), address
        )

        def requests() -> Iterator[Any]:
            for number, prompt in enumerate(prompts):
                request = teacher.request([(prompt.encode(),)])
                request.id = str(number)
                yield request
            done.get()  # the stream stays open until all answers are here

        left = len(prompts)
        for answer in stub.ModelStreamInfer(requests(), timeout=600):
            if answer.error_message:
                raise InputError(f"the server refused a pair: {answer.error_message}")
            (value,) = teacher.scores(answer.infer_response, 1)
            scores[int(answer.infer_response.id)] = np.nan if value is None else value
            left -= 1
            if not left:
                done.put(None)
    return scores


def score_differences(
    reference: NDArray[np.float32], served: NDArray[np.float32], pairs: JudgedPairs
) -> dict[str, float]:
    """max and mean |difference|, Kendall tau over all pairs of pairs and within queries, NDCG@5 of both."""
    difference = np.abs(served - reference)
    one_group = np.zeros(len(reference), np.int64)
    before = ndcg(reference, pairs.grades, pairs.groups, k=5)
    after = ndcg(served, pairs.grades, pairs.groups, k=5)
    return {
        "max |diff|": float(difference.max()),
        "mean |diff|": float(difference.mean()),
        "deviation of scores": float(reference.std()),
        "Kendall tau": float(kendall_tau(served, reference, one_group)[0]),
        TAU: float(np.nanmean(kendall_tau(served, reference, pairs.groups))),
        "NDCG@5 Hugging Face": before,
        "NDCG@5 change": after - before,
    }


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.teacher.parity --checkpoint runs/teacher --data data/msrd")
