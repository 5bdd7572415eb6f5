"""Rankers of word embeddings alone: fitted in seconds, for measurements that train dozens of students.

The score is the late interaction from which students from scratch start (training/student/word_embedding_start.py). On
the built-in world, whose difficulty lies in words that mean the same, it ranks as well as a BERT from scratch; of real
text it knows only the words that it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.students.runs import text_columns
from ranking.limits import FieldLimits
from ranking.text import StudentFormat, load_tokenizer
from training.student.student_groups import groups_of
from training.student.vocabulary import train_wordpiece
from training.student.word_embedding_start import fit_words, word_scores
from training.trainer import losses
from training.trainer.group_batches import RankingGroups
from training.trainer.ranking_trainer import RankingLoss
from training.trainer.token_store import TokenStore, split_by_tokens

WIDTH = 64
SCORE_TOKENS = 16_384  # of one scored batch
LIMITS = FieldLimits(max_query_tokens=16, max_title_tokens=24, max_summary_tokens=48)


def word_format(data: Path, folder: Path) -> StudentFormat:
    """The text format of all word rankers of a dataset; its vocabulary is kept in the folder."""
    if not (folder / "tokenizer.json").is_file():
        train_wordpiece(data, folder, 4000)
    return StudentFormat(load_tokenizer(folder), LIMITS)


@dataclass(frozen=True)
class WordRanker:
    """Embeddings of a text format's tokens, ready to score."""

    words: nn.Embedding
    text_format: StudentFormat

    @classmethod
    def fit(
        cls,
        text_format: StudentFormat,
        groups: RankingGroups,
        steps: int,
        seed: int,
        loss: RankingLoss = losses.ranknet,
    ) -> WordRanker:
        """A ranker of these groups: steps of 16 queries, up to 20 documents each; targets as the loss wants them."""
        words = nn.Embedding(text_format.tokenizer.get_vocab_size(), WIDTH)
        fit_words(words, text_format, groups, steps, seed, torch.Generator().manual_seed(seed), loss)
        return cls(words, text_format)

    @classmethod
    def of_table(
        cls, text_format: StudentFormat, pieces: Iterable[pa.Table], target: str, steps: int, seed: int
    ) -> WordRanker:
        """A ranker of judgments (target "grade") or labelled candidates ("teacher_score"), by their order."""
        return cls.fit(text_format, groups_of(pieces, target, text_format), steps, seed)

    def scores(self, rows: pa.Table) -> NDArray[np.float32]:
        """float32 [rows]: scores of a judgments or candidates table."""
        store = TokenStore.of_pairs(self.text_format.encode(*text_columns(rows)))
        found = np.empty(len(store), np.float32)
        with torch.inference_mode():
            for batch in split_by_tokens(store.lengths, SCORE_TOKENS):
                found[batch] = word_scores(self.words, self.text_format, store, batch).numpy()
        return found
