"""The engine's graphs, padded and packed, against transformers' BERT: in PyTorch, in ONNX Runtime, and cast to fp16."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from build.cast_graph import cast_to_fp16
from build.engine_encoder import MASKED, PackedEncoder, PaddedEncoder
from build.export_onnx import example_inputs, export, load_encoder, parity, torch_runner
from build.tensorrt_engine import cast_runner
from ranking.encoder_inputs import OUTPUT, PACKED_INPUTS, pack, pad, without_padding
from ranking.errors import InputError
from ranking.text import EncodedPair

LONGEST = 64


def random_pairs(count: int, vocabulary: int = 200, seed: int = 0) -> list[EncodedPair]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, LONGEST + 1, count)
    return [EncodedPair(rng.integers(5, vocabulary, n).tolist(), int(n) // 3) for n in lengths]


@pytest.fixture(scope="module")
def graphs(checkpoint, tmp_path_factory):
    """The padded and the packed graph of the tiny checkpoint."""
    folder, model = tmp_path_factory.mktemp("engine"), load_encoder(checkpoint).model
    padded = export(PaddedEncoder(model).eval(), folder / "padded.onnx")
    return padded, export(PackedEncoder(model, LONGEST).eval(), folder / "packed.onnx")


def packed_scores(session, feed) -> np.ndarray:
    return session.run([OUTPUT], feed)[0]


def test_packed_and_padded_layouts_equal_the_checkpoint_in_pytorch(checkpoint):
    encoder = load_encoder(checkpoint)
    pairs = random_pairs(500)
    feed = pad(pairs, LONGEST, pad_id=0)
    expected = torch_runner(encoder)(feed)
    packed = {name: torch.from_numpy(value) for name, value in pack(pairs).items()}
    with torch.inference_mode():
        padded = PaddedEncoder(encoder.model).eval()(*(torch.from_numpy(value) for value in feed.values()))[:, 0]
        ragged = PackedEncoder(encoder.model, LONGEST).eval()(**packed)
    np.testing.assert_allclose(padded, expected, atol=1e-5)
    np.testing.assert_allclose(ragged, expected, atol=1e-5)


def test_both_graphs_equal_the_checkpoint_in_onnx_runtime(checkpoint, graphs):
    for graph in graphs:
        assert parity(load_encoder(checkpoint), graph) < 1e-5


def test_requests_that_are_concatenated_keep_their_scores(graphs):
    session = onnxruntime.InferenceSession(str(graphs[1]))
    requests = [random_pairs(n, seed=n) for n in (1, 7, 48)]
    feeds = [pack(pairs) for pairs in requests]
    together = {name: np.concatenate([feed[name] for feed in feeds]) for name in PACKED_INPUTS}
    alone = np.concatenate([packed_scores(session, feed) for feed in feeds])
    np.testing.assert_allclose(packed_scores(session, together), alone, atol=1e-5)


def test_packing_holds_the_tokens_of_a_padded_batch_and_no_others():
    pairs = random_pairs(9)
    for name, value in without_padding(pad(pairs, LONGEST, pad_id=0)).items():
        np.testing.assert_array_equal(value, pack(pairs)[name], err_msg=name)
    assert len(pack(pairs)["input_ids"]) == sum(len(pair.ids) for pair in pairs)


def test_a_packed_graph_that_lost_its_positions_is_refused(checkpoint, tmp_path):
    class Forgetful(PackedEncoder):
        def forward(self, input_ids, token_type_ids, position_ids, lengths):
            known = torch.zeros_like(position_ids)
            known[(lengths.long().cumsum(0) - lengths)[1:]] = 0
            return super().forward(input_ids, token_type_ids, known, lengths)

    with pytest.raises(InputError, match="does not use position_ids"):
        export(Forgetful(load_encoder(checkpoint).model, LONGEST).eval(), tmp_path / "model.onnx")


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_cast_graph_keeps_only_softmax_and_layer_norm_in_fp32(checkpoint, graphs, tmp_path, layout):
    graph = graphs[layout == "packed"]
    encoder = load_encoder(checkpoint)
    feeds = [example_inputs(4, 24, encoder.model.config.vocab_size, seed) for seed in range(3)]
    as_layout = without_padding if layout == "packed" else dict
    assert cast_to_fp16(graph, tmp_path / "cast.onnx", [as_layout(feed) for feed in feeds]) == []
    nodes = onnx.load(str(tmp_path / "cast.onnx")).graph.node
    makers = {output: node for node in nodes for output in node.output}
    softmaxes = [node for node in nodes if node.op_type == "Softmax"]
    assert len(softmaxes) == 2  # one a layer
    for softmax in softmaxes:  # logits come from the product through the mask, nothing scaled or added in between
        masked = makers[makers[softmax.input[0]].input[0]]
        assert (makers[softmax.input[0]].op_type, masked.op_type) == ("Cast", "Where")
        assert makers[masked.input[1]].op_type == "MatMul"
    feed = example_inputs(5, 40, encoder.model.config.vocab_size, seed=9)
    scores = cast_runner(tmp_path / "cast.onnx")(feed)
    np.testing.assert_allclose(scores, torch_runner(encoder)(feed), atol=5e-3)
    assert abs(MASKED) < np.finfo(np.float16).max / 4


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_with_a_softmax_in_fp16_no_cast_stands_between_the_products_of_attention(checkpoint, graphs, tmp_path, layout):
    encoder = load_encoder(checkpoint)
    feeds = [example_inputs(4, 24, encoder.model.config.vocab_size, seed) for seed in range(3)]
    as_layout = without_padding if layout == "packed" else dict
    cast_to_fp16(graphs[layout == "packed"], tmp_path / "cast.onnx", [as_layout(feed) for feed in feeds], True)
    nodes = onnx.load(str(tmp_path / "cast.onnx")).graph.node
    makers = {output: node for node in nodes for output in node.output}
    readers = {name: node for node in nodes for name in node.input}
    softmaxes = [node for node in nodes if node.op_type == "Softmax"]
    assert len(softmaxes) == 2
    for softmax in softmaxes:
        assert makers[softmax.input[0]].op_type == "Where" and readers[softmax.output[0]].op_type == "MatMul"
    feed = example_inputs(5, 40, encoder.model.config.vocab_size, seed=9)
    scores = cast_runner(tmp_path / "cast.onnx")(feed)
    np.testing.assert_allclose(scores, torch_runner(encoder)(feed), atol=5e-3)
