"""Scores pairs with any checkpoint: teacher, student, baseline, or a plain Hugging Face cross-encoder.

    scores = score_pairs("runs/student", queries, titles, summaries)   # float32 [n], raw logits

Documents are batched by length within a token budget, so a CPU spends little on padding. The teacher is pooled here by
the length of each text, not by the model's own search for the last non-pad token, which finds the wrong one where pad =
eos.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ranking.card import CARD_NAME, ScoreCard, require_adapted
from ranking.chunks import pool
from ranking.encoder_families import longest_input
from ranking.errors import InputError
from ranking.pretrained import refuse_missing_folder
from ranking.telemetry import bars_are_read
from ranking.text import StudentFormat, TeacherFormat, normalise
from training.trainer.attention import exact_attention
from training.trainer.token_store import TokenStore, split_by_tokens
from training.trainer.training_settings import bf16_is_native

LOGGER = logging.getLogger(__name__)
PLAIN_MAX_TOKENS = 512

Precision = Literal["auto", "float32", "bfloat16"]
# (model, one padded batch of TokenStore.pad) -> float [rows]
Forward = Callable[[Any, dict[str, Tensor]], Tensor]


@dataclass
class Scorer:
    """A checkpoint ready to score: its model in evaluation mode, how it reads text, and how it pools.

    card: None for a cross-encoder that is not ours; encode: (queries, titles, summaries) -> token store with a text per
    row, or with one per chunk of each row's document, and then where each row's texts start, int64 [n + 1].
    """

    model: Any
    card: ScoreCard | None
    encode: Callable[[Sequence[str], Sequence[str], Sequence[str]], tuple[TokenStore, NDArray[np.int64] | None]]
    forward: Forward
    pad_id: int
    token_types: bool

    @classmethod
    def load(cls, checkpoint: str | Path, device: str | None = None) -> Scorer:
        """Open a checkpoint folder, or a hub id. InputError: no such folder, no score head, or a card of another."""
        refuse_missing_folder(checkpoint)
        card = ScoreCard.load(checkpoint) if (Path(checkpoint) / CARD_NAME).is_file() else None
        if card is not None:
            card.require(checkpoint, "teacher", "student", "baseline")
        model = _load_model(checkpoint)
        exact_attention(model)  # as it was trained and is served
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        if card is None:
            return _plain_scorer(checkpoint, model)
        return (
            _teacher_scorer(checkpoint, model, card)
            if card.role == "teacher"
            else _student_scorer(checkpoint, model, card)
        )

    @torch.inference_mode()
    def score(
        self,
        queries: Sequence[str],
        titles: Sequence[str],
        summaries: Sequence[str],
        *,
        batch_tokens: int = 8192,
        precision: Precision = "float32",
        progress: str | None = None,
    ) -> NDArray[np.float32]:
        """Raw scores, float32 [n], one per row; the order of rows does not change them beyond rounding.

        batch_tokens: padded tokens of one forward; precision: bfloat16 runs matrix products under autocast, auto does
        where the device multiplies it natively; progress: the progress bar's label, None for no bar. InputError if a
        score is not finite.
        """
        if not len(queries) == len(titles) == len(summaries):
            raise ValueError(f"{len(queries)} queries, {len(titles)} titles, {len(summaries)} summaries: must be equal")
        if not len(queries):
            return np.zeros(0, np.float32)
        store, starts = self.encode(queries, titles, summaries)
        self._check_ids(store)
        scores = np.full(len(store), np.nan, np.float32)
        device = next(self.model.parameters()).device
        bf16 = bf16_is_native() if precision == "auto" else precision == "bfloat16"
        with tqdm(total=len(store), desc=progress, unit="text", disable=not (progress and bars_are_read())) as bar:
            for rows in split_by_tokens(store.lengths, batch_tokens):
                batch = {
                    name: t.to(device) for name, t in store.pad(rows.tolist(), self.pad_id, self.token_types).items()
                }
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    scores[rows] = self.forward(self.model, batch).float().cpu().numpy()
                bar.update(len(rows))
        if bad := int((~np.isfinite(scores)).sum()):
            raise InputError(
                f"{bad} of {len(scores)} scores are not finite; in bfloat16, try float32, else train again"
            )
        return scores if starts is None or self.card is None else pool(scores, starts, self.card.chunking.pooling)

    def _check_ids(self, store: TokenStore) -> None:
        rows, highest = self.model.get_input_embeddings().weight.shape[0], int(store.ids.max())
        if highest >= rows:
            raise InputError(
                f"token id {highest}, but the model has {rows} embeddings: the tokenizer is another model's"
            )


def score_pairs(
    checkpoint: str | Path,
    queries: Sequence[str],
    titles: Sequence[str],
    summaries: Sequence[str],
    *,
    batch_tokens: int = 8192,
    precision: Precision = "float32",
    device: str | None = None,
    progress: str | None = None,
) -> NDArray[np.float32]:
    """Raw scores, float32 [n], of n pairs by one checkpoint; see Scorer."""
    scorer = Scorer.load(checkpoint, device)
    return scorer.score(queries, titles, summaries, batch_tokens=batch_tokens, precision=precision, progress=progress)


def _load_model(checkpoint: str | Path) -> Any:
    """The sequence-classification model with every weight from the checkpoint: a head made up at load is refused."""
    if (Path(checkpoint) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForSequenceClassification

        require_adapted(checkpoint)
        # the head is among the adapter's saved modules; merging leaves a plain model that pools and scores as trained
        return AutoPeftModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1).merge_and_unload()
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            checkpoint, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError) as problem:
        reason = " ".join(str(problem).split())
        raise InputError(f"{checkpoint}: cannot be opened as a cross-encoder: {reason[:300]}") from problem
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise InputError(f"{checkpoint}: not a trained ranker, its weights lack {missing}")
    if model.config.num_labels != 1:
        raise InputError(f"{checkpoint}: {model.config.num_labels} labels; a ranker has one score per document")
    return model


def _teacher_scorer(checkpoint: str | Path, model: Any, card: ScoreCard) -> Scorer:
    text_format = TeacherFormat.of_checkpoint(checkpoint)

    def encode(queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]) -> tuple[TokenStore, None]:
        return TokenStore.of_pairs(text_format.encode(queries, titles, summaries)), None

    if card.pooling not in ("last_token", "mean"):
        raise InputError(f"{checkpoint}: a teacher pools last_token or mean, not {card.pooling}")
    pool = _last_state if card.pooling == "last_token" else _mean_state

    def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
        backbone = getattr(model, model.base_model_prefix)
        states = pool(backbone(**batch, use_cache=False).last_hidden_state, batch["attention_mask"])
        # the head in float32 whatever autocast says: a bfloat16 logit has 8 bits, too few to keep order
        with torch.autocast(states.device.type, enabled=False):
            return model.score(states.to(model.score.weight.dtype))[:, 0]

    return Scorer(model, card, encode, forward, text_format.eos_id, token_types=False)


def _last_state(states: Tensor, mask: Tensor) -> Tensor:
    """[rows, tokens, width] -> [rows, width]: the last real token of right-padded rows."""
    return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]


def _mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """[rows, tokens, width] -> [rows, width]: the mean over real tokens."""
    weights = mask[:, :, None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def _student_scorer(checkpoint: str | Path, model: Any, card: ScoreCard) -> Scorer:
    text_format = StudentFormat.of_checkpoint(checkpoint)

    def encode(
        queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]
    ) -> tuple[TokenStore, NDArray[np.int64]]:
        documents = text_format.encode_documents(queries, titles, summaries)
        return TokenStore.of_pairs(documents.pairs), documents.starts

    return Scorer(model, card, encode, _logit, text_format.pad_id, text_format.token_types)


def _plain_scorer(checkpoint: str | Path, model: Any) -> Scorer:
    """A cross-encoder without a card: its own tokenizer's pair template over (query, title + summary)."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if tokenizer.pad_token_id is None:
        raise InputError(f"{checkpoint}: the tokenizer has no padding token, so documents cannot be batched")
    # many tokenizers name no length, and text beyond the model's positions would end in an error
    positions = longest_input(model.config) if getattr(model.config, "max_position_embeddings", 0) else PLAIN_MAX_TOKENS
    limit = min(tokenizer.model_max_length, positions, PLAIN_MAX_TOKENS)
    has_types = "token_type_ids" in tokenizer.model_input_names

    def encode(queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]) -> tuple[TokenStore, None]:
        documents = [normalise(f"{title} {summary}") for title, summary in zip(titles, summaries)]
        encoded = tokenizer([normalise(query) for query in queries], documents, truncation=True, max_length=limit)
        # a template of somebody else's: its token types are all that says where the document starts
        types = encoded.get("token_type_ids")
        document_starts = [len(row) - sum(row) for row in types] if types is not None else None
        return TokenStore.build(encoded["input_ids"], document_starts), None

    return Scorer(model, None, encode, _logit, tokenizer.pad_token_id, token_types=has_types)


def _logit(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits[:, 0]
