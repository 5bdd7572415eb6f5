"""Weights of rankers in a blend, from judgments where there are any: a linear RankNet, pulled towards equal weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from ranking.errors import InputError

PULL = 1.0  # what a ranker's way from the equal weight to 0 must save, in queries' mean loss (docs/decisions.md)


def fit_weights(
    scores: NDArray[np.float64], grades: NDArray[np.integer], groups: NDArray[np.integer], pull: float = PULL
) -> NDArray[np.float64]:
    """Weights [rankers], not negative, sum 1, that order the judged documents of a query best.

    scores: standardised scores [documents, rankers]; grades, groups: [documents], as in training/trainer/losses.py.
    Minimises, over weights w = scale * u, the sum over queries of the mean of log(1 + exp(-w . (x_i - x_j))) over
    pairs with grade_i > grade_j (RankNet, Burges et al. 2005), plus pull * sum (u_k - 1)^2: a few judged queries say
    little of the weights, and equal ones are hard to beat. Without a usable pair the weights are equal.
    """
    if len(scores) != len(grades) or len(grades) != len(groups):
        raise ValueError(f"{len(scores)} scores, {len(grades)} grades, {len(groups)} groups: must be equal")
    rankers = scores.shape[1]
    margins, weight = _judged_margins(scores, grades, groups)
    if not len(margins):
        return np.full(rankers, 1 / rankers)

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scale, shape = np.exp(parameters[0]), parameters[1:]
        margin = margins @ (scale * shape)
        pushed = -weight / (1 + np.exp(np.clip(margin, -500, 500)))  # derivative of the loss by the margin
        gradient = margins.T @ pushed
        value = float((weight * np.logaddexp(0, -margin)).sum() + pull * np.square(shape - 1).sum())
        return value, np.concatenate([[scale * gradient @ shape], scale * gradient + 2 * pull * (shape - 1)])

    bounds = [(-5.0, 5.0), *[(0.0, None)] * rankers]
    found = minimize(loss, np.concatenate([[0.0], np.ones(rankers)]), jac=True, bounds=bounds, method="L-BFGS-B")
    shape = found.x[1:]
    if not np.isfinite(shape).all():
        raise InputError("the weights of the blend could not be fitted: a ranker's scores are not finite")
    return shape / shape.sum() if shape.sum() > 0 else np.full(rankers, 1 / rankers)


def _judged_margins(scores, grades, groups) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Score differences of all same-query pairs with different grades [pairs, rankers], and 1 / pairs of the query."""
    margins, weights = [np.empty((0, scores.shape[1]))], [np.empty(0)]
    order = np.argsort(groups, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        better, worse = np.nonzero(grades[members][:, None] > grades[members][None, :])
        if len(better):
            margins.append(scores[members[better]] - scores[members[worse]])
            weights.append(np.full(len(better), 1 / len(better)))
    return np.concatenate(margins), np.concatenate(weights)
