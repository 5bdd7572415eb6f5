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
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ranking.card import CARD_NAME, ScoreCard, fingerprint
from ranking.errors import InputError
from ranking.files import write_json, write_text
from ranking.object_store import addressed, hand_over
from training.trainer.fsdp_precision import use_score_policy
from training.trainer.training_settings import RUN_FOLDER, TrainingSettings, training_arguments

LOGGER = logging.getLogger(__name__)

_SETTINGS = "settings.json"
_STATE = "trainer_state.json"  # the Trainer writes it last: a checkpoint that has one is whole
_MAY_CHANGE = ("resume", "report_to", "push_to_hub", "loader_workers", "log_steps")  # nothing here moves the loss curve


def fingerprints(files: Mapping[str, Path]) -> dict[str, str]:
    """name -> fingerprint of the files that are there; whoever reads one that is not says what to do."""
    return {name: fingerprint(path) for name, path in files.items() if path.is_file()}


def begin_run(settings: TrainingSettings, out: Path, processes: PartialState, content: Mapping[str, str]) -> None:
    """Put a training on record in its output folder, or check that it is the one to resume, before all other work.

    A program that wrote first and was refused later would leave its tokenizer beside the weights of another run.
    processes: of this training; the first writes, and none goes on before all have looked. content: name -> fingerprint
    of what is read. InputError: a training lies there, or, with `resume`, none, another one, or one without its states.
    """
    run = out / RUN_FOLDER
    given = {k: v for k, v in asdict(settings).items() if k not in _MAY_CHANGE}
    given |= {f"content of {name}": mark for name, mark in content.items()}
    # a run in an object store is worked on in a new folder each time
    wanted = json.loads(addressed(json.dumps(given, default=str)))
    known, finished = run / _SETTINGS, (out / CARD_NAME).is_file()
    if not settings.resume:
        if finished:
            raise InputError(f"{out}: a finished training lies here already; give another --out, or remove it")
        if next(run.rglob(f"checkpoint-*/{_STATE}"), None) is not None:
            raise InputError(f"{out}: a run lies here already; continue it with --resume, or give another --out")
        if processes.is_main_process:
            write_json(known, wanted)
        processes.wait_for_everyone()
        return
    if not known.is_file():
        raise InputError(f"{out}: no run to resume")
    before = json.loads(known.read_text(encoding="utf-8"))
    changed = sorted(k for k in {*before, *wanted} if before.get(k) != wanted.get(k))
    if changed:
        what = ", ".join(f"{k} was {before.get(k)!r}, now {wanted.get(k)!r}" for k in changed)
        raise InputError(f"{out}: cannot resume with other settings or data: {what}")
    if finished and _last_checkpoint(run) is None:
        raise InputError(f"{out}: has finished without a checkpoint-* left to resume; give another --out, or remove it")


class BatchTrainer(Trainer):
    """Trainer over global batches. A subclass gives compute_loss (normalised by `num_items_in_batch`) and evaluate.

    train: Dataset as described above, with set_epoch, `examples` (how many it deals out) and
    `process_index`, `process_count`, which are set here; dev: what
    evaluate reads, None for no evaluation and no selection; best_metric: see training_arguments.
    """

    def __init__(self, model: PreTrainedModel, settings: TrainingSettings, train, dev, out: Path, best_metric: str):
        self.settings, self.out, self.batches, self.stopped_early = settings, out, train, False
        callbacks: list[TrainerCallback] = [_SetEpoch(train), _HandOver(self)]
        if settings.patience and dev is not None:
            callbacks.append(EarlyStoppingCallback(settings.patience))
        arguments = training_arguments(settings, out, best_metric if dev is not None else None)
        super().__init__(model, arguments, train_dataset=train, eval_dataset=dev, callbacks=callbacks)
        use_score_policy(self.accelerator)
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        self.add_callback(_Lines() if self.args.disable_tqdm else _Progress())
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
        """Train, or, with the setting `resume`, go on from the last checkpoint in the output folder if there is one.

        begin_run says whether it is one of the same training.
        """
        run = Path(str(self.args.output_dir))
        checkpoint = _last_checkpoint(run) if self.settings.resume else None
        if checkpoint is not None:
            _point_to_best(checkpoint / _STATE)
            self.stopped_early = _stopped_early(checkpoint / _STATE, self.settings.patience)
        elif self.settings.resume:
            LOGGER.warning("%s: interrupted before its first checkpoint; starting from the beginning", run)
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> Any:
        """The Trainer's own figures, but no epoch to train where early stopping has ended the resumed training.

        The Trainer restores what early stopping has counted, and then trains on until it counts once more.
        """
        epochs, *others = super().set_initial_training_values(args, dataloader)
        return (0 if self.stopped_early else epochs, *others)

    def save_checkpoint(self, card: ScoreCard) -> None:
        """Write model and score card into the output folder. The card comes last: a folder with a card is whole."""
        if self.args.process_index == 0:
            (self.out / CARD_NAME).unlink(missing_ok=True)  # of a finished run that was resumed
        self.save_model(str(self.out), _internal_call=True)
        if self.args.process_index == 0:
            (self.out / "training_args.bin").unlink(missing_ok=True)  # a pickle; settings.json has what it says
            card.save(self.out)
        self.accelerator.wait_for_everyone()


class _Lines(TrainerCallback):
    """The Trainer's figures, logged to stderr instead of printed to stdout."""

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and logs:
            figures = " ".join(f"{name} {value:.4g}" for name, value in logs.items() if name != "total_flos")
            with logging_redirect_tqdm():
                LOGGER.info("step %d: %s", state.global_step, figures)


class _Progress(_Lines, ProgressCallback):
    """The same beside the Trainer's progress bar."""


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


def _last_checkpoint(run: Path) -> Path | None:
    whole = [path.parent for path in run.glob(f"checkpoint-*/{_STATE}")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def _stopped_early(state_file: Path, patience: int) -> bool:
    """Whether early stopping had ended the training whose state this is."""
    counted = json.loads(state_file.read_text(encoding="utf-8"))["stateful_callbacks"].get("EarlyStoppingCallback")
    return bool(patience and counted) and counted["attributes"]["early_stopping_patience_counter"] >= patience


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
