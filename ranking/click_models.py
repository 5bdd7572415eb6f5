"""Click models: who examines a result, clicks it, is satisfied and stays. NumPy only; whole pages at once.

Position-based model (PBM; Richardson et al. 2007): examined with a probability of its position alone, clicked when
examined and attractive. Dynamic Bayesian network (DBN; Chapelle and Zhang 2009): read from the top, stop when
satisfied, else go on with probability `continuation`. Attractiveness and satisfaction follow the grade.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ranking.schema import MAX_GRADE

# Measured on Baidu's search: AllPairs propensities of positions 1 to 22, rounded to four digits, from
# propensities/global_all_pairs.csv (commit cd808aa) of github.com/philipphager/ultr-reproducibility, which belongs to
# Hager et al., "Unbiased Learning to Rank Meets Reality: Lessons from Baidu's Large-Scale Search Dataset", SIGIR 2024,
# arXiv 2404.02543. Below position 15 few clicks were seen, hence the values that rise again.
BAIDU_EXAMINATION = (
    1.0, 0.6732, 0.4143, 0.2932, 0.2078, 0.1715, 0.1361, 0.1164, 0.0837, 0.0578, 0.0528,
    0.0439, 0.0395, 0.0289, 0.0358, 0.0195, 0.0269, 0.0056, 0.0034, 0.0135, 0.0153, 0.0276,
)  # fmt: skip
SATISFIED_SECONDS = 30.0  # the usual threshold between a look and a read (Fox et al., 2005)


@dataclass(frozen=True)
class ClickModel:
    """A simulated user.

    Args:
        kind: "pbm" or "dbn"
        examination: PBM: probability that position 1, 2, ... is examined; the last one holds for all later positions
        attractiveness: probability that an examined document of grade 0..4 is clicked
        satisfaction: probability that a clicked document of grade 0..4 satisfies
        continuation: DBN: probability that an unsatisfied user looks at the next position
        satisfied_dwell: median dwell in seconds after a satisfying click; log-normal
        unsatisfied_dwell: median dwell in seconds after another click
        dwell_spread: standard deviation of log dwell
    """

    kind: Literal["pbm", "dbn"] = "pbm"
    examination: tuple[float, ...] = (1.0, 0.78, 0.62, 0.50, 0.41, 0.34, 0.29, 0.25, 0.22, 0.20)
    attractiveness: tuple[float, ...] = (0.03, 0.12, 0.35, 0.60, 0.85)
    satisfaction: tuple[float, ...] = (0.10, 0.25, 0.55, 0.75, 0.90)
    continuation: float = 0.85
    satisfied_dwell: float = 95.0
    unsatisfied_dwell: float = 9.0
    dwell_spread: float = 0.5

    def __post_init__(self):
        for name in ("attractiveness", "satisfaction"):
            if len(getattr(self, name)) != MAX_GRADE + 1:
                raise ValueError(f"{name} has {len(getattr(self, name))} values: one for each grade 0..4 is needed")
        for name in ("examination", "attractiveness", "satisfaction"):
            if not all(0 <= p <= 1 for p in getattr(self, name)) or not getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}: probabilities from 0 to 1 are needed")
        if not 0 <= self.continuation <= 1:
            raise ValueError(f"continuation is {self.continuation}: a probability from 0 to 1 is needed")
        if self.kind not in ("pbm", "dbn"):
            raise ValueError(f"click model {self.kind!r}: pbm or dbn is needed")

    def propensities(self, positions: int) -> np.ndarray:
        """PBM: examination probability of positions 1..positions, float64 [positions]. ValueError for a DBN, whose
        examination depends on the documents above."""
        if self.kind != "pbm":
            raise ValueError("a DBN has no fixed examination probability per position")
        table = np.asarray(self.examination, dtype=np.float64)
        return table[np.minimum(np.arange(positions), len(table) - 1)]

    def simulate(self, grades: np.ndarray, rng: np.random.Generator) -> Visits:
        """Users looking at pages. grades: int [pages, positions], in the order shown; -1 where a page is shorter."""
        grades = np.atleast_2d(np.asarray(grades))
        shown = grades >= 0
        attractive = (rng.random(grades.shape) < np.asarray(self.attractiveness)[grades]) & shown
        satisfies = rng.random(grades.shape) < np.asarray(self.satisfaction)[grades]
        if self.kind == "pbm":
            examined = rng.random(grades.shape) < self.propensities(grades.shape[1])
        else:
            goes_on = rng.random(grades.shape) < self.continuation
            examined = np.ones(grades.shape, dtype=bool)
            for position in range(1, grades.shape[1]):
                above = position - 1
                stopped = attractive[:, above] & satisfies[:, above]
                examined[:, position] = examined[:, above] & ~stopped & goes_on[:, above]
        examined &= shown
        clicked = examined & attractive
        satisfied = clicked & satisfies
        return Visits(examined, clicked, satisfied, self._dwell(clicked, satisfied, rng))

    def _dwell(self, clicked: np.ndarray, satisfied: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        median = np.where(satisfied, self.satisfied_dwell, self.unsatisfied_dwell)
        seconds = median * np.exp(self.dwell_spread * rng.standard_normal(clicked.shape))
        return np.where(clicked, seconds, 0.0).astype(np.float32)


@dataclass(frozen=True)
class Visits:
    """What simulated users did; each [pages, positions]. dwell_seconds: float32, 0 where not clicked."""

    examined: np.ndarray
    clicked: np.ndarray
    satisfied: np.ndarray
    dwell_seconds: np.ndarray
