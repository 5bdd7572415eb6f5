"""Masked-LM warm-up of a student's encoder on the candidates' texts (BERT, arXiv 1810.04805, section 3.1).

For models from scratch: words that occur in like documents come to lie near each other before any label is seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertForMaskedLM, BertForSequenceClassification

from ranking.errors import InputError
from ranking.schema import iter_table
from ranking.text import EncodedPair, StudentFormat
from training.trainer.batch_trainer import BatchTrainer
from training.trainer.token_store import TokenStore, split_by_tokens
from training.trainer.training_settings import TrainingSettings

LOGGER = logging.getLogger(__name__)

MASKED_SHARE = 0.15
BATCH_TEXTS = 128


@dataclass(kw_only=True)
class WarmUpSettings:
    """How long a student's encoder learns the words of the candidates before it learns to rank.

    Args:
        warm_up_epochs: masked-LM passes over the candidates before training; worth it from scratch, 0 for none
        warm_up_learning_rate: peak learning rate of the masked-LM warm-up
    """

    warm_up_epochs: float = 0.0
    warm_up_learning_rate: float = 5e-4

    def __post_init__(self):
        if self.warm_up_epochs < 0 or not self.warm_up_learning_rate > 0:
            raise ValueError("warm_up_epochs must not be negative and warm_up_learning_rate must be positive")


class MaskedTexts(Dataset):
    """Batches of masked texts; item i is this process's share of global batch i, as in GroupBatches.

    Masks are a pure function of (seed, epoch, text): of 15% of the tokens, at least one, 80% become [MASK], 10% another
    token, 10% stay. [CLS] and [SEP] are never masked. Item: {"forwards": [model inputs], "labels": [int64 [rows,
    tokens],
    -100 where nothing is predicted], "normaliser": masked tokens of the global batch}. Every process makes the same
    number of forwards: missing ones are filled with a text that counts for nothing.
    """

    def __init__(self, store: TokenStore, text_format: StudentFormat, forward_tokens: int, seed: int):
        self.store, self.text_format, self.forward_tokens, self.seed = store, text_format, forward_tokens, seed
        self.process_index, self.process_count = 0, 1
        mask_id = text_format.tokenizer.token_to_id("[MASK]")
        if mask_id is None:
            raise InputError("the tokenizer has no [MASK]: this vocabulary cannot be warmed up by masked LM")
        self.mask_id, self.vocabulary = mask_id, text_format.tokenizer.get_vocab_size()
        self.examples = len(store)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of the texts, and from now on their masks, for an epoch."""
        self.epoch = epoch
        self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.store))

    def __len__(self) -> int:
        return -(-len(self.store) // BATCH_TEXTS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = self.order[index * BATCH_TEXTS : (index + 1) * BATCH_TEXTS]
        # drawn for the whole batch on every process, so that all know the normaliser
        masks = {int(row): self._mask(int(row)) for row in rows}
        shares = [rows[process :: self.process_count] for process in range(self.process_count)]
        plans = [
            [share[piece] for piece in split_by_tokens(self.store.lengths[share], self.forward_tokens)]
            for share in shares
        ]
        pieces = plans[self.process_index]
        forwards, labels = [], []
        for piece in pieces:
            batch = self.store.pad(piece, self.text_format.pad_id, token_types=True)
            wanted = torch.full_like(batch["input_ids"], -100)
            for place, row in enumerate(piece):
                positions, replacements = masks[int(row)]
                wanted[place, positions] = batch["input_ids"][place, positions]
                batch["input_ids"][place, positions] = replacements
            forwards.append(batch)
            labels.append(wanted)
        for _ in range(max(map(len, plans)) - len(pieces)):  # of a batch with fewer texts than processes, say
            filler = self.store.pad([int(rows[0])], self.text_format.pad_id, token_types=True)
            forwards.append(filler)
            labels.append(torch.full_like(filler["input_ids"], -100))
        return {"forwards": forwards, "labels": labels, "normaliser": sum(len(p) for p, _ in masks.values())}

    def _mask(self, row: int) -> tuple[Tensor, Tensor]:
        """Masked positions of a text and the ids that stand there instead."""
        rng = np.random.default_rng([self.seed, self.epoch, row])
        ids = self.store[row]
        free = np.flatnonzero((ids != self.text_format.cls_id) & (ids != self.text_format.sep_id))
        count = min(len(free), max(1, round(MASKED_SHARE * len(free))))
        positions = np.sort(rng.choice(free, count, replace=False)) if count else free
        fate = rng.random(count)
        other = rng.integers(0, self.vocabulary, count)
        ids = np.where(fate < 0.8, self.mask_id, np.where(fate < 0.9, other, ids[positions]))
        return torch.from_numpy(positions), torch.from_numpy(ids)


class WarmUpTrainer(BatchTrainer):
    """Cross-entropy on the masked positions; the vocabulary projection is computed for those alone."""

    def __init__(self, model: BertForMaskedLM, settings: TrainingSettings, texts: MaskedTexts, out: Path):
        super().__init__(model, settings, texts, None, out, "eval_loss")

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        """This process's part of the mean cross-entropy per masked token: a scalar."""
        losses = []
        for forward, labels in zip(inputs["forwards"], inputs["labels"]):
            logits = model(**forward).logits[labels != -100].float()
            losses.append(nn.functional.cross_entropy(logits, labels[labels != -100], reduction="sum"))
        return self.global_loss(torch.stack(losses).sum(), num_items_in_batch or inputs["normaliser"])


def warm_up(
    model: BertForSequenceClassification,
    text_format: StudentFormat,
    candidates: Path,
    out: Path,
    settings: TrainingSettings,
) -> WarmUpTrainer:
    """Train the model's encoder in place on the texts of a candidates table."""
    masked = BertForMaskedLM(model.config)
    masked.bert.embeddings, masked.bert.encoder = model.bert.embeddings, model.bert.encoder
    masked.tie_weights()
    texts = MaskedTexts(_texts(candidates, text_format), text_format, settings.forward_tokens, settings.seed)
    trainer = WarmUpTrainer(masked, settings, texts, out)
    trainer.start()
    means = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    LOGGER.info("masked-LM warm-up: mean loss %.3f nats a masked token over %d texts", means[-1], len(texts.store))
    return trainer


def _texts(candidates: Path, text_format: StudentFormat) -> TokenStore:
    def pairs() -> Iterator[EncodedPair]:
        for rows in iter_table(candidates, "candidates"):
            fields = (rows.column(name).to_pylist() for name in ("query", "title", "summary"))
            yield from text_format.encode_documents(*fields).pairs

    store = TokenStore.of_pairs(pairs())
    if not len(store):
        raise InputError(f"{candidates}: no candidate to warm up on")
    return store
