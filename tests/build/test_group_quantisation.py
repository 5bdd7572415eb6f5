"""INT8 in groups: what rounding costs, that large channels do no harm, and which group a build takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from build import openvino_engine
from build.batch_invariance import shapes_that_move_scores
from build.export_onnx import Encoder, export, load_encoder
from build.group_quantisation import activations, build_group_ir, even_out, fitting_groups, round_in_groups, spread_of
from build.judged_pairs import read_candidates
from build.runners import openvino_core, openvino_runner, score_pairs
from build.triton_config import ServingLimits, bucket_lengths
from ranking.errors import InputError
from ranking.text import EncodedPairs, StudentFormat
from tests.helpers.foreign_encoders import make_encoder
from tests.helpers.tiny_student import make_student

POSITIONS = 128


@dataclass
class Judged:
    passed: bool
    tau: float = 0.0


@pytest.fixture(scope="module")
def student(data, tmp_path_factory):
    """Text, calibration batches, pairs, ONNX file and fp32 scores of a student with a few large channels."""
    folder = make_student(tmp_path_factory.mktemp("large") / "student", seed=3)
    model = BertForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():  # as a trained BERT has them: a LayerNorm's channel far larger than its neighbours
        for layer in model.bert.encoder.layer:
            layer.attention.output.LayerNorm.weight[[5, 40]] *= 15
            layer.intermediate.dense.weight[:, [5, 40]] /= 5
    model.save_pretrained(folder)
    onnx = export(load_encoder(folder), tmp_path_factory.mktemp("onnx") / "model.onnx")
    text = StudentFormat.of_checkpoint(folder)
    pairs = read_candidates(data, text, 64)
    feeds = openvino_engine.calibration_feeds(pairs, text.pad_id)
    exact = score_pairs(openvino_engine.runner(onnx, "fp32", 1), pairs, text.pad_id)
    return text, feeds, pairs, onnx, exact


def error_of(ir, precision, student) -> float:
    text, _, pairs, _, exact = student
    scores = score_pairs(openvino_engine.runner(ir, precision, 1), pairs, text.pad_id)
    return float(np.abs(scores - exact).mean() / exact.std())


def test_without_relations_between_inputs_each_weight_is_rounded_to_the_nearest():
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(5, 12)).astype(np.float32)
    rounded, scales = round_in_groups(weights, spread_of(np.eye(12)), 4)
    assert rounded.shape == (5, 3, 4) and scales.shape == (5, 3, 1) and rounded.dtype == np.int8
    assert (np.abs(rounded).max(axis=2) == 127).all()  # each group uses the whole range
    assert np.abs(rounded * scales - weights.reshape(5, 3, 4)).max() <= scales.max() / 2 * 1.001


def test_inputs_that_go_together_make_up_for_each_others_rounding():
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 64)) + 0.05 * rng.normal(size=(500, 64))
    weights = rng.normal(size=(8, 64)).astype(np.float32)

    def error(moments) -> float:
        rounded, scales = round_in_groups(weights, spread_of(moments), 32)
        return float(np.square(inputs @ ((rounded * scales).reshape(8, 64) - weights).T).mean())

    assert error(inputs.T @ inputs) < error(np.eye(64)) / 4


def test_an_input_that_is_always_zero_and_weights_that_are_zero_do_no_harm():
    moments, weights = np.eye(8), np.ones((2, 8), np.float32)
    moments[3, 3] = 0
    weights[1] = 0
    rounded, scales = round_in_groups(weights, spread_of(moments), 4)
    assert np.isfinite(scales).all() and (rounded[0] == 127).all() and (rounded[1] == 0).all()


def test_large_channels_cost_groups_less_than_whole_matrices(student, tmp_path):
    text, feeds, pairs, onnx, _ = student
    (tmp_path / "int8").mkdir()
    whole = openvino_engine.build_ir(onnx, tmp_path / "int8", "int8", POSITIONS, feeds)
    ir, group = build_group_ir(onnx, tmp_path, POSITIONS, feeds, lambda path: Judged(passed=True))
    assert group == 64
    error = error_of(ir, "int8_groups", student)
    assert 0 < error < error_of(whole, "int8", student) / 2

    def scores_with(group_size: int):
        settings = openvino_engine.settings("fp32", 1) | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": group_size}
        return score_pairs(openvino_runner(ir, settings), pairs, text.pad_id)

    served = score_pairs(openvino_engine.runner(ir, "int8_groups", 1), pairs, text.pad_id)
    assert (served == scores_with(group)).all()  # the file carries the size
    if "vnni" in Path("/proc/cpuinfo").read_text():  # and activations are INT8, not the weights alone
        assert (served != scores_with(0)).any()


def test_padding_counts_for_nothing(student):
    text, feeds, _, onnx, _ = student
    found = activations(onnx, POSITIONS, feeds[:2])
    longer = [{name: np.pad(feed[name], ((0, 0), (0, 16))) for name in feed} for feed in feeds[:2]]
    for feed in longer:
        feed["input_ids"][feed["attention_mask"] == 0] = text.pad_id
    for place, seen in activations(onnx, POSITIONS, longer).items():
        np.testing.assert_allclose(seen.largest, found[place].largest, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(seen.moments, found[place].moments, rtol=1e-3, atol=1e-2)


def test_large_inputs_are_made_smaller_and_an_input_that_is_always_zero_keeps_its_size():
    scale = even_out(np.array([1, 30, 1, 0], np.float32), np.array([1, 1, 2, 1], np.float32))
    assert scale[1] == pytest.approx(30**0.65 * scale[0]) and scale[2] < scale[0] and scale[3] == 1
    assert np.log(scale[:3]).sum() == pytest.approx(0)


def test_all_products_with_weights_become_int8_and_a_smaller_group_is_built_where_the_larger_fails(student, tmp_path):
    """Two layers of six, the pooler and the head; the attention's products have no weights."""
    _, feeds, _, onnx, _ = student
    judged = []

    def judge(path):
        judged.append(groups_of(path))
        return Judged(passed=False)

    ir, group = build_group_ir(onnx, tmp_path, POSITIONS, feeds, judge)
    assert group == 32 and judged == [[64] * (2 * 6 + 2)] and groups_of(ir) == [32] * (2 * 6 + 2)
    assert error_of(ir, "int8_groups", student) < 0.1


def groups_of(ir) -> list[int]:
    """The size of the groups of each INT8 matrix of an IR."""
    constants = [op for op in openvino_core().read_model(str(ir)).get_ops() if op.get_type_name() == "Constant"]
    return [op.data.shape[2] for op in constants if op.data.dtype == np.int8 and op.data.ndim == 3]


@pytest.mark.parametrize("family", ["xlm-roberta", "modernbert", "deberta-v2"])
def test_other_encoders_keep_their_scores(family, tmp_path):
    wider = {"hidden_size": 64, "intermediate_size": 128} | ({"pooler_hidden_size": 64} if "deberta" in family else {})
    folder = make_encoder(tmp_path / family, family, **wider)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    encoder, rng = Encoder(model).eval(), np.random.default_rng(4)
    onnx = export(encoder, tmp_path / "model.onnx")
    batches = rng.integers(5, model.config.vocab_size, (4, 8, 24), np.int32)
    feeds = [{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in batches]
    ir, group = build_group_ir(onnx, tmp_path, 64, feeds, lambda path: Judged(passed=True))
    exact, rounded = openvino_engine.runner(onnx, "fp32", 1), openvino_engine.runner(ir, "int8_groups", 1)
    scores = np.concatenate([exact(feed) for feed in feeds])
    error = np.abs(np.concatenate([rounded(feed) for feed in feeds]) - scores).mean() / scores.std()
    assert group == 64 and len(groups_of(ir)) >= 2 * 4 and 0 < error < 0.1


def test_a_network_that_no_group_fits_is_refused(tmp_path):
    folder = make_student(tmp_path / "narrow", hidden_size=48, intermediate_size=80)
    onnx = export(load_encoder(folder), tmp_path / "model.onnx")
    assert fitting_groups(onnx, POSITIONS) == []
    with pytest.raises(InputError, match="multiple of 32 inputs"):
        build_group_ir(onnx, tmp_path, POSITIONS, [], lambda path: Judged(passed=True))


def test_a_group_that_fits_few_products_is_left_out(tmp_path):
    folder = make_student(tmp_path / "uneven", hidden_size=96, intermediate_size=128)
    assert fitting_groups(export(load_encoder(folder), tmp_path / "model.onnx"), POSITIONS) == [32]


def test_a_score_is_the_same_in_every_call(student, tmp_path):
    """Activations are rounded token by token: what else is in a call moves no score, so scores may be kept."""
    text, feeds, pairs, onnx, _ = student
    ir, _ = build_group_ir(onnx, tmp_path, POSITIONS, feeds, lambda path: Judged(passed=True))
    limits = ServingLimits(score_cache_mb=1, max_batch=16, batch_tokens=512, call_tokens=16).for_target("openvino")
    lengths = bucket_lengths(limits, "openvino", text.max_tokens())
    runner = openvino_engine.runner(ir, "int8_groups", 1)
    assert shapes_that_move_scores(runner, EncodedPairs.of(pairs), text.pad_id, limits, lengths) == []
