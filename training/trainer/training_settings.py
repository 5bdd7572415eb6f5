"""Settings that all training programs share, and the Hugging Face Trainer's arguments that follow from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ranking.errors import InputError
from ranking.telemetry import bars_are_read

# below the output folder: optimiser states and logs; the checkpoint itself lies in the output folder
RUN_FOLDER = "training"


@dataclass(kw_only=True)
class TrainingSettings:
    """Knobs that all training programs share.

    Args:
        epochs: passes over the training set
        learning_rate: peak learning rate of AdamW
        warmup: share of all steps in which the learning rate rises; a number from 1 up counts steps
        schedule: course of the learning rate after warm-up
        weight_decay: AdamW's weight decay; biases and norms are left out
        max_grad_norm: gradients are clipped to this norm; 0 for no clipping
        batch_groups: queries (pre-training: texts) per batch, over all processes together
        accumulation: batches per optimiser step; raise it when a batch does not fit the memory, and lower batch_groups
        forward_tokens: padded tokens per forward; small enough that documents of one forward are of similar length
        precision: fp32, or bf16 autocast over fp32 weights; auto is bf16 where the device multiplies it natively
        gradient_checkpointing: recompute activations in the backward pass: a third slower, much less memory
        eval_steps: optimiser steps between evaluations on dev; 0 for one per epoch
        patience: evaluations without a better dev score after which training stops; 0 never stops early
        log_steps: optimiser steps between log lines
        report_to: trackers that get the curves and these settings: tensorboard, mlflow, wandb ... (commas), or none
        loader_workers: processes that prepare batches beside the training process
        seed: everything random follows from it
        resume: continue the run that lies in the output folder, as if it had not been interrupted
    """

    epochs: float = 3.0
    learning_rate: float = 5e-5
    warmup: float = 0.1
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    batch_groups: int = 16
    accumulation: int = 1
    forward_tokens: int = 4096
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    eval_steps: int = 0
    patience: int = 0
    log_steps: int = 10
    report_to: str = "none"
    loader_workers: int = 0
    seed: int = 1
    resume: bool = False

    def __post_init__(self):
        for name in ("batch_groups", "accumulation", "forward_tokens", "log_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: a positive number is needed")
        for name in ("warmup", "weight_decay", "max_grad_norm", "eval_steps", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: must not be negative")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: a whole number from 0 to {2**32 - 1} is needed")

    def bf16(self) -> bool:
        """Whether forwards run under bf16 autocast; `auto` asks the device."""
        return bf16_is_native() if self.precision == "auto" else self.precision == "bf16"


def bf16_is_native() -> bool:
    """Whether the device that torch would use multiplies bfloat16 itself."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def launched_processes() -> PartialState:
    """The processes of this training, as torchrun or accelerate launched them, and this one's place among them.

    On a machine without a GPU accelerate must be told so: otherwise it runs its processes unconnected, each as the
    first of one.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def training_arguments(settings: TrainingSettings, out: Path, best_metric: str | None) -> TrainingArguments:
    """The Trainer's arguments; best_metric ("eval_ndcg@5", or "eval_loss", lower is better) selects the checkpoint."""
    every: dict[str, Any] = (
        {"save_strategy": "steps", "save_steps": settings.eval_steps}
        if settings.eval_steps
        else {"save_strategy": "epoch"}
    )
    if best_metric is not None:
        every |= {"eval_strategy": every["save_strategy"], "eval_steps": settings.eval_steps or None}
        every |= {"load_best_model_at_end": True, "metric_for_best_model": best_metric}
        every |= {"greater_is_better": not best_metric.endswith("loss")}
    arguments = _ReportedArguments(
        output_dir=str(out / RUN_FOLDER),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup,
        lr_scheduler_type=settings.schedule,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_accumulation_steps=settings.accumulation,
        optim="adamw_torch_fused",
        bf16=settings.bf16(),
        use_cpu=not torch.accelerator.is_available(),  # see launched_processes
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        logging_steps=settings.log_steps,
        disable_tqdm=not bars_are_read(),
        logging_nan_inf_filter=False,  # it would replace a NaN loss by the mean of the others
        report_to=_trackers(settings.report_to),
        dataloader_num_workers=settings.loader_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,  # early stopping counts on where it was
        # a share is encoded in several forwards before one backward: buffers must not be overwritten in between,
        # and every parameter that trains is used
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        seed=settings.seed,
        **every,
    )
    arguments.settings = {f"settings/{name}": value for name, value in asdict(settings).items()}
    return arguments


class _ReportedArguments(TrainingArguments):
    """The Trainer's arguments with the program's own settings beside them, in what every tracker is told."""

    settings: Mapping[str, Any] = MappingProxyType({})

    def to_dict(self) -> dict[str, Any]:
        """The arguments and the settings, as JSON can hold them."""
        return super().to_dict() | json.loads(json.dumps(dict(self.settings), default=str))


def _trackers(names: str) -> list[str]:
    """The trackers of a `report_to`, which are installed. InputError names one that is not."""
    wanted = [name.strip() for name in names.split(",") if name.strip() not in ("", "none")]
    known = get_available_reporting_integrations()
    missing = [name for name in wanted if name not in known]
    if missing:
        raise InputError(f"report_to: {missing[0]} is not installed here; there is {', '.join(known) or 'none'}")
    return wanted
