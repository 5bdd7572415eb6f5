"""The Hugging Face Trainer as every training program here uses it: whole batches, exact normalisation, resume.

Batches come from a Dataset whose item i is *this process's share of global batch i* (group_batches.GroupBatches), so
accelerate must not shard them again. A share is {"forwards": [model inputs, ...], ..., "normaliser": documents (tokens)
of the global batch}. Losses are sums over whole documents (or tokens) divided by the number of all documents of the
optimiser step, over all processes and accumulated batches: DDP, accumulation and one process give the same loss and
gradient.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from ranking.files import write_json, write_text
from ranking.object_store import addressed, hand_over
from training.trainer.fsdp_precision import use_score_policy
from training.trainer.training_settings import TrainingSettings, training_arguments

LOGGER = logging.getLogger(__name__)

_SETTINGS = "settings.json"
_MAY_CHANGE = ("resume", "report_to", "push_to_hub", "loader_workers", "log_steps")  # nothing here moves the loss curve


class BatchTrainer(Trainer):
    """Trainer over global batches. A subclass gives compute_loss (normalised by `num_items_in_batch`) and evaluate.

    train: Dataset as described above, with set_epoch, `examples` (how many it deals out) and
    `process_index`, `process_count`, which are set here; dev: what
    evaluate reads, None for no evaluation and no selection; best_metric: see training_arguments.
    """

    def __init__(self, model: PreTrainedModel, settings: TrainingSettings, train, dev, out: Path, best_metric: str):
        self.settings, self.out, self.batches = settings, out, train
        callbacks: list[TrainerCallback] = [_SetEpoch(train), _HandOver(self)]
        if settings.patience and dev is not None:
            callbacks.append(EarlyStoppingCallback(settings.patience))
        arguments = training_arguments(settings, out, best_metric if dev is not None else None)
        super().__init__(model, arguments, train_dataset=train, eval_dataset=dev, callbacks=callbacks)
        use_score_policy(self.accelerator)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(_Progress())
        train.process_index, train.process_count = self.args.process_index, self.args.world_size
        self.loss_is_scaled_for_ga = True

    def get_train_dataloader(self) -> DataLoader:
        """The dataset's items as they are: each is a whole batch already."""
        return DataLoader(
            self.batches,
            collate_fn=_only,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def num_examples(self, dataloader: DataLoader) -> int:
        """Queries or texts of an epoch, which the Trainer reports per second; batches would mislead."""
        return self.batches.examples

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> int:
        """Documents (tokens) of all processes and accumulated batches of this optimiser step."""
        return sum(batch["normaliser"] for batch in batch_samples)

    def global_loss(self, loss_sum: torch.Tensor, documents: int) -> torch.Tensor:
        """This process's summed loss as its part of the mean over `documents`; DDP and FSDP average over processes."""
        return loss_sum * (self.args.world_size / documents)

    def floating_point_ops(self, inputs: Any) -> int:
        """Always 0: a share is several forwards of different shapes, which the Trainer's estimate does not know."""
        return 0

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
                LOGGER.info("step %d: %s", state.global_step, figures)


class _HandOver(TrainerCallback):
    """Each checkpoint goes to the processes that have no disk in common with the first (docs/scale.md)."""

    def __init__(self, trainer: BatchTrainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **_):
        run = Path(args.output_dir)
        hand_over(run, args.process_index == 0, self.trainer.accelerator.wait_for_everyone)
        if args.load_best_model_at_end and state.best_global_step:
            state.best_model_checkpoint = str(run / f"checkpoint-{state.best_global_step}")


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
    # a run in an object store is worked on in a new folder each time
    wanted = json.loads(addressed(json.dumps(given | {"batches_per_epoch": batches}, default=str)))
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
        LOGGER.warning("%s: interrupted before its first checkpoint; starting from the beginning", run)
        return None
    # the state file is written last, so a checkpoint that has one is whole
    _point_to_best(finished[-1] / "trainer_state.json")
    return str(finished[-1])


def _point_to_best(state_file: Path) -> None:
    """Let a checkpoint's state name the best checkpoint where it lies now: the Trainer would else pass it over."""
    state = json.loads(state_file.read_text(encoding="utf-8"))
    if not state.get("best_model_checkpoint"):
        return
    here = state_file.parents[1] / Path(state["best_model_checkpoint"]).name
    if not here.is_dir():
        raise InputError(f"{here}: the best checkpoint of the run is gone; start it anew with another --out")
    if str(here) != state["best_model_checkpoint"]:
        write_text(state_file, json.dumps(state | {"best_model_checkpoint": str(here)}, indent=2) + "\n")
