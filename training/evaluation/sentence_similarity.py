"""Embedding similarity of query and document by a pretrained sentence encoder: a ranker that needs no training.

A sentence encoder is a BERT whose token states are averaged and normalised to length 1 (Sentence-BERT, Reimers and
Gurevych, arXiv 1908.10084); the similarity of two texts is the cosine of their vectors. Every distinct text is embedded
once, so a document that is a candidate of many queries costs one forward.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ranking.errors import InputError
from ranking.pretrained import checkpoint_of
from ranking.telemetry import bars_are_read
from ranking.text import normalise
from training.trainer.token_store import TokenStore, split_by_tokens

LOGGER = logging.getLogger(__name__)


@dataclass
class SentenceEncoder:
    """An encoder ready to embed. max_tokens: length limit of a text, special tokens included.

    Texts that were compared once keep their vectors, about 2 KB each: judged pairs repeat the candidates' documents.
    """

    model: Any
    tokenizer: Any
    max_tokens: int
    _known: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str, max_tokens: int = 128, device: str | None = None) -> SentenceEncoder:
        """Open a sentence encoder: `minilm`, a folder or a hub id. InputError if it is no BERT with a tokenizer."""
        where = checkpoint_of(name)
        try:
            if AutoConfig.from_pretrained(where).model_type != "bert":
                raise InputError(f"{name}: not a BERT; embedding similarity wants a BERT sentence encoder")
            model = AutoModel.from_pretrained(where, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(where)
        except (OSError, ValueError) as problem:
            reason = " ".join(str(problem).split())[:300]
            raise InputError(f"{name}: cannot be opened as a sentence encoder: {reason}") from problem
        limit = min(max_tokens, model.config.max_position_embeddings)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device).eval(), tokenizer, limit)

    @torch.inference_mode()
    def embed(
        self, texts: Sequence[str], *, batch_tokens: int = 8192, bf16: bool = False, progress: str | None = None
    ) -> NDArray[np.float32]:
        """Vectors of length 1, float32 [texts, width], one per text.

        batch_tokens: padded tokens of one forward; bf16: matrix products in bfloat16; progress: the bar's label.
        """
        cleaned = [normalise(text) for text in texts]
        encoded = self.tokenizer(cleaned, truncation=True, max_length=self.max_tokens)["input_ids"] if cleaned else []
        vectors = np.zeros((len(cleaned), self.model.config.hidden_size), np.float32)
        device = next(self.model.parameters()).device
        store = TokenStore.build(encoded)
        with tqdm(
            total=len(cleaned), desc=progress, unit="text", disable=not (progress and bars_are_read()), leave=False
        ) as bar:
            for rows in split_by_tokens(store.lengths, batch_tokens):
                batch = {
                    name: t.to(device) for name, t in store.pad(rows.tolist(), self.tokenizer.pad_token_id).items()
                }
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    states = self.model(**batch).last_hidden_state.float()
                mask = batch["attention_mask"][:, :, None].float()
                means = (states * mask).sum(1) / mask.sum(1)
                vectors[rows] = torch.nn.functional.normalize(means, dim=1).cpu().numpy()
                bar.update(len(rows))
        return vectors

    def similarity(
        self, queries: Sequence[str], documents: Sequence[str], *, bf16: bool = False, progress: str | None = None
    ) -> NDArray[np.float32]:
        """Cosine of query and document, float32 [n], for n rows."""
        columns = []
        for texts in (queries, documents):
            place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
            new = [text for text in place if text not in self._known]
            self._known |= dict(zip(new, self.embed(new, bf16=bf16, progress=progress)))
            vectors = np.stack([self._known[text] for text in place]) if place else np.empty((0, 1), np.float32)
            columns.append((vectors, np.fromiter((place[text] for text in texts), np.int64, len(texts))))
        (of_queries, query), (of_documents, document) = columns
        scores = np.empty(len(query), np.float32)
        for start in range(0, len(query), 65536):  # the gathered vectors of a piece, not of all rows, are in memory
            piece = slice(start, start + 65536)
            scores[piece] = np.einsum("ij,ij->i", of_queries[query[piece]], of_documents[document[piece]])
        return scores
