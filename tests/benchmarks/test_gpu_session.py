"""A rehearsal of the GPU session: every step that needs no vLLM at toy size, and what happens to steps that fail."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_session, gpu_steps
from benchmarks.gpu_session import STEPS, Config, Step, main
from benchmarks.serving.gpu import teacher_footnote
from build import tensorrt_engine

ROOT = Path(__file__).parents[2]


def numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [number for each in value.values() for number in numbers(each)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.skipif(gpu_steps.has_gpu(), reason="a rehearsal on the CPU")
@pytest.mark.parametrize("name", [name for name, step in STEPS.items() if step.needs == "torch"])
def test_every_step_runs_at_toy_size_and_gives_plain_json(name):
    # in a process of its own, as a session runs it: loader workers must not share the test run's signals and registers
    work = f"import json; from benchmarks.gpu_session import STEPS; print(json.dumps(STEPS[{name!r}].work(True)))"
    done = subprocess.run([sys.executable, "-c", work], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    if name == "finetune_fsdp":
        result = json.loads(result["line"])
    found = numbers(result)
    assert found and all(math.isfinite(number) for number in found)
    if name == "layouts":
        assert max(result["6 documents"][layout]["error"] for layout in ("padded", "packed")) < 1e-4


@pytest.mark.skipif(tensorrt_engine.is_available(), reason="TensorRT is installed: the steps themselves run")
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_half_softmax"])
def test_the_tensorrt_steps_time_an_engine_and_count_its_fused_attention(name, monkeypatch):
    """Up to the engine everything is real; the cast graph in ONNX Runtime stands for it."""
    layers = [{"Name": f"_gemm_mha_v2_myl0_{n}", "LayerType": "kgen", "Metadata": ""} for n in range(2)]
    monkeypatch.setattr(tensorrt_engine, "build_engine", lambda graph, *_: graph)
    monkeypatch.setattr(tensorrt_engine, "engine_runner", lambda path, plan: tensorrt_engine.cast_runner(path))
    monkeypatch.setattr(tensorrt_engine, "engine_information", lambda path: json.dumps({"Layers": layers}))
    found = json.loads(json.dumps(STEPS[name].work(True)))
    assert min(found["BERT-6, 48 x 16"].values()) > 0
    counts = found["BERT-6, attention"]
    assert (counts["softmax nodes"], counts["fused kernels"], counts["layers of unfused softmax"]) == (2, 2, 0)
    assert counts["finding"].startswith("attention is fused")


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path, monkeypatch, capsys):
    steps = {name: Step(gpu_steps.device, 1) for name in ("done", "failing", "absent")}
    steps["absent"] = Step(gpu_steps.device, 1, needs="no_such_module")
    steps["long"] = Step(gpu_steps.device, 60)
    monkeypatch.setattr(gpu_session, "STEPS", steps)
    answers = {"done": '{"ms": 1}', "failing": ""}
    asked = []

    def answer(command, **_):
        name = command[command.index("--only") + 1]
        asked.append(name)
        return type("Done", (), {"returncode": not answers[name], "stdout": answers[name], "stderr": "it broke"})

    monkeypatch.setattr(gpu_session.subprocess, "run", answer)
    main(Config(tmp_path, tiny=True))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["done"]["result"] == {"ms": 1} and results["failing"]["failed"] == "it broke"
    assert results["absent"]["failed"] == "no_such_module is not installed"
    assert "were left, the step may take 3600" in results["long"]["failed"]
    answers["failing"] = '{"ms": 2}'
    main(Config(tmp_path, tiny=True))
    assert asked == ["done", "failing", "failing"]
    assert json.loads((tmp_path / "results.json").read_text())["failing"]["result"] == {"ms": 2}


def test_an_unknown_step_is_refused():
    with pytest.raises(ValueError, match="steps dance"):
        Config("out", steps=["dance"])


def test_the_papers_teacher_latency_is_said_to_be_of_no_such_batch():
    """An A10 takes 344 ms at least for 48 pairs of 64 tokens through 7B parameters; the paper's table says 100."""
    note = teacher_footnote(batch=48, length=64)
    assert "takes an A10 344 ms or more" in note and "the 100 ms of the teacher" in note
