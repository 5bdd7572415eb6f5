"""INT8 for as many runs of matrix products as pass: between no INT8 at all and all of it, by what is measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import openvino
import pytest

from build import openvino_engine
from build.judged_pairs import read_candidates
from build.mixed_precision import PARTS, build_mixed_ir, matrix_products
from build.runners import score_pairs
from ranking.text import StudentFormat

POSITIONS = 128


@dataclass
class Judged:
    tau: float
    passed: bool


def quantisers(path) -> int:
    return sum(op.get_type_name() == "FakeQuantize" for op in openvino.Core().read_model(str(path)).get_ops())


@pytest.fixture(scope="module")
def engines(checkpoint, exported, data, tmp_path_factory):
    text = StudentFormat.of_checkpoint(checkpoint)
    pairs = read_candidates(data, text, 32)
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
        ir, share = build_mixed_ir(exported, folder, POSITIONS, feeds, judge)
        return ir, share, judge(ir), seen

    return build


def test_every_matrix_product_is_named_once(exported):
    names = matrix_products(exported, POSITIONS)
    assert len(set(names)) == len(names) >= 2 * 8  # two layers of eight


def test_as_many_runs_are_int8_as_the_limit_lets_pass(engines):
    _, _, _, seen = engines(0.0)
    alone = sorted(error for _, error in seen[:PARTS])
    assert alone[0] > 0  # every run moves something
    limit = 2 * alone[PARTS // 2]
    ir, share, last, _ = engines(limit)
    everything, whole, _, _ = engines(np.inf)
    assert last.passed and 0 < share < whole == 1
    assert 0 < quantisers(ir) < quantisers(everything)


def test_where_no_run_passes_the_one_that_costs_least_is_left_for_the_gate_to_refuse(engines):
    ir, share, last, seen = engines(-1.0)
    assert share == 0 and not last.passed and quantisers(ir) > 0
    assert -last.tau == pytest.approx(min(error for _, error in seen[:PARTS]))
