"""A 0.5B-shaped teacher of random weights through every step up to served labels: parity, time and peak memory of each.

    python -m benchmarks.teacher.llm_sized --data data/msrd --out runs/llm_sized

What a small model hides shows here: a vocabulary of 152k (its logits and its zero head rows), grouped queries, an
embedding tied to the head, weights in several files. The scores mean nothing; that the served ones are the trained ones
is what is measured. Steps that are done are not done again: results.json in `out` has them.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from benchmarks.teacher.parity import JudgedPairs, ask, read_pairs, score_differences
from build.build_teacher import Config as BuildConfig
from build.build_teacher import main as build_teacher
from ranking.files import replacing
from ranking.program import run
from ranking.schema import read_table, write_table
from ranking.text import TeacherFormat
from serving.temporary_server import start_triton
from training.evaluation.checkpoint_scores import Scorer
from training.teacher.decoder import train_bpe

LOGGER = logging.getLogger(__name__)
STEPS = ("make", "finetune", "reference", "publish", "label")


@dataclass
class Config:
    """Take a decoder of an LLM's shape from LoRA fine-tuning to served labels.

    Args:
        data: dataset folder with judgments, for texts
        out: folder for the models and results.json; a second run goes on where the first one stopped
        family: qwen2 or qwen3
        layers: decoder layers; the published 0.5B and 0.6B models have 24 and 28
        hidden: width of a state
        vocabulary: rows of the embedding; the tokenizer itself has fewer tokens
        pairs: pairs that the server labels
        reference_pairs: of these, so many are scored by transformers in float32 too
        dtype: number format to serve in
        train_queries: queries of fine-tuning: two a step
        only: run this step alone, in this process; the program starts each of its steps so
    """

    data: Path
    out: Path
    family: Literal["qwen2", "qwen3"] = "qwen2"
    layers: int = 24
    hidden: int = 896
    vocabulary: int = 151_936
    pairs: int = 1000
    reference_pairs: int = 100
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    train_queries: int = 8
    only: str = field(default="")


def main(config: Config) -> None:
    """Run the steps that results.json lacks, each in a process of its own, and print the results."""
    config.out.mkdir(parents=True, exist_ok=True)
    if config.only:
        print(json.dumps(WORK[config.only](config)))
        return
    results_file = config.out / "results.json"
    results = json.loads(results_file.read_text()) if results_file.is_file() else {}
    for step in STEPS:
        if step not in results:
            LOGGER.info("step %s", step)
            results[step] = measured(config, step)
            with replacing(results_file) as aside:
                aside.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def measured(config: Config, step: str) -> dict[str, float]:
    """Run one step in a child process: what it reports, its seconds, and the most memory its processes held, in GiB."""
    values = {name: value for name, value in asdict(config).items() if name != "only"}
    flags = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "benchmarks.teacher.llm_sized", *flags, "--only", step]
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        family = psutil.Process(child.pid)
        while child.poll() is None:
            peak = max(peak, held_bytes(family))
            time.sleep(0.5)
        printed = child.stdout.read() if child.stdout else ""
    if child.returncode:
        raise SystemExit(f"step {step} ended with exit code {child.returncode}")
    seconds = time.monotonic() - started
    return json.loads(printed.splitlines()[-1]) | {"seconds": round(seconds, 1), "peak_gib": round(peak / 2**30, 2)}


def held_bytes(process: psutil.Process) -> int:
    """Resident memory of a process and all below it; pages that they share count once for each."""
    held = 0
    for each in (process, *process.children(recursive=True)):
        try:
            held += each.memory_info().rss
        except psutil.NoSuchProcess:  # it ended between the two calls
            continue
    return held


def make(config: Config) -> dict[str, float]:
    """A decoder with random weights and a tied head, in several files, its tokenizer, and a small dataset."""
    tables = {s: read_table(config.data / "judgments" / f"{s}.parquet", "judgments") for s in ("train", "dev")}
    columns = [tables["train"][name].to_pylist()[:20_000] for name in ("query", "title", "summary")]
    tokenizer = train_bpe([(columns[0], columns[1], columns[2])], 32_000)
    torch.manual_seed(1)
    shape = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.hidden // 64,
        "num_key_value_heads": 2,
        "intermediate_size": config.hidden * 38 // 7,  # 4864 at 896
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    made = Qwen2Config(**shape) if config.family == "qwen2" else Qwen3Config(**shape, head_dim=64)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    model.save_pretrained(config.out / "decoder", max_shard_size="300MB")
    tokenizer.save_pretrained(config.out / "decoder")
    for split, table in tables.items():
        first = sorted(set(table["query_id"].to_pylist()))[: config.train_queries if split == "train" else 2]
        few = table.filter(np.isin(table["query_id"].to_numpy(zero_copy_only=False), first))
        (config.out / "data" / "judgments").mkdir(parents=True, exist_ok=True)
        write_table(config.out / "data" / "judgments" / f"{split}.parquet", "judgments", few)
    files = len(list((config.out / "decoder").glob("*.safetensors")))
    return {"parameters": sum(p.numel() for p in model.parameters()), "files": files}


def finetune(config: Config) -> dict[str, float]:
    """A few steps of LoRA on frozen bf16 weights, as training/configs/finetune_7b_lora.yaml has it."""
    flags = {
        "data": config.out / "data", "model": config.out / "decoder", "out": config.out / "teacher", "epochs": 1,
        "batch-groups": 2, "group-size": 4, "forward-tokens": 512, "learning-rate": 1e-3, "warmup": 0, "log-steps": 1,
        "precision": "bf16", "gradient-checkpointing": "true", "lora-rank": 16, "lora-alpha": 32, "frozen-bf16": "true",
        "limits": '{"max_query_tokens": 16, "max_title_tokens": 16, "max_summary_tokens": 48}',
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "-m", "training.finetune_teacher", *words], check=True, stdout=sys.stderr)
    state = next((config.out / "teacher").glob("training/checkpoint-*/trainer_state.json"))
    losses = [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    return {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}


def reference(config: Config) -> dict[str, float]:
    """Scores of transformers in float32, adapter included, as the server's scores have to be."""
    pairs = first_pairs(config, config.reference_pairs)
    scores = Scorer.load(config.out / "teacher").score(pairs.queries, pairs.titles, pairs.summaries)
    np.save(config.out / "reference.npy", scores)
    return {"pairs": len(scores), "deviation": float(scores.std())}


def publish(config: Config) -> dict[str, float]:
    """Merge the adapter, fold the head and write the model repository."""
    arguments = {"enforce_eager": True}
    build_teacher(
        BuildConfig(
            config.out / "teacher", repository=config.out / "repository", dtype=config.dtype, engine_args=arguments
        )
    )
    files = (config.out / "repository" / "teacher").glob("*/checkpoint/*.safetensors")
    return {"gib": round(sum(file.stat().st_size for file in files) / 2**30, 2)}


def label(config: Config) -> dict[str, float]:
    """Serve the repository, label the pairs, and compare the first of them with the reference."""
    pairs = first_pairs(config, config.pairs)
    texts = TeacherFormat.of_checkpoint(config.out / "teacher").texts(pairs.queries, pairs.titles, pairs.summaries)
    started = time.monotonic()
    with start_triton(config.out / "repository") as server:
        ready = time.monotonic()
        scores = ask(server.grpc, [text.text for text in texts])
        done = time.monotonic()
    expected = np.load(config.out / "reference.npy")
    count = len(expected)
    compared = JudgedPairs(
        pairs.queries[:count], pairs.titles[:count], pairs.summaries[:count], pairs.grades[:count], pairs.groups[:count]
    )
    figures = score_differences(expected, scores[:count], compared)
    return figures | {"labels": len(scores), "start_seconds": ready - started, "label_seconds": done - ready}


def first_pairs(config: Config, count: int) -> JudgedPairs:
    """The first judged test pairs of the dataset."""
    return read_pairs(config.data, count)


WORK: dict[str, Callable[[Config], dict[str, float]]] = {
    "make": make, "finetune": finetune, "reference": reference, "publish": publish, "label": label,
}  # fmt: skip

if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.teacher.llm_sized --data data/msrd --out runs/llm_sized")
