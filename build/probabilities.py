"""The maps from a published arm's score to the probability that a document is relevant, fitted on judgments.

Two maps, since two kinds of score leave a served model: the model's own, and the one that a prior was blended into.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build.gate import Reference
from ranking.calibration import ece, probability
from ranking.calibration_fit import fit
from ranking.errors import InputError
from ranking.prior import PriorBlend

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbabilityMaps:
    """Calibrations (ranking/calibration.py) of scores without and with a prior; None where the arm gives none.

    fitted_on: what the first was fitted on; reason: why there is none, empty if there is; ece_with_prior: of the second
    on the judged pairs of the build, which it was fitted on.
    """

    alone: dict[str, Any] | None
    with_prior: dict[str, Any] | None
    fitted_on: str = ""
    ece_with_prior: float | None = None
    reason: str = ""

    @property
    def served(self) -> dict[str, Any] | None:
        """What the version folder keeps for the front model; None for an arm without probabilities."""
        return {"alone": self.alone, "with_prior": self.with_prior} if self.alone and self.with_prior else None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, for a staged build."""
        return asdict(self)

    def described(self, measured_ece: float | None) -> dict[str, Any]:
        """What manifest.json says: methods, what they were fitted on, calibration errors; no knots.

        measured_ece: of the first map, by the published engine's scores of the judged pairs.
        """
        if self.alone is None or self.with_prior is None:
            return {"method": None, "reason": self.reason}
        return {
            "method": self.alone["kind"],
            "fitted_on": self.fitted_on,
            "ece": measured_ece,
            "method_with_prior": self.with_prior["kind"],
            "ece_with_prior": self.ece_with_prior,
        }


def fit_maps(
    calibration: dict[str, Any] | None, reference: Reference, first_stage: NDArray[np.float32], prior: PriorBlend
) -> ProbabilityMaps:
    """The checkpoint's own map where its card has one, else Platt's on the judged pairs; and one of blended scores.

    calibration: the card's; first_stage: float32 [n], NaN for a pair without a score. A model whose scores do not rank
    gets no probabilities, and the log says why.
    """
    relevant = reference.grades > 0
    try:
        alone = calibration or fit("platt", reference.scores, relevant)
        with_prior = alone
        if prior.weight:
            blended = reference.with_prior(prior, first_stage)
            with_prior = fit("platt" if alone["kind"] == "platt" else "isotonic", blended, relevant)
        else:
            blended = reference.scores
        error = ece(served_probability(blended, with_prior), relevant)
    except InputError as problem:
        LOGGER.warning("this arm gives no probabilities: %s", problem)
        return ProbabilityMaps(None, None, reason=str(problem))
    fitted_on = "dev judgments, when the checkpoint was trained" if calibration else "the judged pairs of this build"
    return ProbabilityMaps(alone, with_prior, fitted_on, error)


def served_probability(scores: NDArray[np.float32], calibration: dict[str, Any]) -> NDArray[np.float32]:
    """Probabilities as the front model gives them, float32 [n]."""
    return probability(scores, calibration).astype(np.float32)
