"""The maps from score to probability that a build publishes."""

import numpy as np
import pytest

from build.gate import GateLimits, Reference, gate_scores
from build.probabilities import ProbabilityMaps, fit_maps
from ranking.calibration import ece, probability
from ranking.prior import PriorBlend

RNG = np.random.default_rng(0)
GROUPS = np.repeat(np.arange(60), 10)
SCORES = RNG.normal(size=600).astype(np.float32)
GRADES = (RNG.random(600) < 1 / (1 + np.exp(-1.5 * SCORES))).astype(np.int64)
REFERENCE = Reference(SCORES, GRADES, GROUPS, [f"query {q}" for q in range(60)])
FIRST_STAGE = (SCORES + RNG.normal(size=600)).astype(np.float32)


def test_without_a_card_map_platt_is_fitted_and_each_kind_of_score_has_its_own_map():
    prior = PriorBlend(0.5, 0.0, 3.0)
    maps = fit_maps(None, REFERENCE, FIRST_STAGE, prior)
    assert maps.fitted_on == "the judged pairs of this build"
    assert maps.alone["slope"] == pytest.approx(1.5, abs=0.35)
    blended = prior.blend(SCORES, FIRST_STAGE, GROUPS)
    assert (
        ece(probability(blended, maps.with_prior), GRADES > 0)
        < 0.05
        < ece(probability(blended, maps.alone), GRADES > 0)
    )
    assert maps.ece_with_prior == pytest.approx(ece(probability(blended, maps.with_prior), GRADES > 0), abs=1e-6)
    assert ProbabilityMaps(**maps.as_json()) == maps  # as a staged build carries them


def test_the_cards_map_is_served_and_the_gate_measures_it_on_the_engines_scores():
    card = {"kind": "isotonic", "scores": [-1.0, 0.0, 1.0], "probabilities": [0.1, 0.5, 0.9]}
    maps = fit_maps(card, REFERENCE, FIRST_STAGE, PriorBlend())
    assert maps.served == {"alone": card, "with_prior": card}
    engine = (SCORES + np.float32(0.01)).astype(np.float32)
    reference = Reference(SCORES, GRADES, GROUPS, REFERENCE.queries, maps.alone)
    report = gate_scores(reference, engine, "bf16", GateLimits())
    assert report.ece == pytest.approx(ece(probability(engine, card).astype(np.float32), GRADES > 0), abs=1e-12)
    about = maps.described(report.ece)
    assert (about["method"], about["ece"], about["method_with_prior"]) == ("isotonic", report.ece, "isotonic")


def test_a_model_that_does_not_rank_gets_no_probabilities_and_the_manifest_says_why():
    worse = Reference(-SCORES, GRADES, GROUPS, REFERENCE.queries)
    maps = fit_maps(None, worse, FIRST_STAGE, PriorBlend())
    assert maps.served is None
    assert "the model does not rank" in maps.described(None)["reason"]
    assert gate_scores(worse, -SCORES, "fp32", GateLimits()).ece is None
