"""Measures of drift between two samples. NumPy and SciPy; no table, no clock.

Documents of a page and pages of a user hang together, so every sample that is tested has one value of each user.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

BINS = 10
SMALLEST_SHARE = 1e-4  # an empty bin would make the index infinite


@dataclass(frozen=True)
class Drift:
    """psi: population stability index; ks: largest distance of the two distribution functions; p: of no difference."""

    psi: float
    ks: float
    p: float


def score_drift(reference: ArrayLike, live: ArrayLike) -> Drift:
    """Drift of live scores, float [m], from a reference, float [n].

    The bins of the index are the reference's deciles. ValueError if either is empty.
    """
    before, now = np.asarray(reference, np.float64), np.asarray(live, np.float64)
    if not len(before) or not len(now):
        raise ValueError(f"{len(before)} reference scores and {len(now)} live ones: both are needed")
    inner = np.unique(np.quantile(before, np.arange(1, BINS) / BINS))
    shares = [np.bincount(np.searchsorted(inner, of), minlength=len(inner) + 1) / len(of) for of in (before, now)]
    test = stats.ks_2samp(before, now)
    return Drift(stability_index(*shares), float(test.statistic), float(test.pvalue))


def stability_index(before: NDArray[np.float64], now: NDArray[np.float64]) -> float:
    """Population stability index of two lists of shares: sum (now - before) * log(now / before)."""
    old, new = np.maximum(before, SMALLEST_SHARE), np.maximum(now, SMALLEST_SHARE)
    return float(((new - old) * np.log(new / old)).sum())
