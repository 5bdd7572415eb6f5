"""The gate's second question: is an arm worse than what ranks today? How much should the first stage count?

gate.py compares an engine with its checkpoint, which a useless model passes. Here the checkpoint's ranking of judged
dev queries is compared with the first stage's (BM25, or a file of the user's own) and with that of the arm that serves
now.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build.gate import GateLimits, K, Reference
from build.judged_pairs import JudgedPairs
from build.releases import manifest, serving_versions
from ranking.errors import InputError
from ranking.files import replacing
from ranking.metrics import JudgedRanking
from ranking.pair_keys import pair_keys
from ranking.prior import PriorBlend, standardised
from ranking.prior_fit import fit_prior
from ranking.significance import paired_bootstrap

LOGGER = logging.getLogger(__name__)
JUDGED_SCORES_NAME = "judged_scores.npz"
COMMON_QUERIES = 20  # gated queries that two arms must share to be compared, or half of them where that is less


def save_scores(path: Path, judged: JudgedPairs, scores: NDArray[np.float32]) -> Path:
    """Write a checkpoint's scores of the judged pairs, float32 [n]: a version keeps them, and later ones meet them."""
    with replacing(path) as aside, aside.open("wb") as stream:
        np.savez_compressed(stream, texts=_text_keys(judged), scores=scores)
    return path


def kept_scores(repository: Path, name: str, version: int, judged: JudgedPairs) -> NDArray[np.float32]:
    """Scores that a published version has kept of these pairs, float32 [n]; NaN where it was not gated on a pair.

    A pair is known by its text: another dataset may give the same ids to other texts. Versions of earlier releases
    kept ids alone, which mean these texts if they were gated on this very file. InputError if not, or nothing was kept.
    """
    path = repository / name / str(version) / JUDGED_SCORES_NAME
    way_out = "build it again, or, if it is what serves now, leave the comparison out with --serves-now none"
    if not path.is_file():
        raise InputError(f"{path.parent}: published without its scores of judged pairs, by an older release: {way_out}")
    wanted: NDArray[Any]
    try:
        with np.load(path) as stored:
            kept = dict(stored)
        if "texts" in kept:
            known, wanted = kept["texts"], _text_keys(judged)
        elif manifest(repository, name, version)["gate_data"]["fingerprint"] == judged.fingerprint:
            known = np.stack([kept["query_ids"], kept["doc_ids"]], 1)
            wanted = np.array([judged.table.column(name).to_pylist() for name in ("query_id", "doc_id")], np.str_).T
        else:
            raise InputError(
                f"{path.parent}: gated on another file of judgments, by an older release that kept no texts to tell "
                f"whether the pairs are the same: {way_out}"
            )
        scores = dict(zip(map(tuple, known.tolist()), kept["scores"].tolist()))
    except (OSError, ValueError, KeyError) as problem:
        raise InputError(f"{path}: not the scores of judged pairs: {problem}") from problem
    return np.array([scores.get(tuple(pair), np.nan) for pair in wanted.tolist()], np.float32)


def _text_keys(judged: JudgedPairs) -> NDArray[np.uint64]:
    """The key of each pair by its text, uint64 [n, 2]."""
    return np.stack(pair_keys(*(judged.table.column(name).to_pylist() for name in ("query", "title", "summary"))), 1)


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

    first_stage_coverage: share of the judged pairs that the first stage has a score of; objections: empty if the one
    passed that its callers get.
    """

    prior: PriorBlend
    first_stage: str
    first_stage_coverage: float
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
        common = np.bincount(reference.groups, np.isnan(scores), minlength=len(model)) == 0
        check_common(opponent, int(common.sum()), len(model))
        theirs = ndcg5(np.nan_to_num(scores), reference)[common]
        alone.append(Comparison.of(opponent, model[common], theirs))
        with_prior.append(Comparison.of(opponent, honest[common], theirs))
        LOGGER.info("gate: %s", alone[-1].line())
    covered = float(np.isfinite(first_stage).mean())
    if covered < 1:  # what it ranks of the others is chance, so little of it is a weak opponent
        level = logging.WARNING if covered < 0.5 else logging.INFO
        LOGGER.log(level, "gate: %s has a score of %.0f%% of the judged pairs", first_stage_name, 100 * covered)
    LOGGER.info("gate: with %s as prior, weight %g: %s", first_stage_name, prior.weight, with_prior[0].line())
    gated = with_prior if callers_send_prior else alone
    objections = [f"worse than {c.opponent}: {c.line()}" for c in gated if c.high < -limits.max_loss]
    return QualityReport(prior, first_stage_name, covered, alone, with_prior, callers_send_prior, objections)


def check_common(opponent: str, common: int, queries: int) -> None:
    """InputError if too few of the gated queries are common to two arms; a warning if fewer than half are."""
    if common < min(COMMON_QUERIES, queries / 2):
        raise InputError(
            f"{opponent} was gated on {common} of these {queries} queries with the same texts, too few to compare the "
            "two: gate both on one dataset, or raise --gate-queries until its queries are among them, or leave it out "
            "with --serves-now none"
        )
    if common < queries / 2:
        LOGGER.warning("gate: %s was gated on %d of these %d queries alone", opponent, common, queries)


def serving_arm(
    repository: Path,
    name: str,
    judged: JudgedPairs,
    reference: Reference,
    first_stage: NDArray[np.float32],
    callers_send_prior: bool,
) -> dict[str, NDArray[np.float32]]:
    """The version of arm `name` that serves now, by name, with its scores of the judged pairs; empty if none serves.

    InputError if its scores of judged pairs cannot be compared with.
    """
    serving = serving_versions(repository, name)
    if not serving:
        return {}
    version = max(serving)
    scores = kept_scores(repository, name, version, judged)
    if callers_send_prior:
        blend = PriorBlend(**manifest(repository, name, version)["quality"]["prior"])
        scores = blend.blend(scores, first_stage, reference.groups)
    return {f"{name} version {version}": scores}
