"""The first stage's score of a document as a prior beside the model's: how a published arm blends the two.

    blended score = (1 - weight) * score + weight * (mean + spread * z)

z is the prior standardised within its list, because the first stage's scores have another scale for every query (BM25
grows with the number of query words). mean and spread bring it to the scale of the model's own scores, so thresholds on
raw scores keep their meaning. Every published version carries this file: NumPy alone, and build and server blend alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class PriorBlend:
    """How much an arm trusts the prior.

    Args:
        weight: share of the prior: 0 is the model alone, 1 the prior alone
        mean: mean of the model's raw scores on the judged pairs that the weight was fitted on
        spread: their standard deviation
    """

    weight: float = 0.0
    mean: float = 0.0
    spread: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight is {self.weight}: a share from 0 to 1 is needed")
        if not math.isfinite(self.mean) or not 0 < self.spread < math.inf:
            raise ValueError(f"mean is {self.mean}, spread is {self.spread}: finite, and a spread above 0, are needed")

    def blend(
        self, scores: NDArray[np.float32], prior: ArrayLike, groups: NDArray[np.integer] | None = None
    ) -> NDArray[np.float32]:
        """Blended scores, float32 [n]. A list without any prior keeps its scores exactly.

        scores: float32 [n]; prior: float [n], NaN for a document without one; groups: int [n], the list that each row
        belongs to; None: all rows are one list.
        """
        given = np.asarray(prior, np.float64)
        if groups is None:
            groups = np.zeros(len(scores), np.int64)
        if not len(scores) == len(given) == len(groups):
            raise ValueError(f"{len(scores)} scores, {len(given)} priors, {len(groups)} groups: one of each is needed")
        z, has_prior = standardised(given, groups)
        on_model_scale = self.mean + self.spread * z
        blended = (1 - self.weight) * scores.astype(np.float64) + self.weight * on_model_scale
        return np.where(has_prior, blended, scores).astype(np.float32)


def standardised(
    prior: NDArray[np.float64], groups: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The prior with mean 0 and standard deviation 1 in each list, float64 [n]; and which lists have any, bool [n].

    A document without a prior (NaN) stands at its list's mean, 0: nothing is known for or against it. So does every
    document of a list whose priors are all equal.
    """
    _, codes = np.unique(groups, return_inverse=True)
    known = ~np.isnan(prior)
    values = np.where(known, prior, 0.0)
    count = np.bincount(codes, known)
    each = np.maximum(count, 1)
    centred = np.where(known, values - (np.bincount(codes, values) / each)[codes], 0.0)
    largest = np.zeros(len(count))
    np.maximum.at(largest, codes, np.abs(centred))
    # divided by the largest first, so that squares of huge or tiny priors neither overflow nor vanish
    scaled = np.divide(centred, largest[codes], out=np.zeros(len(prior)), where=largest[codes] > 0)
    spread = np.sqrt(np.bincount(codes, scaled**2) / each)[codes]
    z = np.divide(scaled, spread, out=np.zeros(len(prior)), where=spread > 0)
    return z, count[codes] > 0
