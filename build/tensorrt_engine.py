"""Cast ONNX graph -> TensorRT engine through Polygraphy: strongly typed, one optimisation profile per bucket length.

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
from ranking.encoder_inputs import INPUTS, OUTPUT, Feed
from ranking.errors import InputError

PRECISIONS = ("int8", "fp16", "fp32")
PLAN_FILE = "model.plan"
CONTAINER = "nvcr.io/nvidia/tritonserver:26.07-py3"


@dataclass(frozen=True)
class EnginePlan:
    """What the builder is asked for.

    lengths: bucket lengths in tokens, ascending; each has its own profile, and batches are padded to exactly that
    length. max_batch: largest batch of every profile. optimal_batch: the batch that kernels are chosen for.
    workspace_gib: scratch memory that tactics may use.
    """

    lengths: tuple[int, ...]
    max_batch: int
    optimal_batch: int
    workspace_gib: float = 4.0

    def shapes(self) -> list[dict[str, tuple[tuple[int, int], ...]]]:
        """Per profile: input name -> (smallest, optimal, largest) shape.

        Triton would pick the profile whose optimal shape is nearest to the request's. Each profile takes a single
        length, so exactly one fits a padded request and there is nothing to choose.
        """
        return [
            dict.fromkeys(INPUTS, ((1, length), (self.optimal_batch, length), (self.max_batch, length)))
            for length in self.lengths
        ]

    def profile_for(self, length: int) -> tuple[int, int]:
        """(number, length) of the shortest profile that holds a batch of this length. InputError if none does."""
        for index, edge in enumerate(self.lengths):
            if edge >= length:
                return index, edge
        raise InputError(f"a batch of {length} tokens: the engine's longest profile holds {self.lengths[-1]}")

    def profiles(self) -> list[Any]:
        """The same as Polygraphy profiles."""
        from polygraphy.backend.trt import Profile

        found = []
        for shapes in self.shapes():
            profile = Profile()
            for name, (smallest, optimal, largest) in shapes.items():
                profile.add(name, min=smallest, opt=optimal, max=largest)
            found.append(profile)
        return found


def make_graph(onnx_path: Path, folder: Path, precision: str, feeds: Sequence[Feed]) -> tuple[Path, list[str]]:
    """The graph with the precision in it, and the nodes kept fp32 for their range. fp32 is the export itself."""
    if precision == "fp32":
        return onnx_path, []
    source = onnx_path
    if precision == "int8":
        source = folder / "quantised.onnx"
        quantise_qdq(onnx_path, source, feeds)
    target = folder / "cast.onnx"
    return target, cast_to_fp16(source, target, feeds[:4])


def cast_runner(path: str | Path) -> Runner:
    """The cast graph in ONNX Runtime on the CPU; its optimiser is off, because it would remove the casts under test."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run([OUTPUT], feed)[0][:, 0].astype(np.float32)


def is_available() -> bool:
    """Whether this machine can build an engine: TensorRT is installed."""
    return importlib.util.find_spec("tensorrt") is not None


def builder(onnx_path: str | Path, plan: EnginePlan, timing_cache: str | Path) -> Any:
    """A Polygraphy loader that builds the engine's bytes when it is called; making it needs no TensorRT.

    No FP16 or INT8 builder flag is set: they are gone in TensorRT 11, and from 10 on the graph's types say it.
    timing_cache: read if present, and written: a second build of the same shapes takes seconds.
    """
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath

    cache = str(timing_cache)
    config = CreateConfig(
        profiles=plan.profiles(),
        load_timing_cache=cache if Path(cache).exists() else None,
        builder_optimization_level=4,
        memory_pool_limits=_memory_limits(plan),
    )
    network = NetworkFromOnnxPath(str(onnx_path), strongly_typed=True)
    return EngineBytesFromNetwork(network, config, save_timing_cache=cache)


def _memory_limits(plan: EnginePlan) -> dict[Any, int] | None:
    if not is_available():
        return None
    import tensorrt  # only ever reached where it is installed

    return {tensorrt.MemoryPoolType.WORKSPACE: int(plan.workspace_gib * 2**30)}


def build_engine(onnx_path: str | Path, folder: str | Path, plan: EnginePlan, timing_cache: str | Path) -> Path:
    """Build model.plan. InputError with TensorRT's reason if it refuses the graph."""
    from polygraphy.exception import PolygraphyException

    path = Path(folder) / PLAN_FILE
    Path(timing_cache).parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_bytes(bytes(builder(onnx_path, plan, timing_cache)()))
    except PolygraphyException as problem:
        raise InputError(f"TensorRT does not build {onnx_path}: {' '.join(str(problem).split())}") from problem
    return path


def engine_runner(path: str | Path, plan: EnginePlan) -> Runner:
    """The engine on this machine's GPU; a batch is padded to the smallest bucket length that holds it."""
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    runner = TrtRunner(EngineFromBytes(BytesFromPath(str(path))))
    runner.activate()

    def run(feed: Feed) -> NDArray[np.float32]:
        rows, length = feed[INPUTS[0]].shape
        index, edge = plan.profile_for(length)
        runner.set_profile(index)
        padded = {name: np.pad(value, ((0, 0), (0, edge - length))) for name, value in feed.items()}
        parts = [
            runner.infer({name: np.ascontiguousarray(v[at : at + plan.max_batch]) for name, v in padded.items()})
            for at in range(0, rows, plan.max_batch)
        ]
        return np.concatenate([part[OUTPUT][:, 0] for part in parts]).astype(np.float32)

    return run
