"""Rankers that score a pool before anybody labels it: BM25, checkpoints, and columns of scores that the pool has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ranking.bm25 import bm25_scores
from ranking.errors import InputError

if TYPE_CHECKING:  # torch takes seconds to import, and most draws need no model
    from training.evaluation.checkpoint_scores import Scorer

RANKERS = "bm25, column:NAME or checkpoint:PATH"
COLUMN_PREFIX = "score_"  # of a pool's score column inside DuckDB, where its own name may be a word of SQL


class PoolRanker:
    """One ranker by its source, as RANKERS names it. InputError if it is none of them or cannot be opened.

    column: the pool's column that it reads, None for the others.
    """

    def __init__(self, source: str):
        kind, _, where = source.partition(":")
        if source != "bm25" and not (kind in ("column", "checkpoint") and where):
            raise InputError(f"--ranker {source}: {RANKERS} is expected")
        if kind == "column" and not re.fullmatch(r"[A-Za-z_]\w*", where, re.ASCII):
            raise InputError(f"--ranker {source}: a column's name must be of ASCII letters, digits and _; rename it")
        self.column = where if kind == "column" else None
        self._scorer: Scorer | None = None
        if kind == "checkpoint":
            from training.evaluation.checkpoint_scores import Scorer

            self._scorer = Scorer.load(where)

    def scores(self, rows: pa.Table) -> NDArray[np.float64]:
        """float [rows]: scores of rows with query, title and summary, and its column where it reads one.

        BM25's word statistics are those of the rows.
        """
        if self.column is not None:
            return rows.column(COLUMN_PREFIX + self.column).to_numpy()
        texts = [rows.column(name).to_pylist() for name in ("query", "title", "summary")]
        if self._scorer is None:
            return bm25_scores(*texts).astype(np.float64)
        # an order to draw by, not a label: the faster products will do
        return self._scorer.score(*texts, precision="auto").astype(np.float64)


def pool_rankers(sources: Sequence[str]) -> list[PoolRanker]:
    """The rankers of these sources, each once. InputError names one that is unknown or stands twice."""
    if len(set(sources)) < len(sources):
        raise InputError(f"--ranker {' '.join(sources)}: each ranker once")
    return [PoolRanker(source) for source in sources]
