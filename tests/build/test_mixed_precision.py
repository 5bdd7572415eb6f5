"""INT8 for as many runs of matrix products as pass: between no INT8 at all and all of it, by what is measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from build import openvino_engine
from build.judged_pairs import read_candidates
from build.mixed_precision import build_mixed_ir, matrix_products
from build.runners import openvino_core, score_pairs
from ranking.text import StudentFormat

POSITIONS, PARTS = 128, 3


@dataclass
class Judged:
    tau: float
    passed: bool


def quantisers(path) -> int:
    return sum(op.get_type_name() == "FakeQuantize" for op in openvino_core().read_model(str(path)).get_ops())


@pytest.fixture(scope="module")
def engines(checkpoint, exported, data, tmp_path_factory):
    text = StudentFormat.of_checkpoint(checkpoint)
    pairs = read_candidates(data, text, 16)
    feeds = openvino_engine.calibration_feeds(pairs, text.pad_id)
    exact = score_pairs(openvino_engine.runner(exported, "fp32", 1), pairs, text.pad_id)

    def build(limit: float):
        seen = []

        def judge(path):
            scores = score_pairs(openvino_engine.runner(path, "fp32", 1), pairs, text.pad_id)
            error = float(np.abs(scores - exact).max())
            seen.append((quantisers(path), error))
            return Judged(-error, error <= limit)

        folder = tmp_path_factory.mktemp("mixed")
        ir, share = build_mixed_ir(exported, folder, POSITIONS, feeds, judge, PARTS)
        return ir, share, judge(ir), seen

    return build


def test_every_matrix_product_is_named_once(exported):
    names = matrix_products(exported, POSITIONS)
    assert len(set(names)) == len(names) >= 2 * 8  # two layers of eight


def test_as_many_runs_are_int8_as_the_limit_lets_pass(engines):
    """With a limit that no run passes, the one that costs least is left for the gate to refuse."""
    least, share, last, seen = engines(-1.0)
    alone = sorted(error for _, error in seen[:PARTS])
    assert share == 0 and not last.passed and alone[0] > 0
    assert -last.tau == pytest.approx(alone[0], rel=1e-2)
    everything, whole, _, _ = engines(np.inf)
    assert whole == 1 and 0 < quantisers(least) < quantisers(everything)
    some, share, last, _ = engines(alone[0] * 1.01)  # another build's last digits may differ
    assert last.passed and 0 < share < 1 and quantisers(some) < quantisers(everything)
