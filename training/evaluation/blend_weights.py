"""Weights of rankers in a blend, from judgments where there are any: a linear RankNet, pulled towards equal weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from ranking.errors import InputError
from ranking.metrics import JudgedRanking

# what a ranker's way from the equal weight to 0 must save, in queries' mean loss (docs/decisions.md)
PULLS = (0.03, 0.1, 0.3, 1.0, 3.0)
FOLDS = 5
MAX_PAIRS = 10_000  # of a query: of 10,000 judged documents there may be 25 million
K = 5  # depth of the NDCG that chooses among them


def fit_weights(
    scores: NDArray[np.float64], grades: NDArray[np.integer], groups: NDArray[np.integer], pull: float | None = None
) -> NDArray[np.float64]:
    """Weights [rankers], not negative, sum 1, that order the judged documents of a query best.

    scores: standardised scores [documents, rankers]; grades, groups: [documents], as in training/trainer/losses.py;
    pull: None has choose_pull() find it.
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
    if pull is None:
        pull = choose_pull(scores, grades, groups)

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


def choose_pull(scores: NDArray[np.float64], grades: NDArray[np.integer], groups: NDArray[np.integer]) -> float:
    """The pull whose weights rank queries best that they were not fitted on; of nearly as good ones the strongest.

    Weights are fitted on all folds of the queries but one, and measured by NDCG@5 on that one. A stronger pull is
    preferred while its mean lies within half a standard error of the paired difference to the best.
    """
    queries, codes = np.unique(groups, return_inverse=True)
    if len(queries) < 2:
        return PULLS[-1]
    folds = np.random.default_rng(0).permutation(len(queries)) % min(FOLDS, len(queries))
    found = np.empty((len(PULLS), len(queries)))
    for fold in range(folds.max() + 1):
        out = (folds == fold)[codes]
        _, held = np.unique(codes[out], return_inverse=True)
        for row, pull in enumerate(PULLS):
            # the sum of the losses shrinks with the queries that it is taken over, and so must its counterweight
            weights = fit_weights(scores[~out], grades[~out], groups[~out], pull * (folds != fold).mean())
            ranking = JudgedRanking((scores[out] @ weights).astype(np.float32), grades[out], held)
            found[row, folds == fold] = ranking.ndcg(K)
    behind = found[found.mean(1).argmax()] - found
    error = behind.std(1, ddof=1) / np.sqrt(len(queries))
    return max(pull for pull, mean, se in zip(PULLS, behind.mean(1), error) if mean <= 0.5 * se)


def _judged_margins(scores, grades, groups) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Score differences of same-query pairs with different grades [pairs, rankers], and 1 / pairs of the query.

    All pairs of a query, or MAX_PAIRS drawn ones where it has more.
    """
    margins, weights = [np.empty((0, scores.shape[1]))], [np.empty(0)]
    rng = np.random.default_rng(0)
    order = np.argsort(groups, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        rising = members[np.argsort(grades[members], kind="stable")]
        lower = np.searchsorted(grades[rising], grades[rising])  # documents of a lower grade, the first of `rising`
        pairs = int(lower.sum())
        if pairs > MAX_PAIRS:
            better = np.searchsorted(np.cumsum(lower), rng.integers(pairs, size=MAX_PAIRS), side="right")
            better, worse = rising[better], rising[rng.integers(lower[better])]
        else:
            row, column = np.nonzero(grades[members][:, None] > grades[members][None, :])
            better, worse = members[row], members[column]
        if len(better):
            margins.append(scores[better] - scores[worse])
            weights.append(np.full(len(better), 1 / len(better)))
    return np.concatenate(margins), np.concatenate(weights)
