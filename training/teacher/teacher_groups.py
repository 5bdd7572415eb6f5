"""Judgments as the groups that a teacher trains on: one teacher text per document, grades as targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ranking.errors import InputError
from ranking.schema import read_table
from ranking.text import TeacherFormat
from training.teacher.decoder import encode_pairs
from training.trainer.group_batches import RankingGroups


def judged_groups(path: Path, text_format: TeacherFormat, queries: int = 0) -> RankingGroups:
    """The groups of a judgments file as teacher texts, document starts marked; targets are the grades.

    queries: keep the first so many, 0 all.
    """
    rows = read_table(path, "judgments")
    if not len(rows):
        raise InputError(f"{path}: no judgment")
    if queries:
        kept = dict.fromkeys(rows.column("query_id").to_pylist())
        chosen = set(list(kept)[:queries])
        rows = rows.take([i for i, q in enumerate(rows.column("query_id").to_pylist()) if q in chosen])
    ids, starts = encode_pairs(text_format, *(rows.column(name).to_pylist() for name in ("query", "title", "summary")))
    grades = rows.column("grade").to_numpy().astype(np.float32)
    return RankingGroups.of_rows(rows.column("query_id").to_pylist(), grades, ids, starts)
