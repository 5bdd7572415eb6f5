"""Are the engine's graphs the checkpoint? Padded and packed, in PyTorch and in ONNX Runtime, on real judged pairs.

    python -m benchmarks.serving.packed_parity --data data/msrd

Everything is float32 on the CPU; the reference is transformers' own model. Prints the largest difference of each.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.serving.rerank_lists import make_checkpoint, read_lists
from build.engine_encoder import PackedEncoder, PaddedEncoder
from build.export_onnx import export, load_encoder, torch_runner, widen_positions
from build.runners import Runner, padded_length, score_pairs
from build.tensorrt_engine import cast_runner
from ranking.encoder_inputs import Feed, without_padding
from ranking.program import run
from ranking.text import StudentFormat


@dataclass
class Config:
    """Compare the engine's graphs with the checkpoint.

    Args:
        data: dataset folder with test judgments
        pairs: how many pairs
    """

    data: Path
    pairs: int = 500


def main(config: Config) -> None:
    """Score the pairs in every way and print the largest difference of each from the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint("minilm", Path(folder) / "checkpoint")
        text = StudentFormat.of_checkpoint(checkpoint)
        encoder = load_encoder(checkpoint)
        widen_positions(encoder)
        lists = read_lists(config.data, text, -(-config.pairs // 20), 20)
        pairs = [p for each in lists for p in text.encode([each.query] * 20, each.titles, each.summaries)]
        pairs = pairs[: config.pairs]
        longest = padded_length(text.max_tokens())
        padded, packed = PaddedEncoder(encoder.model).eval(), PackedEncoder(encoder.model, longest).eval()
        ways: dict[str, Runner] = {
            "padded, PyTorch": torch_runner(padded),
            "packed, PyTorch": packed_runner(packed),
            "padded, exported": cast_runner(export(padded, Path(folder) / "padded.onnx")),
            "packed, exported": cast_runner(export(packed, Path(folder) / "packed.onnx")),
        }
        expected = score_pairs(torch_runner(encoder), pairs, text.pad_id, "checkpoint")
        found = {
            name: float(np.abs(score_pairs(runner, pairs, text.pad_id, name) - expected).max())
            for name, runner in ways.items()
        }
    print(json.dumps({"pairs": len(pairs), "deviation of scores": float(expected.std()), "largest difference": found}))


def packed_runner(encoder: PackedEncoder) -> Runner:
    """The packed encoder in PyTorch, as a function of one padded batch."""

    def score(feed: Feed) -> np.ndarray:
        with torch.inference_mode():
            return encoder(**{name: torch.from_numpy(v) for name, v in without_padding(feed).items()}).numpy()

    return score


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.serving.packed_parity --data data/msrd")
