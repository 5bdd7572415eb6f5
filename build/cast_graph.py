"""Cast an ONNX graph to fp16 in the graph itself, with LayerNorm, softmax and whatever would overflow kept in fp32.

TensorRT 11 is strongly typed: it computes in the types that the graph names. LayerNorm in fp16 overflows (TensorRT
#2564, #3101), and so does every node with a value beyond +-65504; which nodes these are is measured on real pairs. INT8
is explicit too: QuantizeLinear and DequantizeLinear around the matrix products, calibrated on real candidates.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ranking.encoder_inputs import Feed
from ranking.errors import InputError

# what may compute in fp16; anything else, LayerNormalization and Softmax above all, stays in fp32
HALF = {
    *("MatMul", "Gemm", "Add", "Sub", "Mul", "Div", "Erf", "Tanh", "Where"),
    *("Reshape", "Transpose", "Gather", "GatherND", "Slice", "Squeeze", "Unsqueeze", "Concat"),
    *("QuantizeLinear", "DequantizeLinear"),
}
FP32 = ("LayerNormalization", "Softmax")  # what a cast graph is checked for
FP16_MAX = float(np.finfo(np.float16).max)
HEADROOM = 4.0  # real traffic may exceed the sample: a node within this factor of overflow stays fp32

LOGGER = logging.getLogger(__name__)


def cast_to_fp16(
    source: str | Path, target: str | Path, feeds: Sequence[Feed], half_softmax: bool = False
) -> list[str]:
    """Write the mixed-precision graph; inputs and logits keep their types. Returns the nodes kept in fp32.

    feeds: a few batches of real pairs, on which the range of every tensor is measured; half_softmax: softmax is fp16
    too, so that no cast stands between the two products of attention.
    """
    model = onnx.load(str(source))
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    kinds = HALF | {"Softmax"} if half_softmax else HALF
    wide = wide_nodes(model, feeds, kinds)
    insert_casts(model, set(wide), kinds)
    onnx.checker.check_model(model)
    onnx.save(model, str(target))
    check_fp32(target, ("LayerNormalization",) if half_softmax else FP32)
    LOGGER.info("cast to fp16; %d nodes kept in fp32 for their range", len(wide))
    return wide


def wide_nodes(model: onnx.ModelProto, feeds: Sequence[Feed], kinds: set[str]) -> list[str]:
    """Names of nodes of these kinds that read or write a value above fp16's range (with HEADROOM) on these batches.

    The additive attention mask, whose -3.4e38 would turn to -inf and then to NaN (TensorRT #2466), is found this way
    too.
    """
    ranges = dict(tensor_ranges(model, feeds))
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            ranges[tensor.name] = float(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0))
    limit = FP16_MAX / HEADROOM
    return [
        node.name
        for node in model.graph.node
        if node.op_type in kinds and any(ranges.get(name, 0.0) > limit for name in (*node.input, *node.output))
    ]


def insert_casts(model: onnx.ModelProto, kept: set[str], kinds: set[str]) -> None:
    """Let every node of these kinds that is not kept compute in fp16, with Cast nodes where fp16 and fp32 meet.

    In place; kept: names of nodes. Nodes that make the graph's outputs stay in fp32. Every tensor is cast at most once
    in each direction.
    """
    graph = model.graph
    typed = onnx.shape_inference.infer_shapes(model).graph
    floats = {
        value.name
        for value in (*typed.value_info, *typed.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    results = {value.name for value in graph.output}
    in_half: set[str] = set()  # float tensors that are fp16 from here on
    nodes: list[onnx.NodeProto] = []
    made: set[str] = set()

    def as_type(name: str, half: bool) -> str:
        if (name not in floats and name not in weights) or (name in in_half) == half:
            return name
        cast = f"{name}__{'fp16' if half else 'fp32'}"
        if cast not in made:
            made.add(cast)
            if name in weights:
                values = numpy_helper.to_array(weights[name]).astype(np.float16)
                graph.initializer.append(numpy_helper.from_array(values, cast))
            else:
                to = TensorProto.FLOAT16 if half else TensorProto.FLOAT
                nodes.append(helper.make_node("Cast", [name], [cast], name=f"cast_{cast}", to=to))
        return cast

    for node in graph.node:
        half = node.op_type in kinds and node.name not in kept and not results & set(node.output)
        for place, name in enumerate(node.input):
            node.input[place] = as_type(name, half)
        if half:
            in_half |= floats & set(node.output)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]  # they name the old types
    used = {name for node in nodes for name in node.input}
    unused = [tensor for tensor in graph.initializer if tensor.name not in used]
    for tensor in unused:
        graph.initializer.remove(tensor)


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


def check_fp32(path: str | Path, kinds: Sequence[str] = FP32) -> None:
    """InputError unless every node of these kinds computes in fp32 and something computes in fp16."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(path))).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in kinds and types.get(node.input[0]) != TensorProto.FLOAT:
            raise InputError(f"{path}: {node.name} ({node.op_type}) was cast out of fp32")
    if not any(types.get(node.input[0]) == TensorProto.FLOAT16 for node in graph.node if node.op_type == "MatMul"):
        raise InputError(f"{path}: no matrix product was cast to fp16")


def quantise_qdq(source: str | Path, target: str | Path, feeds: Sequence[Feed]) -> None:
    """Write an INT8 graph: explicit QuantizeLinear/DequantizeLinear around the matrix products with weights.

    Scales are symmetric, and per channel for weights, because TensorRT accepts nothing else. feeds: calibration
    batches.
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> Feed | None:
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
