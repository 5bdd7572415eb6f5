"""Cast ONNX graph -> TensorRT engine through Polygraphy: strongly typed, a profile per bucket length, or one if packed.

Everything before the engine itself works without a GPU: ONNX Runtime runs the cast graph on the CPU through the same
gate, and plan, profiles and builder configuration are made. Polygraphy imports TensorRT only when the engine is built.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build.cast_graph import cast_to_fp16, quantise_qdq
from build.runners import Runner
from build.triton_config import ServingLimits
from ranking.encoder_inputs import INPUTS, OUTPUT, PACKED_INPUTS, Feed, chosen, without_padding
from ranking.errors import InputError

PRECISIONS = ("int8", "fp16", "fp32")
PLAN_FILE = "model.plan"
TYPICAL_LIST = 48  # documents; kernels are chosen for calls of this size


Shapes = dict[str, tuple[tuple[int, ...], ...]]  # input name -> (smallest, optimal, largest) shape


@dataclass(frozen=True)
class EnginePlan:
    """What the builder is asked for where pairs are padded to bucket lengths.

    lengths: bucket lengths in tokens, ascending; each has its own profile, and batches are padded to exactly that
    length. max_batch: largest batch of every profile. optimal_batch: the batch that kernels are chosen for.
    workspace_gib: scratch memory that tactics may use. inputs: of the graph.
    """

    lengths: tuple[int, ...]
    max_batch: int
    optimal_batch: int
    workspace_gib: float = 4.0
    inputs: tuple[str, ...] = INPUTS

    def shapes(self) -> list[Shapes]:
        """Of each profile. Triton would pick the profile whose optimal shape is nearest to the request's.

        Each profile takes a single length, so exactly one fits a padded request and there is nothing to choose.
        """
        return [
            dict.fromkeys(self.inputs, ((1, length), (self.optimal_batch, length), (self.max_batch, length)))
            for length in self.lengths
        ]

    def profile_for(self, length: int) -> tuple[int, int]:
        """(number, length) of the shortest profile that holds a batch of this length. InputError if none does."""
        for index, edge in enumerate(self.lengths):
            if edge >= length:
                return index, edge
        raise InputError(f"a batch of {length} tokens: the engine's longest profile holds {self.lengths[-1]}")

    def calls(self, feed: Feed) -> list[tuple[int, Feed]]:
        """A padded batch as calls of the engine: the profile's number, and inputs padded to its length."""
        rows, length = feed[INPUTS[0]].shape
        index, edge = self.profile_for(length)
        padded = {name: np.pad(feed[name], ((0, 0), (0, edge - length))) for name in self.inputs}
        starts = range(0, rows, self.max_batch)
        return [(index, {name: value[at : at + self.max_batch] for name, value in padded.items()}) for at in starts]


@dataclass(frozen=True)
class PackedPlan:
    """What the builder is asked for where pairs are packed: a single profile, up to some tokens and pairs in a call.

    longest: tokens of the longest pair; optimal_pairs: the list that kernels are chosen for; workspace_gib: scratch
    memory that tactics may use.
    """

    longest: int
    max_tokens: int
    max_pairs: int
    optimal_pairs: int
    workspace_gib: float = 4.0

    def shapes(self) -> list[Shapes]:
        """Of the only profile."""
        usual = min(self.max_tokens, self.optimal_pairs * self.longest // 2)
        tokens = ((1,), (usual,), (self.max_tokens,))
        pairs = ((1,), (min(self.max_pairs, self.optimal_pairs),), (self.max_pairs,))
        return [{**dict.fromkeys(PACKED_INPUTS[:-1], tokens), PACKED_INPUTS[-1]: pairs}]

    def calls(self, feed: Feed) -> list[tuple[int, Feed]]:
        """A padded batch as packed calls of the engine. InputError if a pair is longer than the engine's window."""
        rows, length = feed[INPUTS[0]].shape
        longest = int(feed["attention_mask"].sum(1).max())
        if longest > self.longest:
            raise InputError(f"a pair of {longest} tokens: the engine's window holds {self.longest}")
        size = max(1, min(self.max_pairs, self.max_tokens // length))
        parts = [{name: value[at : at + size] for name, value in feed.items()} for at in range(0, rows, size)]
        return [(0, without_padding(part)) for part in parts]


Plan = EnginePlan | PackedPlan


def plan_for(
    limits: ServingLimits, lengths: Sequence[int], workspace_gib: float, inputs: Sequence[str] = INPUTS
) -> Plan:
    """The plan of a build.

    limits: with the target's defaults in them; lengths: as bucket_lengths() gives them; inputs: of the padded graph.
    """
    usual = min(TYPICAL_LIST, limits.max_batch)
    if limits.graph == "packed":
        pairs, tokens = limits.max_batch * limits.merged_lists, limits.batch_tokens * limits.merged_lists
        return PackedPlan(lengths[-1], tokens, pairs, usual, workspace_gib)
    return EnginePlan(tuple(lengths), limits.max_batch, usual, workspace_gib, tuple(inputs))


def profiles(plan: Plan) -> list[Any]:
    """The plan's shapes as Polygraphy profiles."""
    from polygraphy.backend.trt import Profile

    found = []
    for shapes in plan.shapes():
        profile = Profile()
        for name, (smallest, optimal, largest) in shapes.items():
            profile.add(name, min=smallest, opt=optimal, max=largest)
        found.append(profile)
    return found


def make_graph(
    onnx_path: Path, folder: Path, precision: str, feeds: Sequence[Feed], half_softmax: bool = False
) -> tuple[Path, list[str]]:
    """The graph with the precision in it, and the nodes kept fp32 for their range. fp32 is the export itself.

    half_softmax: as cast_to_fp16() takes it.
    """
    if precision == "fp32":
        return onnx_path, []
    source = onnx_path
    if precision == "int8":
        source = folder / "quantised.onnx"
        quantise_qdq(onnx_path, source, feeds)
    target = folder / "cast.onnx"
    return target, cast_to_fp16(source, target, feeds[:4], half_softmax)


def cast_runner(path: str | Path) -> Runner:
    """The cast graph in ONNX Runtime on the CPU; its optimiser is off, because it would remove the casts under test."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    packed = PACKED_INPUTS[-1] in names

    def run(feed: Feed) -> NDArray[np.float32]:
        logits = session.run([OUTPUT], without_padding(feed) if packed else chosen(feed, names))[0]
        return logits.reshape(-1).astype(np.float32)

    return run


def is_available() -> bool:
    """Whether this machine can build an engine: TensorRT is installed."""
    return importlib.util.find_spec("tensorrt") is not None


def version() -> str:
    """The installed TensorRT's version, such as 11.1.0.106."""
    import tensorrt

    return tensorrt.__version__


def builder(onnx_path: str | Path, plan: Plan, timing_cache: str | Path) -> Any:
    """A Polygraphy loader that builds the engine's bytes when it is called; making it needs no TensorRT.

    No FP16 or INT8 builder flag is set: they are gone in TensorRT 11, and from 10 on the graph's types say it.
    timing_cache: read if present, and written: a second build of the same shapes takes seconds.
    """
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath

    cache = str(timing_cache)
    config = CreateConfig(
        profiles=profiles(plan),
        load_timing_cache=cache if Path(cache).exists() else None,
        builder_optimization_level=4,
        memory_pool_limits=_memory_limits(plan),
        profiling_verbosity=_detailed(),
    )
    network = NetworkFromOnnxPath(str(onnx_path), strongly_typed=True)
    return EngineBytesFromNetwork(network, config, save_timing_cache=cache)


def _memory_limits(plan: Plan) -> dict[Any, int] | None:
    if not is_available():
        return None
    import tensorrt  # only ever reached where it is installed

    return {tensorrt.MemoryPoolType.WORKSPACE: int(plan.workspace_gib * 2**30)}


def _detailed() -> Any:
    """The verbosity with which the engine inspector can say what became of a layer; it costs size alone."""
    if not is_available():
        return None  # Polygraphy's own choice, which is the same
    import tensorrt

    return tensorrt.ProfilingVerbosity.DETAILED


def engine_information(path: str | Path) -> str:
    """The engine inspector's JSON on all layers of a built engine; build/engine_inspector.py reads it."""
    import tensorrt
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes

    inspector = EngineFromBytes(BytesFromPath(str(path)))().create_engine_inspector()
    return inspector.get_engine_information(tensorrt.LayerInformationFormat.JSON)


def build_engine(onnx_path: str | Path, folder: str | Path, plan: Plan, timing_cache: str | Path) -> Path:
    """Build model.plan. InputError with TensorRT's reason if it refuses the graph."""
    from polygraphy.exception import PolygraphyException

    path = Path(folder) / PLAN_FILE
    Path(timing_cache).parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_bytes(bytes(builder(onnx_path, plan, timing_cache)()))
    except PolygraphyException as problem:
        raise InputError(f"TensorRT does not build {onnx_path}: {' '.join(str(problem).split())}") from problem
    return path


def engine_runner(path: str | Path, plan: Plan) -> Runner:
    """The engine on this machine's GPU, as a function of one padded batch."""
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    runner = TrtRunner(EngineFromBytes(BytesFromPath(str(path))))
    runner.activate()

    def run(feed: Feed) -> NDArray[np.float32]:
        parts = []
        for profile, inputs in plan.calls(feed):
            runner.set_profile(profile)
            logits = runner.infer({name: np.ascontiguousarray(value) for name, value in inputs.items()})[OUTPUT]
            parts.append(np.array(logits, np.float32).reshape(-1))  # a copy: the runner uses its buffer again
        return np.concatenate(parts)

    return run
