"""Are a foreign reranker's served scores those of its published code? Every family, through the real server.

    python -m benchmarks.teacher.foreign_parity
    python -m benchmarks.teacher.foreign_parity --prompt qwen3-reranker --checkpoint models/Qwen3-Reranker-0.6B

Without a checkpoint a tiny random model of each family is made. The pairs are hostile: they spell role tokens, layouts,
the borders between a prompt's pieces, and blanks. Prints one JSON object a family (docs/results/foreign_teachers.md).
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from build import build_teacher
from clients import label_corpus
from ranking.labels import read_labels
from ranking.limits import FieldLimits
from ranking.program import run
from ranking.reranker_prompts import PROMPTS, PromptFormat
from ranking.schema import TABLES
from serving.temporary_server import start_triton
from tests.helpers.foreign_rerankers import hostile_pairs, make_reranker, published_scores


@dataclass
class Config:
    """Compare served scores of foreign rerankers with their published code's.

    Args:
        prompt: families to compare
        checkpoint: a real reranker's folder of the one family given; left out, tiny random ones are made
        pairs: how many hostile pairs
    """

    prompt: list[str] = field(default_factory=lambda: list(PROMPTS))
    checkpoint: Path | None = None
    pairs: int = 200

    def __post_init__(self) -> None:
        if self.checkpoint is not None and len(self.prompt) != 1:
            raise ValueError("--checkpoint is one family's: give one --prompt with it")


def compare(prompt: str, folder: Path, pairs: list[tuple[str, str, str]], scratch: Path) -> dict[str, object]:
    """Publish, serve and label, and set the labels beside the published code's scores."""
    repository, candidates = scratch / "model_repository", scratch / "candidates.parquet"
    limits = FieldLimits(max_query_tokens=16, max_title_tokens=16, max_summary_tokens=48)
    build_teacher.main(
        build_teacher.Config(
            folder, repository=repository, dtype="float32", prompt=prompt, limits=limits,
            engine_args={"enforce_eager": True},
        )
    )  # fmt: skip
    rows = [(f"q{number}", "d", *pair) for number, pair in enumerate(pairs)]
    pq.write_table(pa.table([list(c) for c in zip(*rows)], schema=TABLES["candidates"].schema), candidates)
    with start_triton(repository, timeout_seconds=480, environment={"VLLM_CPU_OMP_THREADS_BIND": "nobind"}) as server:
        folder_of_teacher, out = repository / "teacher", scratch / "labels"
        label_corpus.main(
            label_corpus.Config(candidates=candidates, out=out, url=[server.grpc], teacher=folder_of_teacher)
        )
    served = read_labels(scratch / "labels").column("teacher_score").to_numpy()
    text_format = PromptFormat.of_checkpoint(repository / "teacher/1/checkpoint")
    expected = np.array(published_scores(folder, prompt, list(zip(*text_format.fields(*zip(*pairs))))))
    return {
        "prompt": prompt,
        "pairs": len(served),
        "deviation of the scores": round(float(expected.std()), 3),
        "largest difference": float(np.abs(served - expected).max()),
    }


def main(config: Config) -> None:
    """Compare the families one after the other: each needs a server of its own."""
    for prompt in config.prompt:
        with tempfile.TemporaryDirectory(prefix="foreign-parity-") as name:
            scratch = Path(name)
            folder = config.checkpoint or make_reranker(scratch / "reranker", prompt)
            print(json.dumps(compare(prompt, folder, hostile_pairs(config.pairs), scratch)), flush=True)


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.teacher.foreign_parity")
