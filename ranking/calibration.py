"""Scores as probabilities: applying a card's calibration, and measuring it (reliability, expected calibration error).

A card's `calibration` is a monotone map from raw score to the probability that a document is relevant, one of

    {"kind": "platt", "slope": a, "intercept": b}                       1 / (1 + exp(-(a * score + b))), a > 0
    {"kind": "isotonic", "scores": [...], "probabilities": [...]}       linear between the knots, flat beyond them

The probability stands beside the raw score and never replaces it: where isotonic is flat, order would be lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ranking.errors import InputError


def probability(scores: ArrayLike, calibration: dict[str, Any] | None) -> NDArray[np.float64]:
    """Probabilities, float64 [n], of raw scores, float [n]; without a calibration the logistic function of the score.

    InputError if the calibration is of an unknown kind, lacks a key or is not monotone.
    """
    values = np.asarray(scores, np.float64)
    if calibration is None:
        return _logistic(values)
    try:
        if calibration["kind"] == "platt":
            slope, intercept = float(calibration["slope"]), float(calibration["intercept"])
            if not (np.isfinite(slope) and np.isfinite(intercept) and slope > 0):
                raise InputError(f"calibration: slope {slope} and intercept {intercept}: a finite rising map is needed")
            return _logistic(slope * values + intercept)
        if calibration["kind"] == "isotonic":
            return _interpolate(values, calibration["scores"], calibration["probabilities"])
    except (KeyError, TypeError) as problem:
        raise InputError(f"calibration: not a map with its keys: {problem!r}") from problem
    raise InputError(f"calibration: kind {calibration['kind']!r}; platt and isotonic are known")


def _logistic(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(values / 2))  # tanh cannot overflow


def _interpolate(values: NDArray[np.float64], scores: ArrayLike, probabilities: ArrayLike) -> NDArray[np.float64]:
    x, y = np.asarray(scores, np.float64), np.asarray(probabilities, np.float64)
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise InputError(f"calibration: {x.shape} scores and {y.shape} probabilities must be two lists of one length")
    if (np.diff(x) < 0).any() or (np.diff(y) < 0).any() or not (y[0] >= 0 and y[-1] <= 1):
        raise InputError("calibration: scores must ascend, and probabilities must not fall or leave 0..1")
    return np.interp(values, x, y)


@dataclass(frozen=True)
class Reliability:
    """Predictions in bins: int [b] documents, float [b] mean probability and share of relevant (nan if empty)."""

    counts: NDArray[np.int64]
    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Expected calibration error (Guo et al., ICML 2017): mean |observed - predicted| over bins, by documents."""
        filled = self.counts > 0
        gaps = np.abs(self.observed - self.predicted)[filled]
        return float(np.average(gaps, weights=self.counts[filled])) if filled.any() else float("nan")


def reliability(probabilities: ArrayLike, relevant: ArrayLike, bins: int = 15) -> Reliability:
    """Reliability of predicted probabilities, float [n], against outcomes, bool [n], in equal-width bins of 0..1.

    ValueError: lengths differ, or a probability is outside 0..1 or not a number.
    """
    predicted, outcome = np.asarray(probabilities, np.float64), np.asarray(relevant).astype(np.float64)
    if predicted.shape != outcome.shape or predicted.ndim != 1:
        raise ValueError(f"probabilities {predicted.shape} and outcomes {outcome.shape} must be 1-d of one length")
    if not ((predicted >= 0) & (predicted <= 1)).all():
        raise ValueError("a probability is outside 0..1")
    place = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=values, minlength=bins) for values in (predicted, outcome)]
    with np.errstate(invalid="ignore"):
        return Reliability(counts, sums[0] / counts, sums[1] / counts)


def ece(probabilities: ArrayLike, relevant: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error; see reliability."""
    return reliability(probabilities, relevant, bins).ece
