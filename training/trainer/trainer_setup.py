"""The Hugging Face Trainer as every training program here uses it: settings, batches, exact normalisation, resume.

Batches come from a Dataset whose item i is *this process's share of global batch i* (group_batches.GroupBatches), so
accelerate must not shard them again. A share is {"forwards": [model inputs, ...], ..., "documents": normaliser of the
global batch}. Losses are sums over whole documents (or tokens) divided by the number of all documents of the optimiser
step, over all processes and accumulated batches: DDP, accumulation and one process give the same loss and gradient.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ranking.card import ScoreCard
from ranking.errors import InputError
from ranking.files import write_json

log = logging.getLogger(__name__)

RUN_FOLDER = (
    "training"  # below the output folder: optimiser states, logs; the checkpoint itself lies in the output folder
)
_SETTINGS = "settings.json"
_MAY_CHANGE = ("resume", "report_to", "loader_workers", "log_steps")  # nothing here moves the loss curve


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
        report_to: where curves go: tensorboard, wandb, mlflow ... or none
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

    def bf16(self) -> bool:
        if self.precision != "auto":
            return self.precision == "bf16"
        if torch.cuda.is_available():
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def training_arguments(settings: TrainingSettings, out: Path, best_metric: str | None) -> TrainingArguments:
    """Trainer arguments; best_metric ("eval_ndcg@5", higher is better; "eval_loss", lower) selects the kept checkpoint."""
    every: dict[str, Any] = (
        {"save_strategy": "steps", "save_steps": settings.eval_steps}
        if settings.eval_steps
        else {"save_strategy": "epoch"}
    )
    if best_metric is not None:
        every |= {"eval_strategy": every["save_strategy"], "eval_steps": settings.eval_steps or None}
        every |= {"load_best_model_at_end": True, "metric_for_best_model": best_metric}
        every |= {"greater_is_better": not best_metric.endswith("loss")}
    return TrainingArguments(
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
        use_cpu=not torch.accelerator.is_available(),  # without it, accelerate runs CPU processes unconnected
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,  # it would replace a NaN loss by the mean of the others
        report_to=settings.report_to,
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


class BatchTrainer(Trainer):
    """Trainer over global batches. A subclass gives compute_loss (normalised by `num_items_in_batch`) and evaluate.

    train: Dataset as described above, with set_epoch, `examples` (how many it deals out) and
    `rank`, `world`, which are set here; dev: what
    evaluate reads, None for no evaluation and no selection; best_metric: see training_arguments.
    """

    def __init__(self, model: PreTrainedModel, settings: TrainingSettings, train, dev, out: Path, best_metric: str):
        self.settings, self.out, self.batches = settings, out, train
        callbacks: list[TrainerCallback] = [_SetEpoch(train)]
        if settings.patience and dev is not None:
            callbacks.append(EarlyStoppingCallback(settings.patience))
        arguments = training_arguments(settings, out, best_metric if dev is not None else None)
        super().__init__(model, arguments, train_dataset=train, eval_dataset=dev, callbacks=callbacks)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(_Progress())
        train.rank, train.world = self.args.process_index, self.args.world_size
        self.loss_is_scaled_for_ga = True

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.batches,
            collate_fn=_only,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def num_examples(self, dataloader: DataLoader) -> int:
        return self.batches.examples  # queries or texts, not batches: the Trainer reports them per second

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> int:
        """Documents (tokens) of all processes and accumulated batches of this optimiser step."""
        return sum(batch["documents"] for batch in batch_samples)

    def global_loss(self, loss_sum: torch.Tensor, documents: int) -> torch.Tensor:
        """This process's summed loss as its part of the mean over `documents`; DDP and FSDP average over processes."""
        return loss_sum * (self.args.world_size / documents)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # a share is several forwards of different shapes: the Trainer's estimate would be wrong

    def start(self) -> None:
        """Train, or continue the run in the output folder. InputError if that is not the same run, or there is one."""
        self.train(resume_from_checkpoint=_resume_point(self.settings, self.args, len(self.batches)))

    def save_checkpoint(self, card: ScoreCard) -> None:
        """Write model and score card into the output folder. The card comes last: a folder with a card is whole."""
        self.save_model(str(self.out), _internal_call=True)
        if self.args.process_index == 0:
            (self.out / "training_args.bin").unlink(missing_ok=True)  # a pickle; settings.json has what it says
            card.save(self.out)
        self.accelerator.wait_for_everyone()


class _Progress(ProgressCallback):
    """The Trainer's progress bar, with the figures logged to stderr instead of printed to stdout."""

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and logs:
            figures = " ".join(f"{name} {value:.4g}" for name, value in logs.items() if name != "total_flos")
            with logging_redirect_tqdm():
                log.info("step %d: %s", state.global_step, figures)


class _SetEpoch(TrainerCallback):
    """The Trainer reaches only accelerate's own samplers with the epoch's number."""

    def __init__(self, train):
        self.train = train

    def on_epoch_begin(self, args, state, control, **_):
        self.train.set_epoch(int(round(state.epoch or 0.0, 6)))


def _only(items: list) -> Any:
    return items[0]


def _resume_point(settings: TrainingSettings, args: TrainingArguments, batches: int) -> str | None:
    run = Path(str(args.output_dir))
    given = {k: v for k, v in asdict(settings).items() if k not in _MAY_CHANGE}
    wanted = json.loads(json.dumps(given | {"batches_per_epoch": batches}, default=str))
    known = run / _SETTINGS
    finished = sorted(
        (p.parent for p in run.glob("checkpoint-*/trainer_state.json")), key=lambda p: int(p.name.split("-")[1])
    )
    if not settings.resume:
        if finished:
            raise InputError(f"{run}: a run lies here already; continue it with --resume, or give another --out")
        if args.process_index == 0:
            write_json(known, wanted)
        return None
    if not known.is_file():
        raise InputError(f"{run}: no run to resume")
    before = json.loads(known.read_text(encoding="utf-8"))
    changed = sorted(k for k in {*before, *wanted} if before.get(k) != wanted.get(k))
    if changed:
        what = ", ".join(f"{k} was {before.get(k)!r}, now {wanted.get(k)!r}" for k in changed)
        raise InputError(f"{run}: cannot resume with other settings: {what}")
    if not finished:
        log.warning("%s: interrupted before its first checkpoint; starting from the beginning", run)
        return None
    # the state file is written last, so a checkpoint that has one is whole
    return str(finished[-1])
