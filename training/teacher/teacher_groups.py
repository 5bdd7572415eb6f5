"""Judgments as the groups that a teacher trains on: one teacher text per document, grades as targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ranking.schema import read_judgments
from ranking.text import TeacherFormat
from training.trainer.group_batches import RankingGroups
from training.trainer.token_store import TokenStore


def judged_groups(path: Path, text_format: TeacherFormat, queries: int = 0) -> RankingGroups:
    """The groups of a judgments file as teacher texts; targets are the grades.

    queries: keep the first so many, 0 all.
    """
    rows = read_judgments(path)
    if queries:
        kept = dict.fromkeys(rows.column("query_id").to_pylist())
        chosen = set(list(kept)[:queries])
        rows = rows.take([i for i, q in enumerate(rows.column("query_id").to_pylist()) if q in chosen])
    texts = text_format.encode(*(rows.column(name).to_pylist() for name in ("query", "title", "summary")))
    grades = rows.column("grade").to_numpy().astype(np.float32)
    return RankingGroups.of_rows(rows.column("query_id").to_pylist(), grades, TokenStore.of_pairs(texts))
