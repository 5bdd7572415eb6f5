"""A start for students from scratch: word embeddings fitted by late interaction, seconds before the encoder is trained.

A cross-encoder from random weights stays near a constant score for hundreds of steps: no gradient reaches the word
embeddings while attention does not compare words, and attention learns nothing while like words do not lie near each
other. A scorer without an encoder has no such knot: score = sum over query tokens of logsumexp over document tokens of
their embeddings' product (ColBERT's sum of maxima, arXiv 2004.12832, made soft, since a maximum credits one word
alone). Its embeddings become the encoder's, and the first layers' attention starts by comparing them (see _hand_over).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ranking.text import StudentFormat
from training.student.encoder import StudentModel
from training.trainer import losses
from training.trainer.group_batches import RankingGroups
from training.trainer.ranking_trainer import RankingLoss, pool_chunks
from training.trainer.token_store import TokenStore

LOGGER = logging.getLogger(__name__)

BATCH_QUERIES = 16
GROUP_DOCUMENTS = 20
COMPARING_LAYERS = 2
WORD_SPREAD = 0.5
SEGMENT_SPREAD = 0.6  # per dimension, as the spread of words
COMPARISON_GAIN = 1.4


@dataclass(kw_only=True)
class WordEmbeddingSettings:
    """How long the word embeddings of a student from scratch are fitted before its encoder is trained.

    Args:
        match_steps: late-interaction steps that fit the word embeddings of a model from scratch to the order of its
            training set, seconds before training; 0 for none (training/student/word_embedding_start.py)
    """

    match_steps: int = 0

    def __post_init__(self):
        if self.match_steps < 0:
            raise ValueError(f"match_steps is {self.match_steps}: must not be negative")


def late_interaction(words: nn.Embedding, ids: Tensor, is_query: Tensor, is_document: Tensor) -> Tensor:
    """Scores float [rows] of padded pairs.

    ids: int [rows, tokens]; is_query, is_document: bool [rows, tokens], which tokens are whose.
    """
    vectors = words(ids)
    # the query stands first; products of document words with one another would be most of the work and count nothing
    query_end = int((is_query.any(0) * torch.arange(1, ids.shape[1] + 1)).max())
    is_query = is_query[:, :query_end]
    products = vectors[:, :query_end] @ vectors.transpose(1, 2)
    per_word = products.masked_fill(~is_document[:, None, :], -1e4).logsumexp(2)
    # a query word's score is above the bare count of document words: long documents must not win by length
    per_word = per_word - is_document.sum(1, keepdim=True).clamp(min=1).log()
    return (per_word * is_query).sum(1)


def fit_word_embeddings(student: StudentModel, groups: RankingGroups, steps: int, seed: int) -> float:
    """Fit word embeddings to the groups' order and put them into the student.

    Returns the mean RankNet loss of the last tenth of the steps.

    groups: the training groups, targets grades or teacher scores [documents]. The student must be from scratch.
    """
    generator = torch.Generator().manual_seed(seed)
    model = cast(Any, student.model)
    words = nn.Embedding(*model.bert.embeddings.word_embeddings.weight.shape)
    seen = fit_words(words, student.text_format, groups, steps, seed, generator)
    _hand_over(model, words.weight.detach(), generator)
    last = float(np.mean(seen[-max(1, steps // 10) :]))
    LOGGER.info("word embeddings fitted in %d late-interaction steps, loss %.3f to %.3f", steps, seen[0], last)
    return last


def fit_words(
    words: nn.Embedding,
    text_format: StudentFormat,
    groups: RankingGroups,
    steps: int,
    seed: int,
    generator: torch.Generator,
    loss: RankingLoss = losses.ranknet,
) -> list[float]:
    """Fit embeddings, drawn anew, so that late interaction orders the groups' documents; returns the loss of each step.

    groups: targets as the loss wants them, grades or teacher scores; generator: of the first weights.
    """
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        words.weight.normal_(0.0, 0.2, generator=generator)
    optimiser = torch.optim.Adam(words.parameters(), lr=1e-2)
    seen: list[float] = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        chosen, owner = _draw(groups, rng)
        texts, starts = groups.texts_of(chosen)
        scores = word_scores(words, text_format, groups.store, texts)
        if groups.chunk_starts is not None:
            place = torch.from_numpy(np.repeat(np.arange(len(chosen)), np.diff(starts)))
            scores = pool_chunks(scores, place, len(chosen), groups.pooling)
        value = loss(scores, torch.from_numpy(groups.targets[chosen]), torch.from_numpy(owner))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        seen.append(value.item())
    return seen


def word_scores(words: nn.Embedding, text_format: StudentFormat, store: TokenStore, rows: np.ndarray) -> Tensor:
    """Late-interaction scores, float [rows], of these rows of a store of pairs."""
    batch = store.pad(rows.tolist(), text_format.pad_id, token_types=True)
    ids, types = batch["input_ids"], batch["token_type_ids"]
    plain = (ids != text_format.cls_id) & (ids != text_format.sep_id) & (batch["attention_mask"] > 0)
    return late_interaction(words, ids, plain & (types == 0), plain & (types == 1))


def _draw(groups: RankingGroups, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a batch and the query each belongs to."""
    queries = rng.choice(len(groups), size=min(BATCH_QUERIES, len(groups)), replace=False)
    rows, owner = [], []
    for query in queries:
        members = np.arange(groups.group_starts[query], groups.group_starts[query + 1])
        taken = rng.permutation(members)[:GROUP_DOCUMENTS]
        rows.append(taken)
        owner.append(np.full(len(taken), query))
    return np.concatenate(rows), np.concatenate(owner)


@torch.no_grad()
def _hand_over(model: Any, fitted: Tensor, generator: torch.Generator) -> None:
    """Let the first layers compare words, and tell a word that finds its like in the other text from one that does not.

    A word always finds itself: what distinguishes a match is the share of attention that goes to the other segment. So
    the segment is written large along one direction of the embeddings, which values carry and comparisons leave out.
    """
    embeddings = model.bert.embeddings
    embeddings.word_embeddings.weight.copy_(fitted / fitted.std() * WORD_SPREAD)
    width = fitted.shape[1]
    # equal words are near wherever they stand
    embeddings.position_embeddings.weight.normal_(0.0, 0.05, generator=generator)
    segment = torch.randn(width, generator=generator)
    segment /= segment.norm()
    offset = segment * SEGMENT_SPREAD * width**0.5
    embeddings.token_type_embeddings.weight.copy_(torch.stack([offset, -offset]))
    compare = COMPARISON_GAIN * (torch.eye(width) - torch.outer(segment, segment))
    for layer in model.bert.encoder.layer[:COMPARING_LAYERS]:
        attention = layer.attention.self
        noise = torch.empty(width, width).normal_(0.0, 0.02, generator=generator)
        attention.query.weight.copy_(compare + noise)
        attention.key.weight.copy_(attention.query.weight)
