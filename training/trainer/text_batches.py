"""Pre-training texts in batches of little padding; the counterpart of group_batches for texts without groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from training.trainer.token_store import TokenStore, split_by_tokens

SPAN = 32  # batches whose texts are sorted together: a compromise between padding and random batches


class TextBatches(Dataset):
    """The batches of one epoch as this process sees them: item i is its share of global batch i.

    Texts are shuffled, sorted by length within SPAN batches and cut into batches of batch_texts, whose order is
    shuffled again. No two texts share a row, so attention never crosses from one pair into another. The order is a pure
    function of (seed, epoch). An item is {
      "forwards": list of {input_ids, attention_mask, weights: float [rows, longest], 0 where nothing is predicted},
      "normaliser": sum of the weights of the global batch on all processes, by which the loss is divided }.
    """

    def __init__(
        self,
        store: TokenStore,
        weights: np.ndarray | None,
        *,
        batch_texts: int,
        forward_tokens: int,
        pad_id: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        assert store.document_starts is not None, "only the document is predicted"
        self.store, self.weights, self.batch_texts = store, weights, batch_texts
        self.forward_tokens, self.pad_id, self.seed = forward_tokens, pad_id, seed
        self.process_index, self.process_count, self.examples = process_index, process_count, len(store)
        self.predicted = store.lengths - store.document_starts  # tokens of the document
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the batches of an epoch and their order."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.store))
        span = SPAN * self.batch_texts
        # sorting by length alone would leave equal lengths in file order; a stable sort keeps the shuffle among them
        order = np.concatenate(
            [
                part[np.argsort(self.store.lengths[part], kind="stable")]
                for part in np.split(order, range(span, len(order), span))
            ]
        )
        self.batches = np.split(order, range(self.batch_texts, len(order), self.batch_texts))
        self.order = rng.permutation(len(self.batches))

    def __len__(self) -> int:
        return -(-len(self.store) // self.batch_texts)

    def real_share(self) -> float:
        """Share of the positions of this epoch's forwards that hold a real token, on one process."""
        lengths = self.store.lengths
        padded = 0
        for batch in self.batches:
            for piece in split_by_tokens(lengths[batch], self.forward_tokens):
                padded += len(piece) * int(lengths[batch][piece].max())
        return float(lengths.sum() / padded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = self.batches[self.order[index]]
        # sorted by length, so dealing texts in turn gives each process about the same tokens
        shares = [batch[process :: self.process_count] for process in range(self.process_count)]
        plans = [split_by_tokens(self.store.lengths[share], self.forward_tokens) for share in shares]
        mine = [self.inputs(shares[self.process_index][piece]) for piece in plans[self.process_index]]
        filler = self.inputs(batch[:1])
        filler["weights"].zero_()
        mine += [filler] * (max(map(len, plans)) - len(mine))
        return {"forwards": mine, "normaliser": float((self.predicted[batch] * self.text_weights(batch)).sum())}

    def text_weights(self, rows: np.ndarray) -> np.ndarray:
        """float64 [rows]: the weights of texts in the loss; 1 where there are none."""
        return np.ones(len(rows)) if self.weights is None else self.weights[rows].astype(np.float64)

    def inputs(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Model inputs of some texts, and the weights of their predicted tokens, float [rows, longest]."""
        inputs = self.store.pad(rows.tolist(), self.pad_id)
        positions = np.arange(inputs["input_ids"].shape[1])
        assert self.store.document_starts is not None
        starts, ends = self.store.document_starts[rows], self.store.lengths[rows]
        output = (positions >= starts[:, None]) & (positions < ends[:, None])
        inputs["weights"] = torch.from_numpy((output * self.text_weights(rows)[:, None]).astype(np.float32))
        return inputs
