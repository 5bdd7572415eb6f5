"""Trains a decoder to predict the document of a click pair from its query, and measures its held-out perplexity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ranking.errors import InputError
from training.trainer.batch_trainer import BatchTrainer
from training.trainer.text_batches import TextBatches
from training.trainer.token_store import TokenStore, split_by_tokens
from training.trainer.training_settings import TrainingSettings


class LanguageTrainer(BatchTrainer):
    """Next-token prediction of the output part; the loss is the weighted mean over predicted tokens."""

    def __init__(self, model: Any, settings: TrainingSettings, train: TextBatches, dev: TokenStore, out: Path):
        super().__init__(model, settings, train, dev, out, "eval_loss")
        self.pad_id = train.pad_id

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        """This process's part of the weighted mean loss per predicted token: a scalar."""
        total = torch.stack([self._loss_sum(model, dict(forward)) for forward in inputs["forwards"]]).sum()
        return self.global_loss(total, num_items_in_batch or inputs["normaliser"])

    def _loss_sum(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        weights = inputs.pop("weights")[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        kept = weights > 0
        if not kept.any():  # a filler: in the graph, since every process must go backward through every forward
            return logits.sum() * 0.0
        losses = functional.cross_entropy(logits[kept].float(), inputs["input_ids"][:, 1:][kept], reduction="none")
        return (losses * weights[kept]).sum()

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean negative log likelihood of a held-out output token, unweighted, and its exponential."""
        model: Any = self.model_wrapped if self.is_fsdp_enabled else self.model
        store: Any = self.eval_dataset
        texts = TextBatches(
            store, None, batch_texts=len(store), forward_tokens=self.settings.forward_tokens, pad_id=self.pad_id, seed=0
        )
        pieces = split_by_tokens(store.lengths, 2 * self.settings.forward_tokens)
        process, process_count = self.args.process_index, self.args.world_size
        training = model.training
        model.eval()
        sums = torch.zeros(2, device=self.args.device, dtype=torch.float64)
        rounds = range(0, len(pieces), process_count)
        for first in tqdm(rounds, desc="perplexity", leave=False, disable=self.args.disable_tqdm or process != 0):
            # as many forwards on every process: past the end the last piece is computed and thrown away
            inputs = self._prepare_inputs(texts.inputs(pieces[min(first + process, len(pieces) - 1)]))
            predicted = inputs["weights"].sum()
            with self.accelerator.autocast():
                loss = self._loss_sum(model, dict(inputs))
            if first + process < len(pieces):
                sums += torch.stack([loss, predicted]).double()
        model.train(training)
        loss_sum, predicted = self.accelerator.reduce(sums, "sum").tolist()
        loss = loss_sum / predicted
        if not math.isfinite(loss):
            raise InputError("the held-out loss is not finite: training diverged; lower the learning rate")
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700.0))}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
