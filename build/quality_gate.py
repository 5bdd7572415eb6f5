"""The gate's second question: is an arm worse than what ranks today? How much should the first stage count?

gate.py compares an engine with its checkpoint, which a useless model passes. Here the checkpoint's ranking of judged
dev queries is compared with the first stage's (BM25, or a file of the user's own) and with that of the arm that serves
now.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build.gate import GateLimits, K, Reference
from build.releases import manifest, serving_versions
from ranking.errors import InputError
from ranking.files import replacing
from ranking.metrics import JudgedRanking
from ranking.prior import PriorBlend, standardised
from ranking.prior_fit import fit_prior
from ranking.significance import paired_bootstrap

LOGGER = logging.getLogger(__name__)
JUDGED_SCORES_NAME = "judged_scores.npz"


@dataclass(frozen=True)
class JudgedScores:
    """A checkpoint's scores of the judged pairs that it was gated on; a version keeps them, and later ones meet them.

    query_ids, doc_ids: [n]; scores: float32 [n].
    """

    query_ids: Sequence[str]
    doc_ids: Sequence[str]
    scores: NDArray[np.float32]

    def save(self, path: Path) -> Path:
        """Write them as NumPy arrays."""
        ids = {"query_ids": np.array(self.query_ids, np.str_), "doc_ids": np.array(self.doc_ids, np.str_)}
        with replacing(path) as aside, aside.open("wb") as stream:
            np.savez_compressed(stream, scores=self.scores, **ids)
        return path

    @classmethod
    def load(cls, path: Path) -> JudgedScores:
        """Read what save() wrote. InputError if it cannot be read."""
        try:
            with np.load(path) as stored:
                return cls(stored["query_ids"].tolist(), stored["doc_ids"].tolist(), stored["scores"])
        except (OSError, ValueError, KeyError) as problem:
            raise InputError(f"{path}: not the scores of judged pairs: {problem}") from problem

    def of_pairs(self, query_ids: Sequence[str], doc_ids: Sequence[str]) -> NDArray[np.float32]:
        """Scores of these pairs, float32 [m]; NaN where there is none."""
        known = dict(zip(zip(self.query_ids, self.doc_ids), self.scores.tolist()))
        return np.array([known.get(pair, np.nan) for pair in zip(query_ids, doc_ids)], np.float32)


@dataclass(frozen=True)
class Comparison:
    """NDCG@5 (linear gain) beside one opponent's on the same queries: paired difference with its 95% interval."""

    opponent: str
    queries: int
    ndcg5: float
    opponent_ndcg5: float
    difference: float
    low: float
    high: float

    @classmethod
    def of(cls, opponent: str, ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> Comparison:
        """From NDCG@5 per query, float [q] each, the same queries."""
        found = paired_bootstrap(ours, theirs)
        means = float(ours.mean()), float(theirs.mean())
        return cls(opponent, len(ours), *means, found.value, found.low, found.high)

    def line(self) -> str:
        """The difference in words."""
        return (
            f"NDCG@{K} {self.ndcg5:.3f}, {self.opponent} {self.opponent_ndcg5:.3f}: {self.difference:+.3f} "
            f"[{self.low:+.3f}, {self.high:+.3f}] on {self.queries} queries"
        )


@dataclass(frozen=True)
class QualityReport:
    """What the arm is worth. alone: the model by itself; with_prior: blended, the weight fitted on the other queries.

    gated: the one of these that its callers get; objections: empty if that one passed.
    """

    prior: PriorBlend
    first_stage: str
    alone: list[Comparison]
    with_prior: list[Comparison]
    callers_send_prior: bool
    objections: list[str]

    def as_json(self) -> dict[str, Any]:
        """The report as a version's manifest.json keeps it."""
        return asdict(self)

    def refusal(self, name: str) -> str:
        """Why the arm is not published, and what to do, in one line."""
        way_out = '--accept-worse "REASON" publishes it all the same'
        if not self.callers_send_prior and not any(c.high < 0 for c in self.with_prior):
            way_out = (
                f"with {self.first_stage} as prior (weight {self.prior.weight:g}) it is not worse: publish it with "
                f"--callers-send-prior if they do, or {way_out}"
            )
        return f"{name} is not published: {'; '.join(self.objections)}; {way_out}"


def ndcg5(scores: NDArray[np.float32], reference: Reference) -> NDArray[np.float64]:
    """NDCG@5 of each query, float64 [q]."""
    return JudgedRanking(scores, reference.grades, reference.groups, len(reference.queries)).ndcg(K)


def measure_quality(
    reference: Reference,
    first_stage: NDArray[np.float32],
    first_stage_name: str,
    opponents: dict[str, NDArray[np.float32]],
    limits: GateLimits,
    callers_send_prior: bool,
) -> QualityReport:
    """Fit the prior, compare with the first stage and the opponents, and log each comparison.

    opponents: name -> scores of the judged pairs, float32 [n], NaN for a pair without one. A query counts in a
    comparison if all its pairs have a score. An arm is worse if the 95% interval of its difference lies below
    -limits.max_loss.
    """
    prior, honest = fit_prior(
        reference.scores,
        first_stage,
        reference.grades,
        reference.groups,
        len(reference.queries),
        lambda blend: reference.with_prior(blend, first_stage),
    )
    first, _ = standardised(first_stage.astype(np.float64), reference.groups)
    alone, with_prior = [], []
    model = ndcg5(reference.scores, reference)
    for opponent, scores in {first_stage_name: first.astype(np.float32), **opponents}.items():
        missing = np.bincount(reference.groups, np.isnan(scores), minlength=len(model)) > 0
        if missing.all():
            raise InputError(
                f"{opponent} was gated on other queries than these, so the two cannot be compared: gate both on one "
                "dataset, or leave it out with --serves-now none"
            )
        theirs = ndcg5(np.nan_to_num(scores), reference)[~missing]
        alone.append(Comparison.of(opponent, model[~missing], theirs))
        with_prior.append(Comparison.of(opponent, honest[~missing], theirs))
        LOGGER.info("gate: %s", alone[-1].line())
    LOGGER.info("gate: with %s as prior, weight %g: %s", first_stage_name, prior.weight, with_prior[0].line())
    gated = with_prior if callers_send_prior else alone
    objections = [f"worse than {c.opponent}: {c.line()}" for c in gated if c.high < -limits.max_loss]
    return QualityReport(prior, first_stage_name, alone, with_prior, callers_send_prior, objections)


def serving_arm(
    repository: Path,
    name: str,
    query_ids: Sequence[str],
    doc_ids: Sequence[str],
    reference: Reference,
    first_stage: NDArray[np.float32],
    callers_send_prior: bool,
) -> dict[str, NDArray[np.float32]]:
    """The version of arm `name` that serves now, by name, with its scores of these pairs; empty if none serves.

    InputError if that version was published without its judged scores.
    """
    serving = serving_versions(repository, name)
    if not serving:
        return {}
    version = max(serving)
    path = repository / name / str(version) / JUDGED_SCORES_NAME
    if not path.is_file():
        raise InputError(
            f"{path.parent}: published without its scores of judged pairs, by an older release: build it again, or "
            "leave the comparison out with --serves-now none"
        )
    scores = JudgedScores.load(path).of_pairs(query_ids, doc_ids)
    if callers_send_prior:
        blend = PriorBlend(**manifest(repository, name, version)["quality"]["prior"])
        scores = blend.blend(scores, first_stage, reference.groups)
    return {f"{name} version {version}": scores}
