"""Did TensorRT fuse attention? Read from the JSON of its engine inspector, without TensorRT.

An engine whose attention is not fused gives the same scores, but writes every matrix of attention logits to memory and
reads it back. build/tensorrt_engine.py asks a built engine for get_engine_information(LayerInformationFormat.JSON).

Documented (TensorRT's developer guide, "Engine Inspector", and its guide from 10 to 11): an object whose `Layers` is a
list; where the engine was built with the profiling verbosity DETAILED, each layer is an object with `Name`,
`LayerType`, `Inputs`, `Outputs`, `TacticName` and `Metadata`, otherwise its name alone. Version 11 renamed fields
beside the layers and within inputs and outputs; none of those is read here.

Published by others who built engines with 8.6 to 10.15 (NVIDIA/TensorRT issues 3665 and 4397 among them): attention in
one kernel is a layer of type `kgen` whose name and tactic begin with `_gemm_mha_v2`, or `_gemv_mha_v1` for a single
query token. A softmax of its own is of type `SoftMax`, or a `kgen` layer with `MaxSubExpSum` in its name. A layer of
type `Myelin` (8.x) stands for a whole subgraph and tells nothing. `Metadata` names the ONNX nodes that a layer
computes, as `[ONNX Layer: NAME]`. In an engine of several profiles the names of all layers but the first profile's end
in ` [profile N]`.

Inferred, since TensorRT has never run here: that all this holds for version 11, and that a layer of type `Attention`,
or with `fmha` in its name, is fused attention too. What no layer speaks of counts as unknown, never as fused. Only
where not a single layer names a softmax of the graph, because the metadata are left out, are fused kernels counted
instead: each profile then needs as many as the graph has softmax nodes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from ranking.errors import InputError

FUSED_KERNEL = re.compile(r"_ge(mm|mv)_mha|fmha", re.IGNORECASE)
SOFTMAX_KERNEL = re.compile(r"MaxSubExpSum", re.IGNORECASE)
ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
PROFILE = re.compile(r" \[profile (\d+)\]$")
NAMED = 5  # layers that a message names; the manifest has all


@dataclass(frozen=True)
class AttentionReport:
    """What the inspector says of an engine's attention.

    layers: of the engine, over all profiles; softmaxes: of the graph; fused: names of the layers that compute
    attention in one kernel; unfused: names of those that compute a softmax, or a part of one, by themselves; unknown:
    softmax nodes of the graph of which no layer says either.
    """

    layers: int
    softmaxes: int
    fused: list[str]
    unfused: list[str]
    unknown: list[str]

    @property
    def all_fused(self) -> bool:
        """Whether every softmax of the graph was seen inside a fused kernel."""
        return not self.unfused and not self.unknown

    def as_json(self) -> dict[str, Any]:
        """The report as a version's manifest.json keeps it."""
        return asdict(self)

    def line(self) -> str:
        """The finding in one line, with the number of layers and the names of the first ones."""
        if self.all_fused:
            return f"attention is fused: {len(self.fused)} kernels for {self.softmaxes} softmax nodes of the graph"
        parts = []
        if self.unfused:
            parts.append(f"{len(self.unfused)} layers compute softmax outside a fused kernel: {_names(self.unfused)}")
        if self.unknown:
            parts.append(f"no layer says how {len(self.unknown)} softmax nodes are computed: {_names(self.unknown)}")
        found = f"{len(self.fused)} fused kernels for {self.softmaxes} softmax nodes"
        return f"attention is not known to be fused throughout ({found}): {'; '.join(parts)}"


def _names(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def softmax_nodes(graph: str | Path) -> list[str]:
    """Names of the softmax nodes of an ONNX file: a BERT has one a layer."""
    nodes = onnx.load(str(graph), load_external_data=False).graph.node
    return [node.name for node in nodes if node.op_type == "Softmax"]


def read_attention(information: str, softmaxes: Iterable[str]) -> AttentionReport:
    """What the engine inspector's JSON says of these softmax nodes of the graph.

    A layer that is a softmax by type or name always counts. One that only names a node in its metadata does (it may be
    a softmax's second half), unless a fused kernel of the same profile names that node too: then it moves the result.
    InputError if this is not the inspector's JSON of an engine that was built with verbosity DETAILED.
    """
    wanted, layers = list(softmaxes), _layers(information)
    fused, others = [], []  # (profile, name, softmax nodes that the layer names)
    softmax_layers = set()  # names of those that are one
    for layer in layers:
        name, kind = str(layer.get("Name", "")), str(layer.get("LayerType", "")).lower()
        words = f"{name} {layer.get('TacticName', '')}"
        nodes = set(ONNX_NODE.findall(str(layer.get("Metadata", "")))) & set(wanted)
        if FUSED_KERNEL.search(words) or kind == "attention":
            fused.append((_profile(name), name, nodes))
        elif kind != "myelin":  # which stands for a whole subgraph, and does not say how it is computed
            others.append((_profile(name), name, nodes))
        if kind == "softmax" or SOFTMAX_KERNEL.search(words):
            softmax_layers.add(name)
    in_kernels = {(profile, node) for profile, _, nodes in fused for node in nodes}
    unfused = [
        name
        for profile, name, nodes in others
        if name in softmax_layers or any((profile, node) not in in_kernels for node in nodes)
    ]
    seen = {node for _, _, nodes in (*fused, *others) for node in nodes}
    kernels = Counter(profile for profile, _, _ in fused)
    profiles = {_profile(str(layer.get("Name", ""))) for layer in layers}
    if seen.isdisjoint(wanted) and all(kernels[profile] >= len(wanted) for profile in profiles):
        seen |= set(wanted)
    unknown = [node for node in wanted if node not in seen]
    return AttentionReport(len(layers), len(wanted), [name for _, name, _ in fused], unfused, unknown)


def _profile(name: str) -> int:
    """Number of the profile that a layer belongs to."""
    found = PROFILE.search(name)
    return int(found[1]) if found else 0


def _layers(information: str) -> list[dict[str, Any]]:
    try:
        layers = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError) as problem:
        raise InputError(f"not the JSON of TensorRT's engine inspector: {information[:80]!r}") from problem
    if not isinstance(layers, list) or not layers:
        raise InputError("TensorRT's engine inspector names no layer: build the engine with verbosity DETAILED")
    if not all(isinstance(layer, dict) for layer in layers):
        raise InputError("TensorRT's engine inspector gives names alone: build the engine with verbosity DETAILED")
    return layers
