"""Publish a teacher as the Triton model `teacher` of a model repository, for the stock vLLM backend.

    python build/build_teacher.py --checkpoint runs/teacher --repository model_repository
    python build/build_teacher.py --checkpoint models/Qwen3-Reranker-0.6B --prompt qwen3-reranker

The teacher is a checkpoint of training.finetune_teacher or, with --prompt, a decoder reranker that others trained.

Writes `teacher/config.pbtxt`, `teacher/<version>/model.json` (vLLM's engine arguments), `teacher/<version>/checkpoint/`
(the folded model, its tokenizer and card) and `teacher/<version>/tokenizer/` (what vLLM reads) beside the repository,
and renames the whole folder into it, so that a server never sees half of a version. Nothing in the folder is particular
to this project's own server (docs/serving-teacher.md).
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from build.fold_teacher import Dtype, FoldedTeacher, fold, write_serving_tokenizer
from build.foreign_teachers import fold_reranker
from build.publication_settings import RepositorySettings, check_model_name
from build.releases import check_holds_no_arm, numbers
from build.triton_config import as_parameters
from ranking.card import ScoreCard, fingerprint
from ranking.errors import InputError
from ranking.files import replacing_folder, write_json
from ranking.limits import DEFAULT_LIMITS, FieldLimits
from ranking.program import run
from ranking.reranker_prompts import PROMPTS
from ranking.visible import is_visible

LOGGER = logging.getLogger(__name__)

# What the score depends on: with another value the server would answer, but not with the score.
FIXED_ARGUMENTS = {"model", "tokenizer", "logprobs_mode", "runner", "convert", "task", "enable_lora", "dtype"}

# With a value beside "auto", weights or key-value cache have fewer bits than --dtype says.
QUANTISING_ARGUMENTS = ("quantization", "kv_cache_dtype")

# What says where the model lies and how fast it runs. Every other argument may move a score (number formats,
# quantisation, the key-value cache's type), so it is part of the teacher's id: an argument that nobody thought of
# changes the id, and mixes nothing.
ARGUMENTS_THAT_MOVE_NO_SCORE = {
    "model", "tokenizer", "max_model_len", "enable_prefix_caching", "block_size", "enforce_eager",
    "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "swap_space", "disable_log_stats",
    "tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend",
}  # fmt: skip


@dataclass
class Config(RepositorySettings):
    """Publish a teacher checkpoint for Triton's vLLM backend.

    Args:
        checkpoint: teacher checkpoint of training.finetune_teacher (a LoRA adapter is merged into its base model), or
            with --prompt the downloaded folder of a foreign reranker
        name: name of the Triton model; change it to serve two teachers side by side
        dtype: number format of weights and computation; "auto" keeps the checkpoint's. A GPU wants bfloat16 or float16
        engine_args: further vLLM engine arguments as JSON, e.g. tensor_parallel_size, gpu_memory_utilization,
            max_num_seqs, max_model_len (never below the longest pair), block_size
        served_from: path of the repository as the server sees it, when it is another one than `repository`
        prompt: text format of a foreign decoder reranker: qwen3-reranker, bge-reranker-gemma or mxbai-rerank-v2
        limits: token limits per field of a foreign reranker; a checkpoint of ours has its own
        accept_quantised: publish with quantised weights or key-value cache; what benchmarks.teacher.parity said of them
        instruction: task that a foreign reranker's prompt states, in its own words; left out, the model's default
    """

    checkpoint: Path
    name: str = "teacher"
    dtype: Dtype = "auto"
    engine_args: dict[str, Any] = field(default_factory=dict)
    served_from: Path | None = None
    prompt: str | None = None
    limits: FieldLimits = DEFAULT_LIMITS
    accept_quantised: str = ""
    instruction: str = ""

    def __post_init__(self) -> None:
        fixed = sorted(FIXED_ARGUMENTS & set(self.engine_args))
        if fixed:
            raise ValueError(f"engine_args sets {', '.join(fixed)}: decided by the checkpoint and --dtype")
        check_model_name(self.name)
        quantised = sorted(n for n in QUANTISING_ARGUMENTS if self.engine_args.get(n) not in (None, "auto"))
        if quantised and not is_visible(self.accept_quantised):
            given = " ".join(f"--engine-args.{name} {self.engine_args[name]}" for name in quantised)
            raise ValueError(
                f"engine_args sets {', '.join(quantised)}, which moves scores: measure it with `python -m "
                f"benchmarks.teacher.parity {given}`, and say in --accept-quantised what came of it"
            )
        if self.prompt is not None and self.prompt not in PROMPTS:
            raise ValueError(f"prompt {self.prompt!r}: one of {', '.join(sorted(PROMPTS))}")
        if self.prompt is None and (self.instruction or self.limits != DEFAULT_LIMITS):
            raise ValueError(
                "instruction and limits are for foreign rerankers; a checkpoint of ours has its own: give --prompt"
            )


def main(config: Config) -> None:
    """Fold the teacher and publish it as the model's next version. InputError if the checkpoint is no teacher."""
    repository = config.repository
    target = repository / config.name
    check_holds_no_arm(target)
    repository.mkdir(parents=True, exist_ok=True)
    # a published version is never written again
    version = str(max(numbers(target), default=0) + 1)
    # beside the repository, because a server takes every folder inside it for a model
    with replacing_folder(target, aside_in=repository.absolute().parent) as aside:
        checkpoint = aside / version / "checkpoint"
        if config.prompt is None:
            teacher = fold(config.checkpoint, checkpoint, config.dtype)
        else:
            teacher = fold_reranker(
                config.checkpoint, checkpoint, config.prompt, config.limits, config.instruction, config.dtype
            )
        write_serving_tokenizer(checkpoint, aside / version / "tokenizer")
        served = (config.served_from or repository) / config.name / version
        arguments = engine_arguments(teacher, served, config.engine_args)
        write_json(aside / version / "model.json", arguments)
        identity = teacher_id(checkpoint, arguments)
        model_config = triton_config(
            teacher.card, teacher.score_token_id, identity, head_dtype(arguments), config.accept_quantised
        )
        (aside / "config.pbtxt").write_text(text_format.MessageToString(model_config), encoding="utf-8")
    LOGGER.info("published %s version %s (%s, score token %d)", target, version, teacher.dtype, teacher.score_token_id)


def engine_arguments(teacher: FoldedTeacher, served: Path, given: dict[str, Any]) -> dict[str, Any]:
    """vLLM's engine arguments. served: the version folder as the server sees it.

    InputError if max_model_len would cut a pair off.
    """
    needed = teacher.max_prompt_tokens + 1  # the one token asked for
    arguments: dict[str, Any] = {
        "model": str(served / "checkpoint"),
        "tokenizer": str(served / "tokenizer"),
        "dtype": teacher.dtype,
        "max_model_len": needed,
        "logprobs_mode": "raw_logits",
        "enable_prefix_caching": True,
        # small blocks, because the shared prefix is a query of a few dozen tokens; a CPU needs a multiple of 32
        "block_size": 32,
    }
    if teacher.dtype != "float32":  # the logit would leave the product rounded to 16 bits
        arguments["hf_overrides"] = {"head_dtype": "float32", **given.get("hf_overrides", {})}
    arguments |= {name: value for name, value in given.items() if name != "hf_overrides" or teacher.dtype == "float32"}
    if arguments["max_model_len"] < needed:
        raise InputError(
            f"engine_args: max_model_len {arguments['max_model_len']} is below {needed}, the longest pair that the "
            f"score card allows; leave it out, or fine-tune with smaller field limits"
        )
    return arguments


def teacher_id(checkpoint: Path, arguments: dict[str, Any]) -> str:
    """16 hex digits of all that moves a score: the served checkpoint (weights, tokenizer, limits), vLLM's arguments.

    arguments: as model.json has them.
    """
    moving = {name: value for name, value in arguments.items() if name not in ARGUMENTS_THAT_MOVE_NO_SCORE}
    described = json.dumps([fingerprint(checkpoint), moving], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def head_dtype(arguments: dict[str, Any]) -> str:
    """Number format in which vLLM computes the score: a client can tell a server that rounds it to less."""
    asked = arguments.get("hf_overrides", {}).get("head_dtype", "model")
    return arguments["dtype"] if asked == "model" else asked


def triton_config(
    card: ScoreCard, score_token_id: int, teacher_id: str, head_dtype: str, accept_quantised: str = ""
) -> model_config_pb2.ModelConfig:
    """config.pbtxt as a message: the backend, and as parameters what a client must know to ask for scores.

    accept_quantised: the publisher's word on quantised arguments, kept where there is one.
    """
    parameters = {
        "ranker_card": card.to_json(),
        "score_token_id": str(score_token_id),
        "teacher_id": teacher_id,
        "head_dtype": head_dtype,
        "ENABLE_VLLM_HEALTH_CHECK": "true",  # NVIDIA's backend then unloads the model when its engine has died
    }
    if accept_quantised:
        parameters["accept_quantised"] = accept_quantised
    kind = model_config_pb2.ModelInstanceGroup.KIND_MODEL  # vLLM itself picks its devices
    return model_config_pb2.ModelConfig(
        backend="vllm",
        instance_group=[model_config_pb2.ModelInstanceGroup(count=1, kind=kind)],
        parameters=as_parameters(parameters),
    )


if __name__ == "__main__":
    run(main, Config, example="python build/build_teacher.py --checkpoint runs/teacher --repository model_repository")
