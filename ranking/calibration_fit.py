"""Fits a monotone map from raw scores to the probability of relevance; ranking/calibration.py applies and measures it.

card.calibration = fit("isotonic", dev_scores, dev_grades > 0)
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression, minimize

from ranking.errors import InputError

Kind = Literal["isotonic", "platt"]


def fit(kind: Kind, scores: ArrayLike, relevant: ArrayLike) -> dict[str, Any]:
    """The card's `calibration` entry, fitted on judged documents: float [n] raw scores, bool [n] outcomes.

    isotonic: pool-adjacent-violators (Zadrozny and Elkan 2002); any monotone shape, wants some thousand judgments.
    platt: a logistic curve (Platt 1999, with his smoothed targets); two numbers, works with a few hundred.
    InputError if all documents are relevant or none is, or if Platt's slope is not positive (scores that do not rank).
    """
    x, y = np.asarray(scores, np.float64), np.asarray(relevant).astype(bool)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"scores {x.shape} and outcomes {y.shape} must be 1-d of one length")
    if y.all() or not y.any():
        raise InputError("calibration needs judgments of relevant and of other documents; dev has one kind only")
    return _isotonic(x, y) if kind == "isotonic" else _platt(x, y)


def _isotonic(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    scores, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    fitted = isotonic_regression(np.bincount(place, y) / counts, weights=counts.astype(np.float64)).x
    # only the ends of a flat stretch are knots
    inner = np.zeros(len(scores), bool)
    inner[1:-1] = (fitted[1:-1] == fitted[:-2]) & (fitted[1:-1] == fitted[2:])
    # float error of the pooled means must not make the stored map fall
    probabilities = np.maximum.accumulate(np.clip(fitted[~inner], 0.0, 1.0))
    return {"kind": "isotonic", "scores": scores[~inner].tolist(), "probabilities": probabilities.tolist()}


def _platt(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    # targets a little inside 0 and 1, so that separable judgments do not give an infinite slope
    positives, negatives = y.sum(), (~y).sum()
    target = np.where(y, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    mean, spread = x.mean(), max(x.std(), 1e-9)
    z = (x - mean) / spread

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        logit = parameters[0] * z + parameters[1]
        error = 0.5 * (1 + np.tanh(logit / 2)) - target
        return float(np.mean(np.logaddexp(0, logit) - target * logit)), np.array([np.mean(error * z), np.mean(error)])

    slope, intercept = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B").x
    if not slope > 0:
        raise InputError("calibration: higher scores are not more often relevant on dev; the model does not rank")
    return {"kind": "platt", "slope": float(slope / spread), "intercept": float(intercept - slope * mean / spread)}
