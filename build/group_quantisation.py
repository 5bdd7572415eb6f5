"""INT8 for a CPU without bf16: weights and activations in groups of neighbours, each with a scale of its own.

A scale for a whole matrix, as NNCF's post-training quantisation has it, is too coarse for a reranker whose scores of
one query lie close together: a handful of channels of a BERT's LayerNorms are ten times as large as the others, and all
others are rounded by their scale. Here

- each `group` neighbouring inputs of a matrix product share a scale, in the weights (known at the build) and in the
  activations (taken from each token as it comes: OpenVINO's dynamic quantisation);
- channels that are large are divided, and their weights multiplied, by what evens both out (SmoothQuant, Xiao et al.,
  arXiv 2211.10438), where the product has at least as many outputs as inputs: elsewhere the division costs more time
  than it saves error;
- a weight's rounding error is made up for by the weights after it (GPTQ, Frantar et al., arXiv 2210.17323), with the
  inputs that real candidates give.

OpenVINO runs such a product in INT8 where the CPU has instructions for it (VNNI), and in fp32 elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build import openvino_engine
from build.gate import Verdict
from build.runners import openvino_core
from ranking.encoder_inputs import Feed, chosen
from ranking.errors import InputError

LOGGER = logging.getLogger(__name__)
GROUPS = (64, 32)  # inputs that share a scale: the fewer, the more exact and the slower
SMOOTHING = 0.65  # share of the activations' range in SmoothQuant's scale; the rest is the weights'
DAMPING = 0.01  # of the second moments' mean, added to their diagonal
LEVELS = 127
SMALLEST = 1e-8


@dataclass
class _Product:
    """One matrix product of the graph whose second operand is a constant, as it lies there or transposed."""

    node: Any
    constant: Any
    transposed: bool

    @property
    def input(self) -> tuple[str, int]:
        """Which activations it reads: several products may read the same."""
        source = self.node.input_value(0)
        return source.get_node().get_friendly_name(), source.get_index()

    @property
    def inputs(self) -> int:
        """How many numbers of a token it reads."""
        return self.constant.shape[1 if self.transposed else 0]

    def weights(self) -> NDArray[np.float32]:
        """Its weights, [outputs, inputs]."""
        found = self.constant.data
        return np.ascontiguousarray(found if self.transposed else found.T, np.float32)


@dataclass
class _Activations:
    """What candidates' tokens give at one place: sum of x x^T, float32 [inputs, inputs], and largest |x|, [inputs]."""

    moments: NDArray[np.float32]
    largest: NDArray[np.float32]


def build_group_ir(
    onnx_path: str | Path,
    folder: str | Path,
    positions: int,
    calibration: Sequence[Feed],
    judge: Callable[[Path], Verdict],
) -> tuple[Path, int]:
    """Write model.xml and model.bin with the largest of GROUPS that passes. Returns the path and the group's size.

    Each is written into a folder of its own under `folder`. judge: gates an IR. If none passes, the smallest group's is
    returned, and the gate will refuse it. InputError for a network that no group fits.
    """
    groups = fitting_groups(onnx_path, positions)
    if not groups:
        raise InputError(f"INT8 in groups: no matrix product has a multiple of {GROUPS[-1]} inputs")
    seen = activations(onnx_path, positions, calibration)
    for group in groups:
        place = Path(folder) / str(group)
        place.mkdir()
        path = write_group_ir(onnx_path, place, positions, seen, group)
        if group == groups[-1] or judge(path).passed:
            break
    return path, group


def fitting_groups(onnx_path: str | Path, positions: int) -> list[int]:
    """Those of GROUPS that divide the inputs of matrix products of the network, the largest first.

    A group that fits fewer products than a smaller one is left out: most of that engine would be fp32.
    """
    model, _ = openvino_engine.read_network(onnx_path, positions)
    widths = [product.inputs for product in _products(model)]
    fits = {group: sum(width % group == 0 for width in widths) for group in GROUPS}
    return [group for group in GROUPS if fits[group] == max(fits.values()) > 0]


def activations(
    onnx_path: str | Path, positions: int, calibration: Sequence[Feed]
) -> dict[tuple[str, int], _Activations]:
    """The inputs of all matrix products with constant weights, as calibration batches give them; padding left out."""
    model, names = openvino_engine.read_network(onnx_path, positions)
    places = {product.input: product.node.input_value(0) for product in _products(model)}
    before = len(model.outputs)
    model.add_outputs(list(places.values()))
    request = openvino_core().compile_model(model, "CPU", openvino_engine.settings("fp32")).create_infer_request()
    found: dict[tuple[str, int], _Activations] = {}
    for feed in calibration:
        request.infer(chosen(feed, names))
        tokens = feed["attention_mask"].astype(bool)
        for number, place in enumerate(places, before):
            values = request.get_output_tensor(number).data
            rows = values[tokens] if values.shape[:-1] == tokens.shape else values.reshape(-1, values.shape[-1])
            moments, largest = rows.T @ rows, np.abs(rows).max(axis=0)
            if place in found:
                found[place].moments += moments
                np.maximum(found[place].largest, largest, out=found[place].largest)
            else:
                found[place] = _Activations(moments, largest)
    return found


def write_group_ir(
    onnx_path: str | Path,
    folder: str | Path,
    positions: int,
    seen: dict[tuple[str, int], _Activations],
    group: int,
) -> Path:
    """Write model.xml and model.bin with every matrix product in INT8 whose inputs are a multiple of the group."""
    import openvino

    model, _ = openvino_engine.read_network(onnx_path, positions)
    products = [product for product in _products(model) if product.inputs % group == 0]
    by_place: dict[tuple[str, int], list[_Product]] = {}
    for product in products:
        by_place.setdefault(product.input, []).append(product)
    for place, readers in by_place.items():
        _quantise(readers, seen[place], group)
    model.validate_nodes_and_infer_types()
    model.set_rt_info(str(group), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    LOGGER.info("%d matrix products in INT8, in groups of %d inputs", len(products), group)
    path = Path(folder) / openvino_engine.MODEL_FILE
    openvino.save_model(model, str(path), compress_to_fp16=False)
    return path


def round_in_groups(
    weights: NDArray[np.float32], spread: NDArray[np.float64], group: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Weights in INT8 with a scale for each group of inputs: int8 and float32 [outputs, inputs / group, group or 1].

    weights: [outputs, inputs]; spread: spread_of() the inputs that it will see. From the first input to the last, what
    rounding moves in the outputs is taken back by the inputs that are still to be rounded.
    """
    outputs, inputs = weights.shape
    left = weights.astype(np.float64)
    rounded = np.zeros((outputs, inputs // group, group), np.int8)
    scales = np.zeros((outputs, inputs // group, 1), np.float32)
    for number in range(inputs // group):
        first, end = number * group, (number + 1) * group
        block = left[:, first:end]
        scale = np.maximum(np.abs(block).max(axis=1) / LEVELS, SMALLEST).astype(np.float32)
        errors = np.zeros_like(block)
        for column in range(group):
            row = spread[first + column]
            rounded[:, number, column] = np.clip(np.rint(block[:, column] / scale), -LEVELS, LEVELS)
            errors[:, column] = (block[:, column] - rounded[:, number, column] * scale) / row[first + column]
            block[:, column + 1 :] -= np.outer(errors[:, column], row[first + column + 1 : end])
        left[:, end:] -= errors @ spread[first:end, end:]
        scales[:, number, 0] = scale
    return rounded, scales


def spread_of(moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """How the error of one input is made up for by those after it, given that those before it are set: GPTQ's factor.

    moments: sum of x x^T over the inputs, [inputs, inputs]. Returns the upper Cholesky factor of its inverse, damped.
    """
    damped = moments + np.diag(np.where(np.diag(moments) == 0, 1.0, 0.0))  # an input that is always 0
    damped += DAMPING * np.diag(damped).mean() * np.eye(len(moments))
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def _products(model: Any) -> list[_Product]:
    """The matrix products of activations by a constant of two dimensions, in the order of their computing.

    Where the first operand is of one size whatever the batch is, it is a constant too (DeBERTa's relative positions),
    and OpenVINO computes the product once.
    """
    found = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_a"]:
            continue
        if node.input_value(0).get_partial_shape().is_static:
            continue
        source, transposed = node.input_value(1).get_node(), node.get_attributes()["transpose_b"]
        if source.get_type_name() == "Transpose":
            transposed, source = not transposed, source.input_value(0).get_node()
        if source.get_type_name() == "Constant" and len(source.shape) == 2:
            found.append(_Product(node, source, transposed))
    return found


def even_out(activations: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """SmoothQuant's scale of each input, [inputs]: activations are divided by it, weights multiplied; its mean is 1.

    activations, weights: largest absolute value of each input. The mean is the geometric one. An input that was always
    0 keeps its size.
    """
    known = activations > SMALLEST
    scale = np.ones(len(activations))
    scale[known] = activations[known] ** SMOOTHING / np.maximum(weights[known], SMALLEST) ** (1 - SMOOTHING)
    scale[known] /= np.exp(np.log(scale[known]).mean())
    return scale


def _quantise(readers: Sequence[_Product], seen: _Activations, group: int) -> None:
    """Put INT8 weights and their scales, in the shape that OpenVINO takes for a compressed matrix, into the graph.

    readers: all products of one place.
    """
    from openvino import opset13

    source, scale = readers[0].node.input_value(0), np.ones(readers[0].inputs)
    matrices = [reader.weights() for reader in readers]
    if all(len(matrix) >= len(scale) for matrix in matrices):
        scale = even_out(seen.largest, np.max([np.abs(matrix).max(axis=0) for matrix in matrices], axis=0))
        source = opset13.multiply(source, opset13.constant((1 / scale).astype(np.float32))).output(0)
    spread = spread_of(seen.moments / np.outer(scale, scale))
    for reader, matrix in zip(readers, matrices):
        rounded, scales = round_in_groups((matrix * scale).astype(np.float32), spread, group)
        weights = opset13.multiply(opset13.convert(opset13.constant(rounded), "f32"), opset13.constant(scales))
        shape = opset13.constant(np.array(matrix.shape, np.int64))
        node = opset13.matmul(source, opset13.reshape(weights, shape, special_zero=False), False, True)
        node.set_friendly_name(reader.node.get_friendly_name())
        reader.node.output(0).replace(node.output(0))
