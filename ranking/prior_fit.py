"""How much an arm should trust the first stage's score: the weight of its PriorBlend, fitted on judged queries."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ranking.metrics import JudgedRanking
from ranking.prior import PriorBlend

K = 5  # the weight is chosen by NDCG at this depth
_WEIGHTS = np.arange(21) / 20  # of the prior, from the model alone to the prior alone


def fit_prior(
    scores: NDArray[np.float32],
    first_stage: NDArray[np.float32],
    grades: NDArray[np.integer],
    groups: NDArray[np.integer],
    queries: int,
    blended: Callable[[PriorBlend], NDArray[np.float32]] | None = None,
) -> tuple[PriorBlend, NDArray[np.float64]]:
    """The weight of highest mean NDCG@5, of equal ones the lowest; and an honest NDCG@5 per query, float64 [queries].

    For the latter each half of the queries is ranked with the weight that the other half prefers. scores, first_stage:
    float32 [n], NaN for a pair without a score of the first stage; grades: [n]; groups: int [n], the query of each
    pair, 0 to queries - 1; blended: the scores that an arm gives with such a blend, where that is more than to blend.
    """
    scale = float(scores.mean()), float(scores.std()) or 1.0

    def ndcg5(weight: float) -> NDArray[np.float64]:
        blend = PriorBlend(weight, *scale)
        final = blend.blend(scores, first_stage, groups) if blended is None else blended(blend)
        return JudgedRanking(final, grades, groups, queries).ndcg(K)

    found = np.stack([ndcg5(float(weight)) for weight in _WEIGHTS])

    def best(chosen: NDArray[np.bool_]) -> int:
        return int(np.argmax(np.round(found[:, chosen].mean(1), 9)))

    even = np.arange(found.shape[1]) % 2 == 0
    honest = np.empty(found.shape[1])
    if even.all():
        honest[:] = found[0]  # one query has no other half
    else:
        honest[even], honest[~even] = found[best(~even)][even], found[best(even)][~even]
    return PriorBlend(float(_WEIGHTS[best(np.full(len(even), True))]), *scale), honest
