"""Latency of a batch on a CUDA GPU beside the paper's figures, for BERT-6, BERT-12 and a 7B-shaped teacher.

PyTorch and, for the BERTs, TensorRT.

    python benchmarks/serving/gpu.py --out docs/results/gpu.md

Weights are random: time does not depend on them. The paper (Ye et al., COLING 2025 industry) reports about 10 ms
for its 6-layer BERT, 20 ms for the 12-layer one and 100 ms for its 7B teacher, for 48 candidates on an A10.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from build import tensorrt_engine
from build.cast_graph import cast_to_fp16
from build.engine_encoder import PaddedEncoder
from build.engine_inspector import read_attention, softmax_nodes
from build.export_onnx import example_inputs, export
from build.runners import Runner
from build.tensorrt_engine import EnginePlan
from ranking.errors import InputError
from ranking.program import run

LOGGER = logging.getLogger(__name__)
PAPER_MS = {"BERT-6": 10, "BERT-12": 20, "teacher 7B": 100}
TEACHER_PARAMETERS = 7e9
A10_FLOPS = 125e12  # dense fp16 matrix rate of NVIDIA's data sheet
VOCABULARY = 30522


@dataclass
class Config:
    """Measure batch latency on a CUDA GPU.

    Args:
        batch: pairs in a batch
        lengths: tokens of every pair
        models: what to measure: BERT-6, BERT-12, "teacher 7B"
        repeats: timed batches; the median counts
        compile: also measure torch.compile
        out: also write the table to this file
    """

    batch: int = 48
    lengths: list[int] = field(default_factory=lambda: [64, 128])
    models: list[str] = field(default_factory=lambda: list(PAPER_MS))
    repeats: int = 50
    compile: bool = True
    out: Path | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.models) - set(PAPER_MS))
        if unknown:
            raise ValueError(f"models {unknown}: {', '.join(PAPER_MS)} are known")


def main(config: Config) -> None:
    """Measure every model with every engine at hand and print the table. InputError without a CUDA device."""
    if not torch.cuda.is_available():
        raise InputError("no CUDA device; this benchmark needs one (on a CPU: benchmarks/serving/systems_compared.py)")
    rows = []
    for name in tqdm(config.models, desc="models"):
        for engine, batch_of in engines(name, config):
            times = {length: median_ms(batch_of(length), config.repeats) for length in config.lengths}
            rows.append((name, engine, times))
        torch.cuda.empty_cache()
    table = report(config, rows)
    print(table)
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(table, encoding="utf-8")


def make_model(name: str) -> torch.nn.Module:
    """The architecture with random weights, on the GPU, in fp16 (a 7B teacher does not fit an A10 in fp32)."""
    if name.startswith("BERT"):
        config = BertConfig(num_hidden_layers=int(name.removeprefix("BERT-")))
        config.num_labels = 1
        return BertForSequenceClassification(config).eval()
    llama = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, pad_token_id=0
    )
    llama.num_labels = 1
    with torch.device("cuda"):
        torch.set_default_dtype(torch.float16)
        try:
            return LlamaForSequenceClassification(llama).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def engines(name: str, config: Config) -> Iterator[tuple[str, Callable[[int], Callable[[], object]]]]:
    """(what runs, length -> a function that runs one batch to its end) for every engine at hand."""
    model = make_model(name)
    for dtype in (torch.float16, torch.bfloat16):
        label = f"PyTorch {str(dtype).removeprefix('torch.')}"
        on_gpu = model.to("cuda", dtype)
        yield f"{label} eager", partial(torch_batch, on_gpu, config.batch)
        if config.compile:
            # not reduce-overhead alone: each length is compiled for its own shape
            compiled: Any = torch.compile(on_gpu, dynamic=False)
            yield f"{label} compiled", partial(torch_batch, compiled, config.batch)
            torch.compiler.reset()
    if name.startswith("BERT") and tensorrt_engine.is_available():
        with tempfile.TemporaryDirectory(prefix="benchmark-gpu-") as folder:
            runner, fused = tensorrt_runner(model.to("cpu", torch.float32), config, Path(folder))
            label = f"TensorRT fp16, attention {'fused' if fused else 'not known to be fused'}"
            yield label, lambda length: lambda: runner(example_inputs(config.batch, length, VOCABULARY))


def torch_batch(model: torch.nn.Module, batch: int, length: int) -> Callable[[], object]:
    """A function that runs one batch of random ids [batch, length] and waits for the GPU."""
    feed = {k: torch.from_numpy(v).long().cuda() for k, v in example_inputs(batch, length, VOCABULARY).items()}
    if isinstance(getattr(model, "_orig_mod", model), LlamaForSequenceClassification):
        feed.pop("token_type_ids")

    def run_once() -> None:
        with torch.inference_mode():
            model(**feed)
        torch.cuda.synchronize()

    return run_once


def tensorrt_runner(model: Any, config: Config, folder: Path) -> tuple[Runner, bool]:
    """The strongly typed fp16 engine, as build_student.py builds it, and whether its attention is all fused.

    Times include copies to and from the GPU.
    """
    exported = export(PaddedEncoder(model).eval(), folder / "model.onnx")
    feeds = [example_inputs(8, length, VOCABULARY) for length in config.lengths]
    cast_to_fp16(exported, folder / "cast.onnx", feeds)
    plan = EnginePlan(tuple(sorted(config.lengths)), config.batch, config.batch)
    engine = tensorrt_engine.build_engine(folder / "cast.onnx", folder, plan, folder / "timing.cache")
    attention = read_attention(tensorrt_engine.engine_information(engine), softmax_nodes(folder / "cast.onnx"))
    LOGGER.info("%s", attention.line())
    return tensorrt_engine.engine_runner(engine, plan), attention.all_fused


def median_ms(batch: Callable[[], object], repeats: int) -> float:
    """Median wall time of a batch in ms, after five that do not count."""
    for _ in range(5):  # compilation, kernel choice, clocks
        batch()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        batch()
        times.append(time.perf_counter() - start)
    return float(np.median(times) * 1e3)


def report(config: Config, rows: list[tuple[str, str, dict[int, float]]]) -> str:
    """A Markdown table. rows: model, engine, length in tokens -> ms."""
    heads = "".join(f" {length} tokens, ms |" for length in config.lengths)
    lines = [
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, batch {config.batch}, "
        f"median of {config.repeats}",
        "",
        f"| model | engine |{heads} the paper (A10) |",
        "|---|---|" + "--:|" * (len(config.lengths) + 1),
    ]
    for name, engine, times in rows:
        cells = "".join(f" {times[length]:.2f} |" for length in config.lengths)
        lines.append(f"| {name} | {engine} |{cells} ~{PAPER_MS[name]} |")
    if "teacher 7B" in config.models:
        lines += ["", teacher_footnote(config.batch, min(config.lengths))]
    return "\n".join(lines) + "\n"


def teacher_footnote(batch: int, length: int) -> str:
    """Why the paper's 100 ms of its 7B teacher do not stand beside a batch of this size: an A10 cannot be that fast."""
    floor_ms = 2 * TEACHER_PARAMETERS * batch * length / A10_FLOPS * 1e3
    return (
        f"The paper does not say what the {PAPER_MS['teacher 7B']} ms of the teacher cover. A batch of {batch} pairs "
        f"at {length} tokens takes an A10 {floor_ms:.0f} ms or more (2 FLOP per parameter and token, at "
        f"{A10_FLOPS / 1e12:.0f} TFLOP/s of matrix products), so that figure cannot be of such a batch."
    )


if __name__ == "__main__":
    run(main, Config, example="python benchmarks/serving/gpu.py --out docs/results/gpu.md")
