"""Cast an ONNX graph to fp16 in the graph itself, with LayerNorm, softmax and whatever would overflow kept in fp32.

TensorRT 11 is strongly typed: it computes in the types that the graph names. LayerNorm in fp16 overflows (TensorRT #2564,
#3101), so does anything that leaves +-65504; which nodes do is measured on real pairs, not guessed. INT8 is explicit too:
QuantizeLinear and DequantizeLinear around the matrix products, calibrated on real candidates.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from build.runners import Feed
from ranking.errors import InputError

KEPT_IN_FP32 = ("LayerNormalization", "Softmax", "ReduceMean", "Pow", "Sqrt")
FP16_MAX = float(np.finfo(np.float16).max)
HEADROOM = 4.0  # real traffic may exceed the sample: a node within this factor of overflow stays fp32

LOGGER = logging.getLogger(__name__)


def cast_to_fp16(source: str | Path, target: str | Path, feeds: Sequence[Feed]) -> list[str]:
    """Write the mixed-precision graph; inputs and logits keep their types. Returns the nodes kept fp32 for their range.

    feeds: a few batches of real pairs, on which the range of every tensor is measured.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    model = onnx.load(str(source))
    _name_nodes(model)
    wide = wide_nodes(model, feeds)
    _clip_mask_constants(model)
    cast = convert_float_to_float16(
        model,
        keep_io_types=True,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *KEPT_IN_FP32],
        node_block_list=wide,
        min_positive_val=6e-8,
    )
    onnx.checker.check_model(cast)
    onnx.save(cast, str(target))
    check_fp32(target)
    LOGGER.info("cast to fp16; %d nodes kept in fp32 for their range", len(wide))
    return wide


def _name_nodes(model: onnx.ModelProto) -> None:
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"


def _clip_mask_constants(model: onnx.ModelProto) -> None:
    """Bring -3.4e38, which masks padding, into fp16's range: out of it the mask turns to -inf, and inf - inf to NaN (#2466)."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor)
            if values.size and np.abs(values).max() > FP16_MAX:
                clipped = np.clip(values, -1e4, 1e4).astype(np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(clipped, tensor.name))


def wide_nodes(model: onnx.ModelProto, feeds: Sequence[Feed]) -> list[str]:
    """Names of nodes that write or read a value too large for fp16 (with HEADROOM) on the given batches.

    Attention masks are left out: their constant is clipped instead.
    """
    ranges = dict(tensor_ranges(model, feeds))
    masks = {tensor.name for tensor in model.graph.initializer if _is_mask_constant(tensor)}
    for node in model.graph.node:  # what only moves or adds the mask carries its size
        if masks & set(node.input) and node.op_type in ("Where", "Mul", "Add", "Expand", "Cast", "Concat", "Unsqueeze"):
            masks |= set(node.output)
    limit = FP16_MAX / HEADROOM
    return [
        node.name
        for node in model.graph.node
        if any(ranges.get(name, 0.0) > limit and name not in masks for name in (*node.input, *node.output))
    ]


def _is_mask_constant(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type != TensorProto.FLOAT or (tensor.dims and np.prod(tensor.dims) > 1):
        return False
    return bool(np.abs(onnx.numpy_helper.to_array(tensor)).max(initial=0) > FP16_MAX)


def tensor_ranges(model: onnx.ModelProto, feeds: Sequence[Feed]) -> Iterator[tuple[str, float]]:
    """Name and largest magnitude of every float tensor between the nodes, over the given batches."""
    import onnxruntime

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    typed = onnx.shape_inference.infer_shapes(probe)
    floats = [info.name for info in typed.graph.value_info if info.type.tensor_type.elem_type == TensorProto.FLOAT]
    have = {value.name for value in probe.graph.output}
    probe.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in floats if name not in have
    )
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    largest = dict.fromkeys(floats, 0.0)
    for feed in feeds:
        for name, value in zip(floats, session.run(floats, feed)):
            finite = np.abs(value[np.isfinite(value)])
            largest[name] = max(largest[name], float(finite.max(initial=0.0)))
    yield from largest.items()


def check_fp32(path: str | Path) -> None:
    """InputError unless every LayerNorm and softmax of the graph computes in fp32 and something computes in fp16."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(path))).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("LayerNormalization", "Softmax") and types.get(node.input[0]) != TensorProto.FLOAT:
            raise InputError(f"{path}: {node.name} ({node.op_type}) was cast out of fp32")
    if not any(types.get(node.input[0]) == TensorProto.FLOAT16 for node in graph.node if node.op_type == "MatMul"):
        raise InputError(f"{path}: no matrix product was cast to fp16")


def quantise_qdq(source: str | Path, target: str | Path, feeds: Sequence[Feed]) -> None:
    """Write an INT8 graph with explicit Q/DQ around the products with weights, symmetric and per channel, as TensorRT wants."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self):
            return next(self.left, None)

    model = onnx.load(str(source))
    weights = {tensor.name for tensor in model.graph.initializer}
    # products of two activations (attention) stay in fp16: INT8 there costs order and saves little
    chosen = [n.name for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in weights]
    quantization.quantize_static(
        model,
        str(target),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        nodes_to_quantize=chosen,
        op_types_to_quantize=["MatMul", "Gemm"],
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )
