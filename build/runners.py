"""One function per engine: padded inputs in, logits out; so that the gate scores the same pairs with every engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ranking.text import EncodedPair

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "logits"

Feed = dict[str, NDArray[np.int32]]  # the three inputs, int32 [batch, length]
Runner = Callable[[Feed], NDArray[np.float32]]  # -> float32 [batch]


def pad(pairs: Sequence[EncodedPair], pad_id: int, multiple: int = 16) -> Feed:
    """The three inputs of a batch, padded to the longest pair rounded up to `multiple` (engines like few shapes)."""
    length = -(-max(len(pair.ids) for pair in pairs) // multiple) * multiple
    feed = {name: np.zeros((len(pairs), length), np.int32) for name in INPUTS}
    feed["input_ids"][:] = pad_id
    for row, pair in enumerate(pairs):
        feed["input_ids"][row, : len(pair.ids)] = pair.ids
        feed["attention_mask"][row, : len(pair.ids)] = 1
        feed["token_type_ids"][row, pair.document_start : len(pair.ids)] = 1
    return feed


def batches(pairs: Sequence[EncodedPair], batch_tokens: int = 4096) -> list[list[int]]:
    """Row numbers in batches of at most batch_tokens padded tokens, longest first: length-sorted, so little is padding."""
    order = sorted(range(len(pairs)), key=lambda row: -len(pairs[row].ids))
    found: list[list[int]] = []
    while order:
        rows = max(1, batch_tokens // len(pairs[order[0]].ids))
        found.append(order[:rows])
        order = order[rows:]
    return found


def score_pairs(
    runner: Runner, pairs: Sequence[EncodedPair], pad_id: int, label: str = "", batch_tokens: int = 4096
) -> NDArray[np.float32]:
    """The engine's score of every pair, float32 [n], in the order of pairs."""
    scores = np.full(len(pairs), np.nan, np.float32)
    for rows in tqdm(batches(pairs, batch_tokens), desc=label, disable=None if label else True, leave=False):
        scores[rows] = runner(pad([pairs[row] for row in rows], pad_id))
    return scores


def onnx_runner(path: str | Path) -> Runner:
    """An ONNX file in ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda feed: session.run([OUTPUT], feed)[0][:, 0].astype(np.float32)


def openvino_runner(model_path: str | Path, settings: dict[str, str | int]) -> Runner:
    """An OpenVINO IR (model.xml) or ONNX file on the CPU with the given properties."""
    import openvino

    compiled = openvino.Core().compile_model(str(model_path), "CPU", settings)
    request = compiled.create_infer_request()

    def run(feed: Feed) -> NDArray[np.float32]:
        request.infer(feed)
        return request.get_output_tensor(0).data[:, 0].astype(np.float32)

    return run
