"""A start for small models: word embeddings fitted by late interaction, seconds before the model itself is trained.

A cross-encoder from random weights stays near a constant score for hundreds of steps: no gradient reaches the word
embeddings while attention does not compare words, and attention learns nothing while like words do not lie near each
other. A scorer without an encoder has no such knot: score = sum over query tokens of logsumexp over document tokens of
their embeddings' product (ColBERT's sum of maxima, arXiv 2004.12832, made soft, since a maximum credits one word alone).
Its embeddings become a student's, and the first layers' attention starts by comparing them (see _hand_over).

A small decoder has learnt in stage 1 to find a query's words again in the document, whatever order that puts documents
in. Its few judged queries teach it sooner which words stand for one another where the fit moves those words near each other
first: what its layers do with a word they have seen, they then do with its like.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from training import losses
from training.group_batches import RankingGroups
from training.student_model import StudentModel

log = logging.getLogger(__name__)

BATCH_QUERIES = 16
GROUP_DOCUMENTS = 20
COMPARING_LAYERS = 2
WORD_SPREAD = 0.5
SEGMENT_SPREAD = 0.6  # per dimension, as the spread of words
COMPARISON_GAIN = 1.4
PRETRAINED_SPREAD = 0.1  # of a decoder's embeddings in the fit; with 0.4 the fit moves them less, and helps less
PEAK_RATE = 1e-2


def late_interaction(words: nn.Embedding, ids: Tensor, is_query: Tensor, is_document: Tensor) -> Tensor:
    """Scores float [rows] of padded pairs. ids: int [rows, tokens]; the masks, bool [rows, tokens], say whose a token is."""
    vectors = words(ids)
    products = vectors @ vectors.transpose(1, 2)
    per_word = products.masked_fill(~is_document[:, None, :], -1e4).logsumexp(2)
    # a query word's score is above the bare count of document words: long documents must not win by length
    per_word = per_word - is_document.sum(1, keepdim=True).clamp(min=1).log()
    return (per_word * is_query).sum(1)


def start_by_matching(student: StudentModel, groups: RankingGroups, steps: int, seed: int) -> float:
    """Fit embeddings to the groups' order and put them into the student; returns the mean RankNet loss of the last tenth.

    groups: the training groups, targets grades or teacher scores [documents]. The student must be from scratch.
    """
    generator = torch.Generator().manual_seed(seed)
    model = cast(Any, student.model)
    words = nn.Embedding(*model.bert.embeddings.word_embeddings.weight.shape)
    with torch.no_grad():
        words.weight.normal_(0.0, 0.2, generator=generator)
    last = fit_words(words, groups, student.text.pad_id, (student.text.cls_id, student.text.sep_id), steps, seed)
    _hand_over(model, words.weight.detach(), generator)
    return last


@torch.no_grad()
def move_words_by_matching(
    decoder: Any, groups: RankingGroups, pad_id: int, special_ids: Sequence[int], steps: int, seed: int
) -> float:
    """Move a decoder's word embeddings by a fit to the groups' order that starts from them; returns the loss as above.

    groups: graded groups whose store has marks, the first document token of each text. special_ids: tokens that are no
    word; the layout's own words stay in, the fit is better with them (docs/decisions.md).
    """
    learnt = decoder.get_input_embeddings().weight
    start = learnt - learnt.mean(0)  # a direction that all words share would make all of them alike
    scale = PRETRAINED_SPREAD / start.std()
    words = nn.Embedding(*learnt.shape)
    words.weight.copy_(start * scale)
    with torch.enable_grad():
        last = fit_words(words, groups, pad_id, special_ids, steps, seed)
    learnt += words.weight / scale - start
    return last


def fit_words(
    words: nn.Embedding, groups: RankingGroups, pad_id: int, special_ids: Sequence[int], steps: int, seed: int
) -> float:
    """Train word embeddings so that late interaction orders the groups (RankNet); the mean loss of the last tenth."""
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.Adam(words.parameters(), lr=PEAK_RATE)
    special = torch.tensor(sorted(special_ids))
    seen: list[float] = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = PEAK_RATE * (1 - step / steps)
        chosen, owner = _draw(groups, rng)
        batch = groups.store.pad(chosen.tolist(), pad_id, token_types=True)
        ids, types = batch["input_ids"], batch["token_type_ids"]
        plain = ~torch.isin(ids, special) & (batch["attention_mask"] > 0)
        scores = late_interaction(words, ids, plain & (types == 0), plain & (types == 1))
        loss = losses.ranknet(scores, torch.from_numpy(groups.targets[chosen]), torch.from_numpy(owner))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seen.append(loss.item())
    last = float(np.mean(seen[-max(1, steps // 10) :]))
    log.info("word embeddings fitted in %d late-interaction steps, loss %.3f to %.3f", steps, seen[0], last)
    return last


def _draw(groups: RankingGroups, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a batch and the query each belongs to."""
    queries = rng.choice(len(groups), size=min(BATCH_QUERIES, len(groups)), replace=False)
    rows, owner = [], []
    for query in queries:
        members = np.arange(groups.starts[query], groups.starts[query + 1])
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
