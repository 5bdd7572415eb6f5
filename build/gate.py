"""The gate's first question: does an engine rank real judged queries as the fp32 checkpoint does?

Both sides score the same pairs. Errors are counted in units of the reference scores' standard deviation, because a raw
logit has no scale of its own; order is measured by Kendall's tau-b within each query and by NDCG@5.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ranking.calibration import ece, probability
from ranking.cascade import Cascade
from ranking.metrics import JudgedRanking, kendall_tau
from ranking.prior import PriorBlend

INSTEAD = {"int8": "auto", "int8_mixed": "auto", "int8_groups": "fp32", "bf16": "fp32", "fp16": "fp32"}
K = 5

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class GateLimits:
    """What a build may cost.

    Args:
        max_error: largest score error of any pair, in standard deviations of the reference scores
        mean_error: mean score error, in the same unit
        min_tau: mean Kendall tau-b over queries
        max_ndcg_change: absolute change of mean NDCG@5 (linear gain)
        max_loss: NDCG@5 that the arm may lose against what ranks today: it is refused if the whole 95% interval of the
            difference on the judged queries lies below -max_loss (build/quality_gate.py)
        max_cascade_loss: mean NDCG@5 that a cascade may lose against its large model alone (build/cascade.py)
        require_fused_attention: TensorRT: refuse an engine whose attention is not known to be fused throughout
            (build/engine_inspector.py); otherwise that is a warning
    """

    max_error: float = 0.5
    mean_error: float = 0.05
    min_tau: float = 0.99
    max_ndcg_change: float = 0.002
    max_loss: float = 0.0
    max_cascade_loss: float = 0.002
    require_fused_attention: bool = False

    def __post_init__(self) -> None:
        for name in ("max_loss", "max_cascade_loss"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: an NDCG@5 of 0 or more is needed")


@dataclass(frozen=True)
class Reference:
    """What an engine is measured against: the fp32 checkpoint's scores of judged pairs.

    scores: float32 [n]; grades: int [n]; groups: int [n], index into queries; queries: their texts; calibration: the
    map from score to probability that is to be served, if there is one; cascade: where the scores are a cascade's, how
    they came of the raw scores of its small and its large model, float32 [n] each.
    """

    scores: NDArray[np.float32]
    grades: NDArray[np.int64]
    groups: NDArray[np.int64]
    queries: list[str]
    calibration: dict[str, Any] | None = None
    cascade: tuple[Cascade, NDArray[np.float32], NDArray[np.float32]] | None = None

    def with_prior(self, blend: PriorBlend, prior: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scores that an arm gives where its callers send priors, float32 [n], NaN for a pair without one."""
        if self.cascade is None:
            return blend.blend(self.scores, prior, self.groups)
        cascade, first, scores = self.cascade
        return cascade.of_lists(first, scores, self.groups, lambda s, rows: blend.blend(s, prior[rows]))


class Verdict(Protocol):
    """What a gate says of an engine, as GateReport does."""

    tau: float

    @property
    def passed(self) -> bool:
        """Whether it may be published."""


@dataclass
class GateReport:
    """What the gate measured for one engine, and what it objects to (empty: passed).

    ece: calibration error of the engine's probabilities on the judged pairs; None where the arm gives none.
    """

    precision: str
    queries: int
    pairs: int
    not_finite: int
    max_error: float
    mean_error: float
    score_spread: float
    tau: float
    ndcg5_reference: float
    ndcg5: float
    worst_query: str
    worst_query_tau: float
    ece: float | None
    objections: list[str]

    @property
    def passed(self) -> bool:
        """Whether the gate has no objection."""
        return not self.objections

    def as_json(self) -> dict[str, Any]:
        """The report as a version's manifest.json keeps it; an error that is not finite is null, as JSON has none."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }

    def line(self) -> str:
        """One line for the log."""
        verdict = "passed" if self.passed else "; ".join(self.objections)
        return (
            f"{self.precision}: error max {self.max_error:.4f} mean {self.mean_error:.4f} spreads, tau {self.tau:.4f}, "
            f"NDCG@{K} {self.ndcg5_reference:.4f} -> {self.ndcg5:.4f} on {self.queries} queries: {verdict}"
        )

    def advice(self) -> str:
        """Which query moved most and what to build instead; for a gate that failed."""
        instead = INSTEAD.get(self.precision)
        moved = f"the query that moved most is {self.worst_query!r} (tau {self.worst_query_tau:.3f})"
        next_step = f"try --precision {instead}" if instead else "the export itself is wrong: check the checkpoint"
        return f"{moved}; {next_step}, or accept the drop knowingly with --accept-drop"


def gate_scores(reference: Reference, scores: NDArray[np.float32], precision: str, limits: GateLimits) -> GateReport:
    """Measure an engine's scores, float32 [n], against the reference, and log the result. precision: for the report."""
    queries, groups = reference.queries, reference.groups
    bad = ~np.isfinite(scores)
    spread = float(reference.scores.std()) or 1.0
    error = np.abs(np.where(bad, np.inf, scores.astype(np.float64)) - reference.scores) / spread
    # a score that is no number ranks last; the gate fails anyway, but the report must name the query
    safe = np.where(bad, np.float32(np.finfo(np.float32).min), scores)
    tau = kendall_tau(safe, reference.scores, groups)
    known = np.where(np.isnan(tau), 1.0, tau)  # a query whose documents all tie in both has no order to lose
    per_query_error = np.zeros(len(queries))
    np.maximum.at(per_query_error, groups, error)
    ndcg_before = JudgedRanking(reference.scores, reference.grades, groups, len(queries)).ndcg(K)
    ndcg_after = JudgedRanking(safe, reference.grades, groups, len(queries)).ndcg(K)
    worst = int(np.lexsort((-per_query_error, known))[0])
    report = GateReport(
        precision=precision,
        queries=len(queries),
        pairs=len(scores),
        not_finite=int(bad.sum()),
        max_error=float(error.max()),
        mean_error=float(error.mean()),
        score_spread=spread,
        tau=float(known.mean()),
        ndcg5_reference=float(ndcg_before.mean()),
        ndcg5=float(ndcg_after.mean()),
        worst_query=queries[worst],
        worst_query_tau=float(known[worst]),
        ece=gate_ece(reference, safe),
        objections=[],
    )
    report.objections = _objections(report, limits)
    LOGGER.info("gate: %s", report.line())
    return report


def gate_ece(reference: Reference, scores: NDArray[np.float32]) -> float | None:
    """Calibration error of the probabilities that an engine's scores, float32 [n], give; None without a map."""
    if reference.calibration is None:
        return None
    served = probability(scores, reference.calibration).astype(np.float32)  # as the front model gives them
    return ece(served, reference.grades > 0)


def _objections(report: GateReport, limits: GateLimits) -> list[str]:
    found = []
    if report.not_finite:
        found.append(f"{report.not_finite} scores are not finite")
    if not report.max_error <= limits.max_error:
        found.append(f"max error {report.max_error:.3g} > {limits.max_error:g} spreads")
    if not report.mean_error <= limits.mean_error:
        found.append(f"mean error {report.mean_error:.3g} > {limits.mean_error:g} spreads")
    if not report.tau >= limits.min_tau:
        found.append(f"Kendall tau {report.tau:.4f} < {limits.min_tau:g}")
    change = abs(report.ndcg5 - report.ndcg5_reference)
    if not change <= limits.max_ndcg_change:
        found.append(f"NDCG@{K} moved by {change:.4f} > {limits.max_ndcg_change:g}")
    return found
