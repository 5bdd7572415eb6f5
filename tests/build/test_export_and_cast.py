"""ONNX export and the fp16 and INT8 graphs, run in ONNX Runtime."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from safetensors.torch import load_file, save_file

from build.cast_graph import cast_to_fp16, check_fp32, quantise_qdq
from build.export_onnx import (
    Encoder,
    check_graph,
    example_inputs,
    export,
    load_encoder,
    parity,
    torch_runner,
    widen_positions,
)
from build.runners import score_pairs
from build.tensorrt_engine import cast_runner
from ranking.card import ScoreCard
from ranking.encoder_inputs import INPUTS, pad
from ranking.errors import InputError
from ranking.text import EncodedPair


def feeds(encoder: Encoder, count: int = 4) -> list:
    return [example_inputs(4, 24, encoder.model.config.vocab_size, seed) for seed in range(count)]


def test_the_export_equals_pytorch_on_shapes_it_did_not_see(checkpoint, exported):
    assert parity(load_encoder(checkpoint), exported) < 1e-5


def test_an_export_that_lost_the_token_types_is_refused(checkpoint, tmp_path):
    class Forgetful(Encoder):
        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    with pytest.raises(InputError, match="does not use token_type_ids"):
        export(Forgetful(load_encoder(checkpoint).model).eval(), tmp_path / "model.onnx")


def test_a_graph_with_a_fixed_length_is_refused(exported, tmp_path):
    model = onnx.load(str(exported))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 16
    onnx.save(model, str(tmp_path / "fixed.onnx"))
    with pytest.raises(InputError, match="dynamic"):
        check_graph(tmp_path / "fixed.onnx", INPUTS)


def test_parity_notices_one_changed_weight(checkpoint, exported, tmp_path):
    model = onnx.load(str(exported))
    weight = next(t for t in model.graph.initializer if t.name.endswith("classifier.weight"))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
    onnx.save(model, str(tmp_path / "changed.onnx"))
    with pytest.raises(InputError, match="differ from PyTorch"):
        parity(load_encoder(checkpoint), tmp_path / "changed.onnx")


def test_a_checkpoint_without_its_head_is_refused_not_filled_with_random_numbers(checkpoint, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file(
        {n: w for n, w in weights.items() if "classifier" not in n}, broken / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match="the weights lack classifier"):
        load_encoder(broken)


def test_a_teacher_is_not_built_as_a_student(checkpoint, tmp_path):
    other = shutil.copytree(checkpoint, tmp_path / "teacher")
    card = ScoreCard.load(other)
    card.role = "teacher"
    card.save(other)
    with pytest.raises(InputError, match="is a teacher, a student or baseline is needed"):
        load_encoder(other)


def test_a_model_with_an_odd_number_of_positions_takes_padded_lengths(checkpoint, tmp_path):
    encoder = load_encoder(checkpoint)
    embeddings = encoder.model.bert.embeddings
    known = embeddings.position_embeddings.weight[:61].detach()
    embeddings.position_embeddings = torch.nn.Embedding.from_pretrained(known)
    embeddings.position_ids, embeddings.token_type_ids = (
        embeddings.position_ids[:, :61],
        embeddings.token_type_ids[:, :61],
    )
    encoder.model.config.max_position_embeddings = 61
    pairs = [EncodedPair([2, *range(5, 5 + n), 3], 3) for n in (59, 4)]
    alone = [torch_runner(encoder)(pad([pair], len(pair.ids), pad_id=0))[0] for pair in pairs]
    assert widen_positions(encoder) == 64 == widen_positions(encoder)
    np.testing.assert_allclose(score_pairs(torch_runner(encoder), pairs, pad_id=0), alone, atol=1e-5)
    assert parity(encoder, export(encoder, tmp_path / "model.onnx")) < 1e-5


def test_padding_and_batching_do_not_change_scores(checkpoint):
    runner = torch_runner(load_encoder(checkpoint))
    pairs = [EncodedPair([2, *range(5, 5 + n), 3], 3) for n in (4, 30, 11, 60, 2)]
    together = score_pairs(runner, pairs, pad_id=0)
    alone = [runner(pad([pair], len(pair.ids), pad_id=0))[0] for pair in pairs]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_the_cast_graph_computes_in_fp16_but_for_layer_norm_and_softmax(checkpoint, exported, tmp_path):
    encoder = load_encoder(checkpoint)
    kept = cast_to_fp16(exported, tmp_path / "cast.onnx", feeds(encoder))
    check_fp32(tmp_path / "cast.onnx")
    graph = onnx.load(str(tmp_path / "cast.onnx")).graph
    half = [t for t in graph.initializer if t.data_type == TensorProto.FLOAT16]
    assert len(half) > 10
    kinds = {node.name: node.op_type for node in graph.node}
    assert sorted(kinds[name] for name in kept) == ["Add", "Add", "Where"]  # the attention mask of -3.4e38, and its use
    assert {v.name: v.type.tensor_type.elem_type for v in graph.output} == {"logits": TensorProto.FLOAT}
    feed = example_inputs(3, 40, encoder.model.config.vocab_size, seed=9)
    np.testing.assert_allclose(cast_runner(tmp_path / "cast.onnx")(feed), torch_runner(encoder)(feed), atol=5e-3)


def test_nodes_that_would_overflow_fp16_stay_in_fp32(checkpoint, exported, tmp_path):
    # a layer's weights times 1e5, and its LayerNorm undoes the scale: harmless in fp32, infinite in fp16
    model = onnx.load(str(exported))
    for tensor in model.graph.initializer:
        if tensor.name.endswith("layer.0.output.dense.bias"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 70000.0, tensor.name))
    onnx.save(model, str(tmp_path / "large.onnx"))
    encoder = load_encoder(checkpoint)
    kept = cast_to_fp16(tmp_path / "large.onnx", tmp_path / "cast.onnx", feeds(encoder))
    feed = example_inputs(3, 24, encoder.model.config.vocab_size, seed=9)
    expected = cast_runner(tmp_path / "large.onnx")(feed)
    assert len(kept) > 2 and np.isfinite(expected).all()
    np.testing.assert_allclose(cast_runner(tmp_path / "cast.onnx")(feed), expected, atol=2e-2)


def test_int8_has_explicit_symmetric_scales_around_every_product_with_weights(checkpoint, exported, tmp_path):
    encoder = load_encoder(checkpoint)
    quantise_qdq(exported, tmp_path / "int8.onnx", feeds(encoder))
    graph = onnx.load(str(tmp_path / "int8.onnx")).graph
    makers = {output: node for node in graph.node for output in node.output}
    quantised = [n for n in graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in makers]
    weights = [n for n in quantised if makers[n.input[1]].op_type == "DequantizeLinear"]
    assert len(weights) == 2 * 6 + 2  # two layers of six, pooler and head
    assert all(makers[n.input[0]].op_type == "DequantizeLinear" for n in weights)
    zero_points = [t for t in graph.initializer if "zero_point" in t.name]
    assert zero_points and all(not numpy_helper.to_array(t).any() for t in zero_points)
    feed = example_inputs(8, 24, encoder.model.config.vocab_size, seed=9)
    expected = torch_runner(encoder)(feed)
    assert np.corrcoef(cast_runner(tmp_path / "int8.onnx")(feed), expected)[0, 1] > 0.7
