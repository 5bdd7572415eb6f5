"""`backend: "openvino"` for servers that lack the official OpenVINO backend, with the same model config.

Reads the version folder's default_model_filename, else model.xml, else model.onnx, and the official backend's
parameters: PERFORMANCE_HINT, INFERENCE_NUM_THREADS, COMPILATION_NUM_THREADS, NUM_STREAMS, HINT_BF16, RESHAPE_IO_LAYERS,
CPU_EXTENSION_PATH. ENABLE_BATCH_PADDING and SKIP_OV_DYNAMIC_BATCHSIZE have no effect: any batch size runs as it is. One
more is read, INFERENCE_PRECISION_HINT, because the official names can ask for bf16 but not for fp32.

Differences: every instance is a process with its own copy of the compiled model, so raise NUM_STREAMS before the
instance count; with max_batch_size > 0, requests that Triton's batcher hands over together and whose shapes agree run
as one batch.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import openvino as ov
import triton_python_backend_utils as pb_utils

PASSED_ON = (
    "PERFORMANCE_HINT",
    "INFERENCE_NUM_THREADS",
    "COMPILATION_NUM_THREADS",
    "NUM_STREAMS",
    "INFERENCE_PRECISION_HINT",
)


class TritonPythonModel:
    """One instance with one compiled model and as many infer requests as it has streams."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read and compile the version's model. ValueError names what config.pbtxt and model do not agree on."""
        config = json.loads(args["model_config"])
        parameters = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        model = read_model(folder, config, parameters)
        self.batched = config["max_batch_size"] > 0
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [
            (entry["name"], pb_utils.triton_string_to_numpy(entry["data_type"])) for entry in config["output"]
        ]
        check_names(model, self.inputs, [name for name, _ in self.outputs])
        self.compiled = ov.Core().compile_model(model, "CPU", properties(parameters))
        jobs = self.compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        # not an AsyncInferQueue: after one failed request it reports that failure for later ones too
        self.jobs = [self.compiled.create_infer_request() for _ in range(jobs)]

    def execute(self, requests: list) -> list:
        """One response per request, in order; an error of OpenVINO goes to the requests of its batch alone."""
        feeds = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            for request in requests
        ]
        groups = self._merge(feeds)
        responses: list = [None] * len(requests)
        for at in range(0, len(groups), len(self.jobs)):
            running = [self._start(job, members, feeds) for job, members in zip(self.jobs, groups[at:])]
            for members, job in zip(groups[at:], running):
                for i, response in zip(members, self._responses(job, members, feeds)):
                    responses[i] = response
        return responses

    def _start(self, job: ov.InferRequest, members: list[int], feeds: list[dict]) -> ov.InferRequest | str:
        """Start one batch; a string is OpenVINO's reason for refusing it."""
        feed = feeds[members[0]]
        if len(members) > 1:
            feed = {name: np.concatenate([feeds[i][name] for i in members]) for name in self.inputs}
        try:
            job.start_async(feed, share_inputs=True)
        except RuntimeError as problem:
            return str(problem)
        return job

    def _merge(self, feeds: list[dict[str, np.ndarray]]) -> list[list[int]]:
        """Request numbers that run as one batch: all of one shape and type if the model batches, else each alone."""
        if not self.batched:
            return [[i] for i in range(len(feeds))]
        groups: dict[tuple, list[int]] = {}
        for i, feed in enumerate(feeds):
            groups.setdefault(tuple((v.shape[1:], v.dtype.str) for v in feed.values()), []).append(i)
        return list(groups.values())

    def _responses(self, job: ov.InferRequest | str, members: list[int], feeds: list[dict]) -> list:
        try:
            if isinstance(job, str):
                raise RuntimeError(job)
            job.wait()
        except RuntimeError as problem:  # a shape that the network refuses: the error of these callers alone
            error = pb_utils.TritonError(f"OpenVINO: {' '.join(str(problem).split())}")
            return [pb_utils.InferenceResponse(error=error) for _ in members]
        # copied: the memory is the infer request's, which may start another batch at once
        values = [np.array(job.get_tensor(name).data, dtype=kind, copy=True) for name, kind in self.outputs]
        if len(members) == 1:
            return [pb_utils.InferenceResponse([pb_utils.Tensor(n, v) for (n, _), v in zip(self.outputs, values)])]
        ends = np.cumsum([len(feeds[i][self.inputs[0]]) for i in members])
        parts = zip(*(np.split(value, ends[:-1]) for value in values))
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(n, np.ascontiguousarray(v)) for (n, _), v in zip(self.outputs, p)]
            )
            for p in parts
        ]


def read_model(folder: Path, config: dict, parameters: dict[str, str]) -> ov.Model:
    """The version's model, reshaped to the config's dims where RESHAPE_IO_LAYERS asks for it."""
    core = ov.Core()
    if parameters.get("CPU_EXTENSION_PATH"):
        core.add_extension(parameters["CPU_EXTENSION_PATH"])
    names = [config["default_model_filename"]] if config.get("default_model_filename") else ["model.xml", "model.onnx"]
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise FileNotFoundError(f"{folder}: no {' or '.join(names)}")
    model = core.read_model(str(path))
    if parameters.get("RESHAPE_IO_LAYERS", "").lower() == "yes":
        batch = ["-1"] if config["max_batch_size"] > 0 else []
        model.reshape(
            {entry["name"]: ov.PartialShape([int(d) for d in (*batch, *entry["dims"])]) for entry in config["input"]}
        )
    return model


def properties(parameters: dict[str, str]) -> dict[str, str]:
    """OpenVINO properties from config.pbtxt parameters. ValueError names a value the official backend would refuse."""
    found = {key: parameters[key] for key in PASSED_ON if parameters.get(key)}
    # pinned threads start at the first core: two instances or models of one thread would share it and leave the others
    # idle
    found["ENABLE_CPU_PINNING"] = "NO"
    for key in ("INFERENCE_NUM_THREADS", "COMPILATION_NUM_THREADS"):
        if key in found and not found[key].isdecimal():
            raise ValueError(f"parameter {key} is {found[key]!r}: a number is needed")
    if "NUM_STREAMS" in found:
        found["NUM_STREAMS"] = found["NUM_STREAMS"].upper()
    if parameters.get("HINT_BF16", "").lower() == "yes":
        found["INFERENCE_PRECISION_HINT"] = "bf16"
    return found


def check_names(model: ov.Model, inputs: list[str], outputs: list[str]) -> None:
    """ValueError unless config and model have the same inputs, and the model has the config's outputs."""
    has = {name for port in model.inputs for name in port.get_names()}
    unknown = [name for name in inputs if name not in has] or [
        name for name in outputs if not any(name in port.get_names() for port in model.outputs)
    ]
    if unknown or len(inputs) != len(model.inputs):
        offered = ", ".join(port.get_any_name() for port in (*model.inputs, *model.outputs))
        raise ValueError(f"config.pbtxt asks for {', '.join((*inputs, *outputs))}; the model has {offered}")
