"""Run judged pairs through an engine (ONNX Runtime, OpenVINO, TensorRT, PyTorch): a function of one padded batch.

The gate scores the same documents with every engine by score_documents().
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ranking.encoder_inputs import Feed, chosen, pad
from ranking.telemetry import bars_are_read
from ranking.text import EncodedDocuments, EncodedPair

LENGTH_MULTIPLE = 8  # TensorRT's bucket lengths are multiples of it, so a padded batch fits the last one

Runner = Callable[[Feed], NDArray[np.float32]]  # -> float32 [batch]


def padded_length(length: int) -> int:
    """The length rounded up to a multiple of LENGTH_MULTIPLE: engines compile or tune per shape."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def pad_to_longest(pairs: Sequence[EncodedPair], pad_id: int) -> Feed:
    """All inputs of a batch, padded to its longest pair's padded_length()."""
    return pad(pairs, padded_length(max(len(pair.ids) for pair in pairs)), pad_id)


def batches(pairs: Sequence[EncodedPair], batch_tokens: int = 4096) -> list[list[int]]:
    """Row numbers in batches of at most batch_tokens padded tokens; sorted by length, longest first, to pad little."""
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
    for rows in tqdm(batches(pairs, batch_tokens), desc=label, disable=not (label and bars_are_read()), leave=False):
        scores[rows] = runner(pad_to_longest([pairs[row] for row in rows], pad_id))
    return scores


def score_documents(runner: Runner, documents: EncodedDocuments, pad_id: int, label: str = "") -> NDArray[np.float32]:
    """The engine's score of every document, float32 [n], made of its chunks' scores as it is served."""
    return documents.pool(score_pairs(runner, documents.pairs, pad_id, label))


@cache
def openvino_core() -> Any:
    """The one openvino.Core of this process.

    A Core's CPU plugin puts a signal stack of its own in the place of the thread's, and frees it when it goes. Of two
    Cores, the one that goes last puts back what the other may have freed by then: the next signal that has a handler,
    such as Ctrl-C, then ends the process with SIGSEGV (seen with OpenVINO 2026.4).
    """
    import openvino

    return openvino.Core()


def openvino_runner(model_path: str | Path, settings: dict[str, str | int]) -> Runner:
    """An OpenVINO IR (model.xml) or ONNX file on the CPU with the given properties."""
    compiled = openvino_core().compile_model(str(model_path), "CPU", settings)
    request = compiled.create_infer_request()
    names = [port.get_any_name() for port in compiled.inputs]

    def run(feed: Feed) -> NDArray[np.float32]:
        request.infer(chosen(feed, names))
        return request.get_output_tensor(0).data[:, 0].astype(np.float32)

    return run
