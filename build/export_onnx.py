"""Checkpoint -> ONNX: a ranker with dynamic batch and length, checked against PyTorch before anyone relies on it.

The padded graph takes input_ids, attention_mask and, where the encoder has token types, token_type_ids (int32 [batch,
length]) and gives logits (float32 [batch, 1]). The packed graph, of BERT alone, takes input_ids, token_type_ids and
position_ids (int32 [tokens]) and lengths (int32 [batch]) and gives logits (float32 [batch]). An exporter may drop an
input that it believes unused. A ranker without its token types would still run, but rank differently; so the export
fails unless some node reads each input.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from build.engine_encoder import EngineEncoder, PackedEncoder
from build.runners import Runner
from ranking.card import ScoreCard
from ranking.encoder_families import ENCODER_FAMILIES, has_token_types, longest_input, refused_family
from ranking.encoder_inputs import OUTPUT, PACKED_INPUTS, Feed, chosen, inputs_of, without_padding
from ranking.errors import InputError

OPSET = 19  # from 19 on, QuantizeLinear takes fp16
PARITY_TOLERANCE = 1e-4  # of a raw fp32 logit: summation order only


class Encoder(torch.nn.Module):
    """The model as a function of int tensors [batch, length], named `inputs`, to raw logits float32 [batch, 1]."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model: Any = model  # its parts depend on the family
        self.inputs = inputs_of(has_token_types(model.config))

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        """Raw logits, float32 [batch, 1]."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types, return_dict=True).logits


def load_encoder(checkpoint: str | Path) -> Encoder:
    """The fp32 encoder of a student or baseline checkpoint, in evaluation mode. InputError if it is something else."""
    ScoreCard.load(checkpoint).require(checkpoint, "student", "baseline")
    transformers_logging.disable_progress_bar()
    try:
        # eager attention is plain MatMul and Softmax in the graph: every engine recognises and fuses it
        family = AutoConfig.from_pretrained(checkpoint).model_type
        if family not in ENCODER_FAMILIES:
            raise InputError(f"{checkpoint}: {refused_family(family)}")
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as problem:
        raise InputError(f"{checkpoint}: not a loadable ranker: {' '.join(str(problem).split())}") from problem
    model, report = loaded
    lacking = sorted(report["missing_keys"])
    if lacking:  # transformers would fill them with random numbers and only warn
        raise InputError(
            f"{checkpoint}: the weights lack {', '.join(map(str, lacking[:3]))}; this is not a trained ranker"
        )
    if model.config.num_labels != 1:
        raise InputError(f"{checkpoint}: {model.config.num_labels} labels; a ranker has one")
    return Encoder(model.eval()).eval()


def widen_positions(encoder: Encoder, multiple: int = 32) -> int:
    """Make the longest input a multiple, since engines take padded lengths; returns it.

    BERT's new positions are zero rows that padding alone can reach, and padding is masked. RoBERTa gives all padding
    one position, and ModernBERT has no table of positions, so that these need no more rows.
    """
    config = encoder.model.config
    longest = longest_input(config)
    lacking = -longest % multiple
    if lacking and config.model_type == "bert":
        embeddings = encoder.model.bert.embeddings
        known = embeddings.position_embeddings.weight.detach()
        wider = torch.cat([known, known.new_zeros(lacking, known.shape[1])])
        embeddings.position_embeddings = torch.nn.Embedding.from_pretrained(wider)
        config.max_position_embeddings = len(wider)
        embeddings.register_buffer("position_ids", torch.arange(len(wider))[None], persistent=False)
        embeddings.register_buffer("token_type_ids", torch.zeros_like(embeddings.position_ids), persistent=False)
    return longest + lacking


def torch_runner(encoder: Encoder | EngineEncoder) -> Runner:
    """The checkpoint itself, in fp32: what every engine is measured against."""

    def run(feed: Feed) -> NDArray[np.float32]:
        with torch.inference_mode():
            return encoder(*(torch.from_numpy(feed[name]).long() for name in encoder.inputs)).numpy()[:, 0]

    return run


def example_inputs(batch: int, length: int, vocabulary: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random but valid inputs, int32 [batch, length]: rows of different lengths, both token types."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(max(1, length // 2), length + 1, size=batch)
    lengths[0] = length
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    types = (np.arange(length) >= max(1, length // 3)).astype(np.int32)[None].repeat(batch, 0) * mask
    ids = rng.integers(0, vocabulary, size=(batch, length)).astype(np.int32) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def export(encoder: Encoder | EngineEncoder, path: str | Path) -> Path:
    """Write the encoder as one ONNX file and check its graph. InputError if an input was lost or a dimension fixed.

    A PackedEncoder gives the packed graph, any other encoder the padded one.
    """
    config = encoder.model.config
    feed = example_inputs(3, 16, config.vocab_size)
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    shapes: tuple[dict[int, Any], ...]
    names: tuple[str, ...]
    if isinstance(encoder, PackedEncoder):
        feed, names = without_padding(feed), PACKED_INPUTS
        tokens = torch.export.Dim("tokens", min=2, max=1 << 24)
        shapes = ({0: tokens}, {0: tokens}, {0: tokens}, {0: batch})
    else:
        names = encoder.inputs
        length = torch.export.Dim("length", min=2, max=longest_input(config))
        shapes = tuple({0: batch, 1: length} for _ in names)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's deprecations of its own internals
        torch.onnx.export(
            encoder,
            tuple(torch.from_numpy(feed[name]) for name in names),
            str(path),
            input_names=list(names),
            output_names=[OUTPUT],
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
        )
    check_graph(path, names)
    return Path(path)


def check_graph(path: str | Path, names: Sequence[str]) -> None:
    """InputError unless the graph reads these inputs, with dynamic sizes, and gives one logit a pair."""
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    graph = model.graph
    # an input whose shape alone is read counts as lost: its values no longer matter
    read = {name for node in graph.node if node.op_type not in ("Shape", "Size") for name in node.input}
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    packed = is_packed(graph)
    for name in names:
        if name not in shapes or name not in read:
            raise InputError(
                f"{path}: the exported graph does not use {name}; its ranking would differ from the model's"
            )
        if not all(isinstance(dim, str) for dim in shapes[name]):
            raise InputError(f"{path}: {name} has the fixed shape {shapes[name]}; batch and length must be dynamic")
    logits = shapes.get(OUTPUT) or [None]
    if logits[1:] != ([] if packed else [1]) or not isinstance(logits[0], str):
        raise InputError(f"{path}: output {OUTPUT} is {logits}, {'[batch]' if packed else '[batch, 1]'} is needed")


def is_packed(graph: onnx.GraphProto) -> bool:
    """Whether the graph takes the packed layout: it has an input of lengths."""
    return PACKED_INPUTS[-1] in {value.name for value in graph.input}


def parity(encoder: Encoder, path: str | Path) -> float:
    """Largest difference between ONNX Runtime and PyTorch in fp32 over shapes the export did not see.

    InputError above PARITY_TOLERANCE: the graph then computes something else.
    """
    import onnxruntime

    packed = is_packed(onnx.load(str(path), load_external_data=False).graph)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    config = encoder.model.config
    worst, scale = 0.0, 1.0
    for seed, (batch, length) in enumerate(((1, 5), (1, 40), (4, 33), (7, 64))):
        length = min(length, longest_input(config))
        feed = example_inputs(batch, length, config.vocab_size, seed)
        with torch.no_grad():
            expected = encoder(*(torch.from_numpy(feed[name]).long() for name in encoder.inputs)).numpy()
        scores = session.run([OUTPUT], without_padding(feed) if packed else chosen(feed, encoder.inputs))[0].reshape(
            expected.shape
        )
        worst = max(worst, float(np.abs(scores - expected).max()))
        scale = max(scale, float(np.abs(expected).max()))
    if not worst <= PARITY_TOLERANCE * scale:
        raise InputError(f"{path}: logits differ from PyTorch's by {worst:.3g} in fp32; do not use this export")
    return worst
