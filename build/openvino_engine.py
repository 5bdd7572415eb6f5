"""ONNX -> OpenVINO IR for the CPU: fp32, bf16 (the same IR with a precision hint) or INT8 (NNCF, calibrated).

INT8 in other ways: build/group_quantisation.py, build/mixed_precision.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from build.runners import Runner, batches, openvino_core, openvino_runner, pad_to_longest
from ranking.encoder_inputs import Feed, chosen
from ranking.text import EncodedPair

PRECISIONS = ("int8", "int8_groups", "int8_mixed", "bf16", "fp32")
IN_FP32 = ("int8_groups", "fp32")  # what is not INT8 in them computes in fp32 on every CPU
# what NNCF quantises besides matrix products; left alone where only some of those are to be INT8
OTHER_OPERATIONS = ("Add", "Subtract", "Multiply", "Divide", "Gather", "MVN", "ReduceMean", "Gelu", "Tanh")
MODEL_FILE = "model.xml"


def cpu_precisions() -> list[str]:
    """The precisions worth building on this CPU. bf16 only where the CPU computes in it; elsewhere it is emulated."""
    capabilities = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ["int8", "bf16", "fp32"] if "BF16" in capabilities else ["int8", "fp32"]


def multiplies_int8() -> bool:
    """Whether the CPU has instructions for sums of INT8 products (VNNI); True where nothing says which it has.

    Without them OpenVINO computes INT8 in groups in fp32.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system
        return True
    known = {word for line in lines if line.startswith("flags") for word in line.split()}
    return not known or bool(known & {"avx512_vnni", "avx_vnni", "amx_int8"})


def settings(precision: str, threads: int = 0) -> dict[str, str | int]:
    """OpenVINO properties for in-process use, equal in effect to triton_parameters(). threads 0: all cores."""
    properties: dict[str, str | int] = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision not in IN_FP32 and "bf16" in cpu_precisions() else "f32",
        "NUM_STREAMS": 1,
    }
    if threads:
        properties["INFERENCE_NUM_THREADS"] = threads
    return properties


def runner(ir: str | Path, precision: str, threads: int = 0) -> Runner:
    """The IR compiled for this process, as the served model will run."""
    return openvino_runner(ir, settings(precision, threads))


def triton_parameters(precision: str, threads: int = 0, streams: int = 1) -> dict[str, str]:
    """config.pbtxt parameters under the official openvino_backend's names.

    That backend can only switch bf16 on (HINT_BF16); to keep a CPU that has AMX from using it for an fp32 model,
    serving/backends/openvino also reads INFERENCE_PRECISION_HINT, which the official backend ignores.
    """
    parameters = {"NUM_STREAMS": str(streams), "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        parameters["INFERENCE_NUM_THREADS"] = str(threads)
    if settings(precision)["INFERENCE_PRECISION_HINT"] == "bf16":
        parameters["HINT_BF16"] = "YES"
    else:
        parameters["INFERENCE_PRECISION_HINT"] = "f32"
    return parameters


def build_ir(
    onnx_path: str | Path,
    folder: str | Path,
    precision: str,
    positions: int,
    calibration: Sequence[Feed] = (),
    unquantised: Sequence[str] | None = None,
) -> Path:
    """Write model.xml and model.bin. int8 needs calibration batches. Weights stay fp32 for fp32 and bf16.

    unquantised: for int8, matrix products by name that stay as they are, and with them everything that is none; None
    leaves the choice to NNCF.
    """
    import openvino

    model, names = read_network(onnx_path, positions)
    if precision == "int8":
        model = _quantise(model, [chosen(feed, names) for feed in calibration], unquantised)
    path = Path(folder) / MODEL_FILE
    openvino.save_model(model, str(path), compress_to_fp16=False)
    return path


def read_network(onnx_path: str | Path, positions: int):
    """The ONNX file as an OpenVINO model, and the names of its inputs.

    positions: the network's longest input. It bounds the length, so that a longer input is refused before any layer
    runs: once a layer has failed, OpenVINO 2026.4 goes on failing for the next request of a known shape too.
    """
    import openvino

    model = openvino_core().read_model(str(onnx_path))
    names = [port.get_any_name() for port in model.inputs]
    model.reshape({name: openvino.PartialShape([-1, openvino.Dimension(1, positions)]) for name in names})
    return model, names


def _quantise(model, calibration: Sequence[Feed], unquantised: Sequence[str] | None):
    import nncf

    ignored = None
    if unquantised is not None:
        # validate: not every network has an operation of each type
        ignored = nncf.IgnoredScope(names=list(unquantised), types=list(OTHER_OPERATIONS), validate=False)

    nncf_log = logging.getLogger("nncf")
    level, nncf_log.level = nncf_log.level, logging.ERROR
    try:
        # model_type TRANSFORMER keeps the attention's sensitive parts out of INT8 (NNCF's own pattern list)
        return nncf.quantize(
            model,
            nncf.Dataset(list(calibration)),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calibration),
            ignored_scope=ignored,
        )
    finally:
        nncf_log.level = level


def calibration_feeds(pairs: Sequence[EncodedPair], pad_id: int, batch: int = 8) -> list[Feed]:
    """Calibration batches: real candidates, padded as in serving."""
    tokens = batch * max(len(pair.ids) for pair in pairs)
    return [pad_to_longest([pairs[row] for row in rows], pad_id) for rows in batches(pairs, tokens)]


def pairs_per_second(runner: Runner, pairs: Sequence[EncodedPair], pad_id: int, seconds: float = 2.0) -> float:
    """Speed on real pairs sorted by length: the best pass within `seconds`, after a warm-up pass over the shapes."""
    feeds = [pad_to_longest([pairs[row] for row in rows], pad_id) for rows in batches(pairs)]
    for feed in feeds:
        runner(feed)
    best, deadline = np.inf, time.perf_counter() + seconds
    while best == np.inf or time.perf_counter() < deadline:
        start = time.perf_counter()
        for feed in feeds:
            runner(feed)
        best = min(best, time.perf_counter() - start)
    return len(pairs) / best
