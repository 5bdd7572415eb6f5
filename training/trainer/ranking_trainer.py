"""Trains a model that gives one score per document: teacher, student and baseline alike.

trainer = RankingTrainer(model, settings, train, dev, loss=partial(hinge, margin=1.0), pad_id=..., out=out)
trainer.start()                    # the model now is the one with the best dev NDCG@5
scores = trainer.score(dev)        # float32 [documents]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ranking.chunks import Pooling
from ranking.errors import InputError
from ranking.metrics import JudgedRanking, mean
from training.trainer.attention import scoring_attention
from training.trainer.batch_trainer import BatchTrainer
from training.trainer.group_batches import GroupBatches, GroupSampler, RankingGroups
from training.trainer.token_store import split_by_tokens
from training.trainer.training_settings import TrainingSettings

# (scores float32 [n], targets float32 [n] or [n, k], groups int64 [n]) -> scalar: the mean over documents, as in
# losses.py
RankingLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

# model inputs of a forward just done -> float32 [rows]: a further loss of each text, of what the model computed inside
TextLoss = Callable[[dict[str, Tensor]], Tensor]

BEST_METRIC = "eval_ndcg@5"


class RankingTrainer(BatchTrainer):
    """Group-wise training: each document encoded once, the loss over the whole groups of the batch.

    model: gives logits [rows, 1]; train: groups with targets; dev: judged groups (targets are grades), None for no
    selection; loss: see RankingLoss; pad_id: token id that fills rows up; token_types: the model takes token_type_ids
    (train.store has document starts); sample_group: draws a query's documents anew each epoch (None: all); text_loss:
    see TextLoss, added to the loss as the mean over documents, of a document in chunks as the mean over those that
    count (None: nothing); out: output folder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: TrainingSettings,
        train: RankingGroups,
        dev: RankingGroups | None,
        *,
        loss: RankingLoss,
        pad_id: int,
        out: Path,
        token_types: bool = False,
        sample_group: GroupSampler | None = None,
        text_loss: TextLoss | None = None,
    ):
        if not len(train):
            raise InputError("there is no query to train on")
        batches = GroupBatches(
            train,
            batch_groups=settings.batch_groups,
            forward_tokens=settings.forward_tokens,
            pad_id=pad_id,
            seed=settings.seed,
            token_types=token_types,
            sample_group=sample_group,
        )
        self.loss, self.pad_id, self.token_types, self.pooling = loss, pad_id, token_types, train.pooling
        self.text_loss = text_loss
        keep_head_exact(model)
        super().__init__(model, settings, batches, dev, out, BEST_METRIC)
        self.pairs = _PairStatistics(self.args.device)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        """This process's part of the loss's mean over the documents of the optimiser step: a scalar."""
        if "documents" in inputs and self.pooling == "max":
            inputs = only_best_chunks(model, inputs)
        outputs, inner = [], []
        for forward, rows in zip(inputs["forwards"], inputs["rows"]):
            outputs.append(model(**forward).logits.float().reshape(-1))
            if self.text_loss is not None:
                inner.append(self.text_loss(forward)[:rows])
        scores = torch.cat([output[:rows] for output, rows in zip(outputs, inputs["rows"])])
        unused = sum((output[rows:].sum() * 0 for output, rows in zip(outputs, inputs["rows"])), scores.new_zeros(()))
        targets, groups = inputs["targets"], inputs["groups"]
        if "documents" in inputs:
            scores = pool_chunks(scores, inputs["documents"], len(targets), self.pooling)
        mean = self.loss(scores, targets, groups) if len(scores) else scores.sum()
        further = scores.new_zeros(())
        if inner:
            of_text = torch.cat(inner)
            of_document = (
                pool_chunks(of_text, inputs["documents"], len(targets), "mean") if "documents" in inputs else of_text
            )
            further = of_document.sum()
        self.pairs.add(scores.detach(), targets if targets.dim() == 1 else targets[:, 0], groups)
        # fillers stay in the graph: DDP and FSDP expect every forward of a step in its backward
        return self.global_loss(mean * len(scores) + further + unused, num_items_in_batch or inputs["normaliser"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the pair statistics since the last log line to the training loss."""
        if "loss" in logs and "eval_loss" not in logs:
            logs |= self.pairs.take(self.accelerator)
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """NDCG (linear gain) of the dev groups, from one score per document; every process gets the same figures."""
        groups: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        scores = self.score(groups)
        metrics = dev_metrics(scores, groups)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def score(self, groups: RankingGroups) -> np.ndarray:
        """float32 [documents]: the current model's scores, computed by all processes together, the same on each.

        The score of a document in chunks is made of theirs, as it is served.
        """
        model: Any = self.model_wrapped if self.is_fsdp_enabled else self.model
        training = model.training
        model.eval()
        pieces = split_by_tokens(groups.store.lengths, 4 * self.settings.forward_tokens)
        process, process_count = self.args.process_index, self.args.world_size
        scores = torch.zeros(len(groups.store), device=self.args.device)
        rounds = range(0, len(pieces), process_count)
        for first in tqdm(rounds, desc="score", leave=False, disable=self.args.disable_tqdm or process != 0):
            # as many forwards on every process: past the end the last piece is computed and thrown away
            piece = pieces[min(first + process, len(pieces) - 1)]
            inputs = self._prepare_inputs(groups.store.pad(piece, self.pad_id, self.token_types))
            with self.accelerator.autocast(), scoring_attention(self.model):
                output = model(**inputs).logits.float().reshape(-1)
            if first + process < len(pieces):
                scores[torch.from_numpy(piece)] = output
        model.train(training)
        result = self.accelerator.reduce(scores, "sum").cpu().numpy()
        if not np.isfinite(result).all():
            raise InputError(
                f"{int((~np.isfinite(result)).sum())} of {len(result)} scores are not finite: training diverged; "
                "lower the learning rate"
            )
        return groups.pool(result)


@torch.no_grad()
def only_best_chunks(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch with only the chunk of each document that scores highest now, or those that tie.

    inputs: see GroupBatches. The gradient of a maximum goes to the highest chunk alone. So the others need no backward
    pass, which is two thirds of their time, and no activations in memory.
    """
    counted = [
        model(**forward).logits.float().reshape(-1)[:n] for forward, n in zip(inputs["forwards"], inputs["rows"])
    ]
    torch.clear_autocast_cache()  # it holds weights that were cast without a gradient
    scores, documents = torch.cat(counted), inputs["documents"]
    best = scores == pool_chunks(scores, documents, len(inputs["targets"]), "max")[documents]
    forwards, rows = [], []
    for forward, mine in zip(inputs["forwards"], best.split([len(each) for each in counted])):
        kept = mine.nonzero()[:, 0]
        rows.append(len(kept))
        # as many forwards on every process: one that has no best chunk runs on a row that does not count
        chosen = kept if len(kept) else kept.new_zeros(1)
        forwards.append({name: values[chosen] for name, values in forward.items()})
    return {**inputs, "forwards": forwards, "rows": rows, "documents": documents[best]}


def pool_chunks(scores: Tensor, documents: Tensor, count: int, pooling: Pooling) -> Tensor:
    """Documents' scores, float [count], of their chunks' scores, float [m]; gradients go back to the chunks.

    documents: int64 [m], the document of each chunk, none of `count` without one. Of chunks that share the highest
    score, each takes an equal part of the gradient.
    """
    pooled = scores.new_zeros(count)
    how = "amax" if pooling == "max" else "mean"
    return pooled.scatter_reduce(0, documents, scores, how, include_self=False)


def dev_metrics(scores: np.ndarray, groups: RankingGroups) -> dict[str, float]:
    """Means over queries of NDCG with linear gain, and the share of same-query pairs in the right order."""
    grades = groups.targets if groups.targets.ndim == 1 else groups.targets[:, 0]
    judged = JudgedRanking(scores, grades.astype(np.int64), groups.group_of_document())
    pairs = judged.pairs()
    concordant, total = pairs.concordant.sum(), (pairs.concordant + pairs.discordant + pairs.tied).sum()
    metrics = {f"ndcg@{k}": mean(judged.ndcg(k)) for k in (5, 10)}
    return metrics | ({"pair_accuracy": float(concordant / total)} if total else {})


def keep_head_exact(model: nn.Module) -> None:
    """Make the score head compute in float32 whatever autocast says: a bf16 logit has 8 bits, too few to keep order."""
    heads = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and {"score", "classifier"} & set(name.split("."))
    ]
    if not heads:
        raise InputError(f"{type(model).__name__} has no linear head named score or classifier")
    for head in heads:  # PEFT keeps the original beside the one that trains
        head.forward = MethodType(_float32_linear, head)  # type: ignore[method-assign]


def _float32_linear(self: nn.Linear, states: Tensor) -> Tensor:
    with torch.autocast(states.device.type, enabled=False):
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(states.float(), self.weight.float(), bias)


class _PairStatistics:
    """Margin, accuracy and score range of the training pairs since the last log line, synchronised only then."""

    def __init__(self, device: torch.device):
        self.device = device
        self._clear()

    def _clear(self) -> None:
        self.sums = torch.zeros(3, device=self.device)  # pairs, correct pairs, margins
        self.low = torch.full((1,), torch.inf, device=self.device)
        self.high = torch.full((1,), -torch.inf, device=self.device)

    def add(self, scores: Tensor, targets: Tensor, groups: Tensor) -> None:
        if not len(scores):
            return
        usable = (groups[:, None] == groups) & (targets[:, None] > targets)
        margins = scores[:, None] - scores
        self.sums += torch.stack([usable.sum(), (usable & (margins > 0)).sum(), (margins * usable).sum()])
        self.low = torch.minimum(self.low, scores.min())
        self.high = torch.maximum(self.high, scores.max())

    def take(self, accelerator) -> dict[str, float]:
        sums = accelerator.reduce(self.sums, "sum").tolist()
        low, high = accelerator.gather(self.low).min().item(), accelerator.gather(self.high).max().item()
        self._clear()
        pairs = max(sums[0], 1.0)
        return {"pair_accuracy": sums[1] / pairs, "margin": sums[2] / pairs, "score_min": low, "score_max": high}
