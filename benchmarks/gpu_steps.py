"""The measurements of benchmarks/gpu_session.py: functions of "tiny or not" that return plain JSON."""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    TrainerCallback,
)

from build import tensorrt_engine
from build.cast_graph import cast_to_fp16
from build.engine_encoder import PackedEncoder, PaddedEncoder
from build.engine_inspector import read_attention, softmax_nodes
from build.export_onnx import export
from build.tensorrt_engine import EnginePlan
from ranking.encoder_inputs import INPUTS, pack, pad
from ranking.text import EncodedPair
from training.teacher.score_head import install_pooling
from training.trainer.group_batches import RankingGroups
from training.trainer.losses import hinge, margin_mse
from training.trainer.ranking_trainer import RankingTrainer
from training.trainer.token_store import TokenStore
from training.trainer.training_settings import TrainingSettings

WARM_UP, REPEATS = 5, 30


def has_gpu() -> bool:
    """Whether PyTorch has a CUDA device."""
    return torch.cuda.is_available()


def where() -> torch.device:
    """The GPU, or the CPU of a rehearsal."""
    return torch.device("cuda" if has_gpu() else "cpu")


def half() -> torch.dtype:
    """fp16 on a GPU; a CPU computes it too slowly for a rehearsal."""
    return torch.float16 if has_gpu() else torch.float32


def median_ms(work: Callable[[], object], tiny: bool) -> float:
    """Median wall time in ms, the device waited for, after some runs that do not count."""
    times = []
    for _ in range(2 if tiny else WARM_UP + REPEATS):
        started = time.perf_counter()
        work()
        if has_gpu():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return round(float(np.median(times[1 if tiny else WARM_UP :])) * 1e3, 3)


def device(tiny: bool) -> dict[str, Any]:
    """Names and versions, the measured rate of a large bf16 matrix product, and that of a copy."""
    found: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    if has_gpu():
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
        found["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    found["bf16 TFLOP/s"] = matrix_rate(tiny) / 1e12
    source = torch.empty(1 << (20 if tiny else 30), dtype=torch.uint8, device=where())
    target = torch.empty_like(source)
    found["copy GB/s, read and written"] = 2 * source.numel() / (median_ms(lambda: target.copy_(source), tiny) * 1e6)
    return found


def matrix_rate(tiny: bool) -> float:
    """FLOP a second of a square bf16 product."""
    side = 128 if tiny else 8192
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=where()) for _ in range(2))
    return 2 * side**3 / (median_ms(lambda: left @ right, tiny) / 1e3)


def bert(layers: int, tiny: bool) -> BertForSequenceClassification:
    """A BERT of base width with random weights, in evaluation mode."""
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2} if tiny else {}
    config = BertConfig(num_hidden_layers=min(layers, 2) if tiny else layers, **shape)
    config.num_labels = 1
    return BertForSequenceClassification(config).eval()


def random_pairs(lengths: np.ndarray, seed: int = 0) -> list[EncodedPair]:
    """Pairs of random tokens of these lengths, a third of each the query."""
    rng = np.random.default_rng(seed)
    return [EncodedPair(rng.integers(5, 30_000, n).tolist(), int(n) // 3) for n in lengths]


def bert_latency(tiny: bool) -> dict[str, Any]:
    """BERT-6 and BERT-12, 48 pairs of 64 and 128 tokens: ms of each way to run it, and the floor of this device."""
    rate = matrix_rate(tiny)
    found = {}
    for layers in (6, 12):
        for tokens in (16,) if tiny else (64, 128):
            model = PaddedEncoder(bert(layers, tiny)).eval().to(where(), half())
            encoder = sum(p.numel() for p in model.model.bert.encoder.parameters())
            feed = as_tensors(pad(random_pairs(np.full(48, tokens)), tokens, 0))
            times = ways_to_run(model, tuple(feed[name] for name in INPUTS), tiny)
            floor = 2 * encoder * 48 * tokens / rate * 1e3
            found[f"BERT-{layers}, 48 x {tokens}"] = {"floor ms": round(floor, 4), **times}
    return found


def ways_to_run(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], tiny: bool) -> dict[str, float]:
    """ms eager, compiled, and as a CUDA graph; the last two on a GPU alone."""
    with torch.inference_mode():
        times = {"eager ms": median_ms(lambda: model(*inputs), tiny)}
        if has_gpu():
            compiled = torch.compile(model, dynamic=False)
            times["compiled ms"] = median_ms(lambda: compiled(*inputs), tiny)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(*inputs)
            times["CUDA graph ms"] = median_ms(graph.replay, tiny)
    return times


def tensorrt_latency(tiny: bool, half_softmax: bool = False) -> dict[str, Any]:
    """BERT-6 and BERT-12 as TensorRT engines in fp16, 48 pairs of 64 and 128 tokens.

    ms with the copies of ids and logits, the floor of this device, and how many attentions the engine inspector finds
    fused. half_softmax: softmax is fp16 too; otherwise it is fp32, as a build leaves it.
    """
    rate = matrix_rate(tiny)
    found: dict[str, Any] = {}
    lengths = (16,) if tiny else (64, 128)
    feeds = {tokens: pad(random_pairs(np.full(48, tokens)), tokens, 0) for tokens in lengths}
    plan = EnginePlan(lengths, max_batch=48, optimal_batch=48)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for layers in (6,) if tiny else (6, 12):
            model = bert(layers, tiny)
            exported = export(PaddedEncoder(model).eval(), folder / "model.onnx")
            cast_to_fp16(exported, folder / "cast.onnx", list(feeds.values()), half_softmax)
            engine = tensorrt_engine.build_engine(folder / "cast.onnx", folder, plan, folder / "timing.cache")
            information = tensorrt_engine.engine_information(engine)
            attention = read_attention(information, softmax_nodes(folder / "cast.onnx"))
            run = tensorrt_engine.engine_runner(engine, plan)
            encoder = sum(p.numel() for p in model.bert.encoder.parameters())
            for tokens, feed in feeds.items():
                floor = 2 * encoder * 48 * tokens / rate * 1e3
                times = {"floor ms": round(floor, 4), "TensorRT ms": median_ms(partial(run, feed), tiny)}
                found[f"BERT-{layers}, 48 x {tokens}"] = times
            found[f"BERT-{layers}, attention"] = {
                "softmax nodes": attention.softmaxes, "fused kernels": len(attention.fused),
                "layers of unfused softmax": len(attention.unfused), "finding": attention.line(),
            }  # fmt: skip
    return found


def as_tensors(feed: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Inputs as int64 tensors on the device."""
    return {name: torch.from_numpy(values).long().to(where()) for name, values in feed.items()}


def student_layouts(tiny: bool) -> dict[str, Any]:
    """A BERT-6 in fp16 on lists of uneven pairs: padded to the longest against packed, and the largest errors."""
    found = {}
    model = bert(6, tiny)
    longest = 32 if tiny else 160
    for documents in (6,) if tiny else (24, 48, 96):
        rng = np.random.default_rng(documents)
        # the lengths of MSRD pairs: a median of 139 tokens, the limit at 200, few short ones
        lengths = np.clip(rng.normal(0.75, 0.25, documents) * longest, 4, longest).astype(int)
        pairs = random_pairs(lengths)
        feeds = {
            "padded": (PaddedEncoder(model), as_tensors(pad(pairs, longest, 0))),
            "packed": (PackedEncoder(model, longest), as_tensors(pack(pairs))),
        }
        row: dict[str, Any] = {"tokens over padded": round(float(lengths.sum() / (documents * longest)), 3)}
        reference = None
        for layout, (encoder, feed) in feeds.items():
            inputs = tuple(feed.values())
            exact = encoder.eval().to(where(), torch.float32)
            with torch.inference_mode():
                expected = exact(*inputs).reshape(-1)
            reference = expected if reference is None else reference
            fast = encoder.to(where(), half())
            row[layout] = ways_to_run(fast, inputs, tiny)
            with torch.inference_mode():
                row[layout]["error"] = float((fast(*inputs).reshape(-1).float() - reference).abs().max())
        found[f"{documents} documents"] = row
    return found


def teacher_latency(tiny: bool) -> dict[str, Any]:
    """A 7B-shaped teacher in bf16, 48 pairs of 64 and 128 tokens, and the floor of this device."""
    shape: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    if tiny:
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**shape, pad_token_id=0)
    config.num_labels = 1
    with torch.device(where()):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16).eval()
    rate, found = matrix_rate(tiny), {}
    layers = sum(p.numel() for p in model.model.layers.parameters())
    for tokens in (16,) if tiny else (64, 128):
        ids = torch.randint(3, config.vocab_size, (48, tokens), device=where())
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            milliseconds = median_ms(partial(model, input_ids=ids, attention_mask=mask), tiny)
        floor = 2 * layers * ids.numel() / rate * 1e3
        found[f"48 x {tokens}"] = {"eager ms": milliseconds, "floor ms": round(floor, 3)}
    return found


class StepTimes(TrainerCallback):
    """Wall time at the end of each optimiser step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **_):
        """Note the time once the device has finished the step."""
        if has_gpu():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def train(model: PreTrainedModel, loss: Any, tokens: int, tiny: bool, **settings: Any) -> dict[str, float]:
    """Run some optimiser steps on random groups: tokens and pairs a second, MFU, peak memory, finite loss."""
    steps, group = (3, 4) if tiny else (60, 8)
    length = 16 if tiny else 128
    queries = steps * max(1, tokens // (group * length))
    pairs = random_pairs(np.full(queries * group, length))
    vocabulary = model.config.vocab_size
    pairs = [EncodedPair([token % vocabulary for token in pair.ids], pair.document_start) for pair in pairs]
    grades = np.tile(np.arange(group, dtype=np.float32) % 4, queries)
    starts = np.arange(queries + 1) * group
    groups = RankingGroups(TokenStore.of_pairs(pairs), grades, starts, [str(n) for n in range(queries)])
    settings["precision"] = "bf16" if has_gpu() else "fp32"
    chosen = TrainingSettings(
        epochs=1, batch_groups=queries // steps, forward_tokens=tokens, log_steps=steps, **settings
    )
    clock = StepTimes()
    if has_gpu():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = RankingTrainer(
            model, chosen, groups, None, loss=loss, pad_id=0, out=Path(folder),
            token_types=isinstance(model, BertForSequenceClassification),
        )  # fmt: skip
        trainer.add_callback(clock)
        trainer.start()
        losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    skipped = min(10, len(clock.ends) - 2)
    seconds = (clock.ends[-1] - clock.ends[skipped]) / (len(clock.ends) - 1 - skipped)
    per_step = queries // steps * group
    body = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    return {
        "pairs a second": per_step / seconds,
        "tokens a second": per_step * length / seconds,
        "MFU": 6 * body * per_step * length / seconds / matrix_rate(tiny),
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if has_gpu() else 0.0,
        "loss": losses[-1],
    }


def decoder(tiny: bool) -> Any:
    """A teacher of Qwen 2's 0.5B shape with random weights."""
    shape: dict[str, Any] = {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151_936,
    }  # fmt: skip
    if tiny:
        shape = {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 200,
        }  # fmt: skip
    config = Qwen2Config(**shape, pad_token_id=0)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    install_pooling(model, "last_token")
    return model


def finetune_steps(tiny: bool) -> dict[str, Any]:
    """Teacher steps at two token budgets per forward."""
    budgets = (64, 128) if tiny else (8192, 32768)
    return {f"{n} tokens": train(decoder(tiny), partial(hinge, margin=1.0), n, tiny) for n in budgets}


def finetune_under_fsdp(tiny: bool) -> dict[str, Any]:
    """The same launched with training/configs/accelerate_fsdp.yaml and one process; on a CPU without FSDP."""
    code = f"import json; from benchmarks.gpu_steps import one_fsdp_budget; print(json.dumps(one_fsdp_budget({tiny})))"
    command = [sys.executable, "-c", code]
    if has_gpu():
        with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
            script.write(code)
            script.flush()
            configured = ["--config_file", "training/configs/accelerate_fsdp.yaml", "--num_processes", "1"]
            launch = [sys.executable, "-m", "accelerate.commands.launch", *configured, script.name]
            done = subprocess.run(launch, capture_output=True, text=True)
    else:
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return {"line": done.stdout.strip().splitlines()[-1]}


def one_fsdp_budget(tiny: bool) -> dict[str, float]:
    """What the launched process runs."""
    return train(decoder(tiny), partial(hinge, margin=1.0), 64 if tiny else 8192, tiny)


def distill_steps(tiny: bool) -> dict[str, Any]:
    """Student steps of a BERT-6 from scratch, with and without processes that prepare batches."""
    budget = 64 if tiny else 16_384
    return {
        f"{workers} loader workers": train(bert(6, tiny), margin_mse, budget, tiny, loader_workers=workers)
        for workers in ((0, 1) if tiny else (0, 4))
    }


def vllm_labels(tiny: bool) -> dict[str, Any]:
    """Labels a second of a folded 0.5B teacher in vLLM: three token budgets a step, prefix cache on and off."""
    from vllm import LLM, SamplingParams

    config = decoder(tiny).config
    with tempfile.TemporaryDirectory() as folder, torch.device("cpu") if tiny else nullcontext():
        config.architectures, config.tie_word_embeddings = ["Qwen2ForCausalLM"], False
        config.save_pretrained(folder)
        sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=0, allowed_token_ids=[36], detokenize=False)
        count, tokens = (8, 16) if tiny else (4000, 150)
        rng = np.random.default_rng(0)
        prompts: Any = [{"prompt_token_ids": rng.integers(3, 190, tokens).tolist()} for _ in range(count)]
        found = {}
        for budget, cache in ((2048, False),) if tiny else ((2048, False), (8192, False), (16384, False), (8192, True)):
            engine = LLM(
                folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=512, logprobs_mode="raw_logits",
                max_num_batched_tokens=budget, enable_prefix_caching=cache, enforce_eager=tiny,
                gpu_memory_utilization=0.5,
            )  # fmt: skip
            engine.generate(prompts[: count // 4], sampling, use_tqdm=False)
            started = time.perf_counter()
            answers = engine.generate(prompts, sampling, use_tqdm=False)
            rate = count / (time.perf_counter() - started)
            if not all(np.isfinite(answer.outputs[0].cumulative_logprob or np.nan) for answer in answers):
                raise RuntimeError(f"{budget} tokens a step: a score is missing or not finite")
            found[f"{budget} tokens a step, prefix cache {'on' if cache else 'off'}"] = {"labels a second": rate}
            del engine
            if has_gpu():
                torch.cuda.empty_cache()
    return found
