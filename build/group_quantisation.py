"""INT8 for a CPU without bf16: weights and activations in groups of neighbours, each with a scale of its own.

A scale for a whole matrix, as NNCF's post-training quantisation has it, is too coarse for a reranker whose scores of
one query lie close together: a handful of channels of a BERT's LayerNorms are ten times as large as the others, and all
others are rounded by their scale. Here

- each `group` neighbouring inputs of a matrix product share a scale, in the weights (known at the build) and in the
  activations (taken from each token as it comes: OpenVINO's dynamic quantisation);
- channels that are large are divided, and their weights multiplied, by what evens both out (SmoothQuant, Xiao et al.,
  arXiv 2211.10438), where the product has at least as many outputs as inputs: elsewhere the division costs more time
  than it saves error;
- what a channel is on the mean, and the middle of each group's range, is taken off the activations and added to the
  outputs as a constant, where that makes the steps of the rounding clearly smaller;
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
SAMPLED_TOKENS = 1536  # of each place, on which what centring brings is looked at
WORTH_CENTRING = 0.9  # of the mean squared step: what is left must be less, since two operations are added


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


class _Activations:
    """What candidates' tokens give at one place.

    tokens: how many they are; total, moments: sum of x - origin, [inputs], and of (x - origin) (x - origin)^T, float32
    [inputs, inputs], the origin being close to the mean, from which float32 counts without loss; largest: |x|,
    [inputs]; sample: some of the tokens, [of them, inputs].
    """

    def __init__(self, rows: NDArray[np.float32]):
        width = rows.shape[1]
        self.origin = rows.mean(axis=0)
        self.tokens = 0
        self.total = np.zeros(width)
        self.moments = np.zeros((width, width), np.float32)
        self.largest = np.zeros(width, np.float32)
        self.sample = np.empty((0, width), np.float32)

    def add(self, rows: NDArray[np.float32], sampled: int) -> None:
        """Count tokens, [tokens, inputs], and keep at most `sampled` of them."""
        moved = rows - self.origin
        self.tokens += len(rows)
        self.total += moved.sum(axis=0, dtype=np.float64)
        self.moments += moved.T @ moved
        np.maximum(self.largest, np.abs(rows).max(axis=0), out=self.largest)
        self.sample = np.concatenate([self.sample, rows[:: -(-len(rows) // sampled)]])

    def moments_about(self, centre: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum of (x - centre) (x - centre)^T, [inputs, inputs]."""
        moved = centre - self.origin
        crossed = np.outer(self.total, moved)
        return self.moments - crossed - crossed.T + self.tokens * np.outer(moved, moved)


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
            if place not in found:
                found[place] = _Activations(rows)
            found[place].add(rows, max(1, SAMPLED_TOKENS // len(calibration)))
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


def centre_of(sample: NDArray[np.float32], group: int) -> NDArray[np.float64]:
    """What to take off tokens, [inputs], before they are rounded in groups; zeros where that brings too little.

    sample: some of the tokens, [tokens, inputs]. Each channel's mean, then the mean middle of each group's range.
    """
    mean = sample.mean(axis=0, dtype=np.float64)
    grouped = (sample - mean).reshape(len(sample), -1, group)
    middle = (grouped.max(axis=2) + grouped.min(axis=2)).mean(axis=0) / 2
    centre = mean + np.repeat(middle, group)
    worth = _squared_step(sample - centre, group) < WORTH_CENTRING * _squared_step(sample, group)
    return centre if worth else np.zeros_like(centre)


def _squared_step(tokens: NDArray[np.floating], group: int) -> float:
    """The mean square of the steps that tokens are rounded to, in units of 1 / LEVELS."""
    return float(np.square(np.abs(tokens.reshape(len(tokens), -1, group)).max(axis=2)).mean())


def _quantise(readers: Sequence[_Product], seen: _Activations, group: int) -> None:
    """Put INT8 weights and their scales, in the shape that OpenVINO takes for a compressed matrix, into the graph.

    readers: all products of one place.
    """
    from openvino import opset13

    def constant(values: NDArray[np.floating]) -> Any:
        return opset13.constant(values.astype(np.float32))

    source, scale = readers[0].node.input_value(0), np.ones(readers[0].inputs)
    matrices = [reader.weights() for reader in readers]
    if all(len(matrix) >= len(scale) for matrix in matrices):
        scale = even_out(seen.largest, np.max([np.abs(matrix).max(axis=0) for matrix in matrices], axis=0))
        source = opset13.multiply(source, constant(1 / scale)).output(0)
    centre = centre_of(seen.sample / scale.astype(np.float32), group)
    if centre.any():
        source = opset13.subtract(source, constant(centre)).output(0)
    spread = spread_of(seen.moments_about(centre * scale) / np.outer(scale, scale))
    for reader, matrix in zip(readers, matrices):
        rounded, scales = round_in_groups((matrix * scale).astype(np.float32), spread, group)
        weights = opset13.multiply(opset13.convert(opset13.constant(rounded), "f32"), opset13.constant(scales))
        shape = opset13.constant(np.array(matrix.shape, np.int64))
        node = opset13.matmul(source, opset13.reshape(weights, shape, special_zero=False), False, True)
        if centre.any():
            node = opset13.add(node, constant(matrix @ (centre * scale)))
        node.set_friendly_name(reader.node.get_friendly_name())
        reader.node.output(0).replace(node.output(0))
