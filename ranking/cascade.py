"""A cascade of two students: a small one scores every document of a list, a large one the k that it likes best.

The k documents keep the large model's scores. All others stand below them in the small model's order: their scores are
brought to the large model's scale (mean and spread on judged pairs) and, if one of them would reach the k, all are
lowered by the same amount. So scores fall along the final order, and a map from score to probability that rises stays
sane. A prior is blended into the small model's scores before the k are chosen, and into all scores before the others
are lowered, so the k stay above the others with a prior too. A list of at most k documents is the large model's alone.

Every published version carries this file: NumPy alone, and build and server join scores alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

Blend = Callable[[NDArray[np.float32]], NDArray[np.float32]]  # a list's scores -> the same with its priors


def without_prior(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """The Blend of a list that came without priors."""
    return scores


@dataclass(frozen=True)
class Cascade:
    """How an arm joins two models' scores.

    Args:
        k: documents of a list that the large model scores
        mean: mean of the large model's raw scores on judged pairs
        spread: their standard deviation
        first_mean: mean of the small model's raw scores on the same pairs
        first_spread: their standard deviation
    """

    k: int
    mean: float
    spread: float
    first_mean: float
    first_spread: float

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}: the large model scores at least 1 document of a list")
        for spread in (self.spread, self.first_spread):
            if not 0 < spread < math.inf:
                raise ValueError(f"a spread is {spread}: a model whose scores differ between documents is needed")

    @classmethod
    def fit(cls, k: int, scores: NDArray[np.float32], first: NDArray[np.float32]) -> Cascade:
        """From both models' raw scores of the same judged pairs, float32 [n] each."""
        return cls(k, *(float(value) for s in (scores, first) for value in (s.mean(), s.std())))

    def on_scale(self, first: NDArray[np.float32]) -> NDArray[np.float32]:
        """The small model's raw scores on the large one's scale, float32 [n]."""
        z = (first.astype(np.float64) - self.first_mean) / self.first_spread
        return (self.mean + self.spread * z).astype(np.float32)

    def top(self, first: NDArray[np.float32], blend: Blend = without_prior) -> NDArray[np.intp]:
        """The rows that the large model scores, ascending, int [min(k, n)]; of equal scores the earlier row.

        first: the small model's scores on the large one's scale, float32 [n].
        """
        return np.sort(np.argsort(-blend(first), kind="stable")[: self.k])

    def join(
        self,
        first: NDArray[np.float32],
        top: NDArray[np.intp],
        scores: NDArray[np.float32],
        blend: Blend = without_prior,
    ) -> NDArray[np.float32]:
        """The list's final scores, float32 [n]. first, top: as above; scores: the large model's of `top`."""
        joined = first.copy()
        joined[top] = scores
        final = blend(joined)
        rest = np.ones(len(final), bool)
        rest[top] = False
        if rest.any():
            ceiling = np.nextafter(final[top].min(), np.float32(-np.inf))
            excess = float(final[rest].max()) - float(ceiling)
            if excess > 0:
                lowered = (final[rest].astype(np.float64) - excess).astype(np.float32)
                final[rest] = np.minimum(lowered, ceiling)
        return final

    def of_lists(
        self,
        first: NDArray[np.float32],
        scores: NDArray[np.float32],
        groups: NDArray[np.integer],
        blend: Callable[..., NDArray[np.float32]] | None = None,
    ) -> NDArray[np.float32]:
        """What the arm gives to lists whose documents both models have scored, float32 [n].

        first, scores: raw scores of the small and the large model, float32 [n]; groups: int [n], the list that each row
        belongs to; blend: (scores of a list, rows: its rows) -> the same with its priors.
        """
        final = np.empty(len(scores), np.float32)
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            own = without_prior if blend is None else partial(blend, rows=rows)
            if len(rows) <= self.k:
                final[rows] = own(scores[rows])
                continue
            on_scale = self.on_scale(first[rows])
            top = self.top(on_scale, own)
            final[rows] = self.join(on_scale, top, scores[rows][top], own)
        return final
