"""How several teachers' scores become one: ranks in a query, weights by ridge regression; how far they disagree."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
FOLDS = 5


def rank_fractions(scores: NDArray[np.floating], groups: NDArray[np.integer]) -> NDArray[np.float64]:
    """The share of a query's other documents that a document stands above, a tie counting half: float64 [n] in 0..1.

    scores: [n]; groups: int [n], the query of each row. A document alone has 0.5.
    """
    fractions = np.full(len(scores), 0.5)
    order = np.argsort(groups, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        if len(members) > 1:
            fractions[members] = (rankdata(scores[members]) - 1) / (len(members) - 1)
    return fractions


def disagreement(columns: NDArray[np.floating]) -> NDArray[np.float32]:
    """Standard deviation over teachers of a pair's scores on one scale: columns [n, teachers] -> float32 [n]."""
    return columns.std(axis=1).astype(np.float32)


def ridge_weights(
    columns: NDArray[np.float64], grades: NDArray[np.integer], groups: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Stacking (Wolpert 1992; Breiman 1996): weights [teachers] of a ridge regression of grades on teachers' scores.

    columns: standardised scores [n, teachers]; grades, groups: int [n]. Scores and grades are centred within each
    query, since only the order there is wanted. The penalty is that of PENALTIES with the least squared error on
    queries that were left out, FOLDS times. Weights may be negative. Without two grades, or two scores, in any query
    they are equal.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)

    def centred(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values - (np.bincount(group, values) / sizes)[group]

    inputs = np.stack([centred(column) for column in columns.T.astype(np.float64)], axis=1)
    targets = centred(grades.astype(np.float64))
    if not targets.any() or not np.abs(inputs).max() > 1e-9:  # all would be 0, and with them the labels
        return np.full(columns.shape[1], 1 / columns.shape[1])

    def fitted(rows: NDArray[np.bool_], penalty: float) -> NDArray[np.float64]:
        gram = inputs[rows].T @ inputs[rows] + penalty * np.eye(inputs.shape[1])
        return np.linalg.solve(gram, inputs[rows].T @ targets[rows])

    def left_out_error(penalty: float) -> float:
        folds = group % FOLDS
        return sum(
            float(np.square(targets[folds == fold] - inputs[folds == fold] @ fitted(folds != fold, penalty)).sum())
            for fold in np.unique(folds)
        )

    return fitted(np.ones(len(targets), bool), min(PENALTIES, key=left_out_error))
