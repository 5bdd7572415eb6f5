"""Paired tests: exact enumeration for few queries, scipy for many, and the right rate of false alarms."""

import itertools

import numpy as np
import pytest
from scipy.stats import bootstrap

from ranking.significance import (
    interval,
    paired_bootstrap,
    pnr_randomisation_test,
    randomisation_test,
    resampled_sums,
    seeds_bootstrap,
    swapped_sums,
)


def test_randomisation_p_equals_the_exact_enumeration_of_all_swaps():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.5, 1, 10), rng.normal(0, 1, 10)
    d = ours - theirs
    signs = np.array(list(itertools.product([1, -1], repeat=10)))
    exact = np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-12)
    assert randomisation_test(ours, theirs, permutations=40000) == pytest.approx(exact, abs=0.01)


def test_equal_systems_give_p_one_and_an_interval_of_zero():
    values = np.linspace(0, 1, 50)
    assert randomisation_test(values, values) == 1.0
    found = paired_bootstrap(values, values)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_the_interval_agrees_with_scipy():
    rng = np.random.default_rng(1)
    ours, theirs = rng.beta(4, 2, 400), rng.beta(3, 2, 400)
    found = paired_bootstrap(ours, theirs, resamples=8000)
    expected = bootstrap((ours - theirs,), np.mean, n_resamples=8000, method="percentile", rng=2).confidence_interval
    assert found.value == pytest.approx((ours - theirs).mean())
    assert found.low == pytest.approx(expected.low, abs=0.002)
    assert found.high == pytest.approx(expected.high, abs=0.002)


def test_false_alarms_come_at_the_stated_rate():
    rng = np.random.default_rng(2)
    ps = [randomisation_test(*rng.exponential(size=(2, 60)), permutations=500) for _ in range(400)]
    assert 0.025 < np.mean(np.array(ps) <= 0.05) < 0.085


def test_the_same_seed_gives_the_same_answer_and_p_is_never_zero():
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(9, 1, 100), rng.normal(0, 1, 100)
    assert randomisation_test(ours, theirs, permutations=999) == 1 / 1000
    assert paired_bootstrap(ours, theirs, seed=5) == paired_bootstrap(ours, theirs, seed=5)


def test_blocks_do_not_change_what_is_drawn_on_average(monkeypatch):
    monkeypatch.setattr("ranking.significance.BLOCK_CELLS", 64)
    columns = np.arange(20.0).reshape(10, 2)
    sums = resampled_sums(columns, 4000)
    np.testing.assert_allclose(sums.mean(0), columns.sum(0), rtol=0.02)
    np.testing.assert_allclose(sums[:, 1] - sums[:, 0], 10)  # ten rows drawn each time, columns drawn together
    swapped = swapped_sums(columns, 4000)
    np.testing.assert_allclose(swapped.mean(0), 0, atol=3)
    assert np.abs(swapped).max() <= columns.sum()


def test_pnr_is_tested_on_pooled_pairs():
    rng = np.random.default_rng(4)
    total = rng.integers(5, 40, 300)
    better, worse = rng.binomial(total, 0.85), rng.binomial(total, 0.75)
    same = rng.binomial(total, 0.75)
    assert pnr_randomisation_test((better, total - better), (worse, total - worse), permutations=2000) < 0.01
    assert pnr_randomisation_test((same, total - same), (worse, total - worse), permutations=2000) > 0.05
    assert pnr_randomisation_test((same, total - same), (same, total - same)) == 1.0


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="same queries"):
        paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one query"):
        paired_bootstrap([], [])
    with pytest.raises(ValueError, match="not finite"):
        randomisation_test([np.nan], [1.0])
    assert interval(1.0, np.arange(101.0), 0.9).high == 95


def test_an_interval_over_seeds_is_as_wide_as_the_seeds_differ():
    rng = np.random.default_rng(3)
    of_seed, of_query = rng.normal(0, 1, 20), rng.normal(0, 1, 400)
    found = seeds_bootstrap(of_seed[:, None] + of_query, resamples=4000)
    deviation = np.sqrt(of_seed.var() / 20 + of_query.var() / 400)
    assert found.value == pytest.approx(of_seed.mean() + of_query.mean())
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(deviation, rel=0.06)


def test_seeds_that_agree_leave_the_interval_over_queries():
    difference = np.random.default_rng(4).normal(0.1, 1, 300)
    over_queries = paired_bootstrap(difference, np.zeros(300), resamples=4000)
    found = seeds_bootstrap(np.tile(difference, (3, 1)), resamples=4000)
    assert (found.low, found.high) == pytest.approx((over_queries.low, over_queries.high), abs=0.01)


def test_one_seed_says_nothing_about_seeds():
    with pytest.raises(ValueError, match="two seeds"):
        seeds_bootstrap(np.ones((1, 10)))
