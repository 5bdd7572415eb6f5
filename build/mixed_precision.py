"""INT8 for those matrix products of a network that stand it: what the gate lets pass, chosen by measuring.

The network's matrix products are cut into runs of neighbours. Each run is quantised alone, by NNCF's
post-training quantisation, and scores the judged pairs; Kendall's tau with the fp32 checkpoint says what it costs. Then
as many runs as the gate lets pass are quantised together, those that cost least first. The rest computes in bf16 or
fp32.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from build import openvino_engine
from build.gate import Verdict
from ranking.encoder_inputs import Feed

LOGGER = logging.getLogger(__name__)
PARTS = 12


def build_mixed_ir(
    onnx_path: str | Path,
    folder: str | Path,
    positions: int,
    calibration: Sequence[Feed],
    judge: Callable[[Path], Verdict],
    parts: int = PARTS,
) -> tuple[Path, float]:
    """Write model.xml and model.bin with the most runs in INT8 that pass. Returns the path and their share of all runs.

    judge: gates an IR; parts: runs that the matrix products are cut into. If not even the run that costs least passes,
    that one is written, and the gate will refuse it.
    """
    runs = [list(run) for run in np.array_split(matrix_products(onnx_path, positions), parts) if len(run)]

    def write(chosen: Sequence[int], place: Path) -> Path:
        kept = [name for number, run in enumerate(runs) if number not in chosen for name in run]
        return openvino_engine.build_ir(onnx_path, place, "int8", positions, calibration, unquantised=kept)

    def verdict(chosen: Sequence[int]) -> Verdict:
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            return judge(write(chosen, Path(aside)))

    taus = [verdict([number]).tau for number in range(len(runs))]
    order = sorted(range(len(runs)), key=lambda number: -taus[number])
    LOGGER.info("tau of each of %d runs in INT8 alone: %s", len(runs), ", ".join(f"{tau:.4f}" for tau in taus))
    least, most = 0, len(runs)  # `least` runs pass, and more than `most` do not; the more, the worse
    while least < most:
        middle = (least + most + 1) // 2
        if verdict(order[:middle]).passed:
            least = middle
        else:
            most = middle - 1
    LOGGER.info("%d of %d runs of matrix products in INT8", least, len(runs))
    return write(order[: max(least, 1)], Path(folder)), least / len(runs)


def matrix_products(onnx_path: str | Path, positions: int) -> list[str]:
    """The names of the network's matrix products in the order of their computing."""
    model, _ = openvino_engine.read_network(onnx_path, positions)
    return [node.get_friendly_name() for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
