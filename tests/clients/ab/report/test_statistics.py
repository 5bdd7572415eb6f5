"""The statistics of an A/B report against simulation, scipy and tea-tasting."""

import numpy as np
import pytest
from scipy import stats

from clients.ab.report.statistics import (
    Estimate,
    GoodSameBad,
    UserTotals,
    always_valid_margin,
    compare_arms,
    cuped,
    estimate,
    holm,
    preference,
    quantile,
    sample_ratio_p,
    users_needed,
)


def visits(rng, users, rate=0.3, spread=5.0):
    """Users with their own click rates, so that a user's pages are correlated: (clicked pages, pages)."""
    pages = rng.geometric(0.2, users).astype(float)
    own_rate = rng.beta(rate * spread, (1 - rate) * spread, users)
    return rng.binomial(pages.astype(int), own_rate).astype(float), pages


def test_the_delta_variance_is_the_bootstrap_variance():
    rng = np.random.default_rng(1)
    clicked, pages = visits(rng, 2000)
    chosen = rng.integers(0, 2000, (2000, 2000))
    bootstrap = (clicked[chosen].sum(1) / pages[chosen].sum(1)).var()
    assert estimate(UserTotals(clicked, pages)).variance == pytest.approx(bootstrap, rel=0.1)


def test_a_ratio_comparison_agrees_with_tea_tasting():
    tt = pytest.importorskip("tea_tasting")
    pa = pytest.importorskip("pyarrow")
    rng = np.random.default_rng(2)
    (c0, d0), (c1, d1) = visits(rng, 3000, 0.30), visits(rng, 3000, 0.32)
    table = pa.table(
        {
            "variant": np.repeat([0, 1], 3000),
            "clicked": np.concatenate([c0, c1]),
            "pages": np.concatenate([d0, d1]),
        }
    )
    metric = tt.RatioOfMeans("clicked", "pages", use_t=False, equal_var=False)
    oracle = tt.Experiment(ctr=metric).analyze(table)["ctr"]
    ours = compare_arms(estimate(UserTotals(c0, d0)), estimate(UserTotals(c1, d1)))
    assert ours.lift == pytest.approx(oracle.rel_effect_size, rel=1e-9)
    assert ours.p == pytest.approx(oracle.pvalue, rel=1e-6)


def test_cuped_leaves_one_minus_rho_squared_of_the_variance_and_keeps_the_lift():
    rng = np.random.default_rng(3)
    arms, rho = [], 0.8
    for effect in (0.0, 0.1):
        before = rng.normal(10, 2, 20_000)
        after = effect + 5 + rho * (before - 10) / 2 + rng.normal(0, np.sqrt(1 - rho**2), 20_000)
        arms.append(UserTotals(after, np.ones(20_000), before))
    control, treatment, left = cuped(*arms)
    assert left == pytest.approx(1 - rho**2, rel=0.03)
    assert control.variance == pytest.approx(estimate(arms[0]).variance * left, rel=0.03)
    assert compare_arms(control, treatment).lift == pytest.approx(0.1 / 5, abs=0.005)


def test_a_quantile_of_correlated_requests_is_less_certain_than_of_independent_ones():
    rng = np.random.default_rng(4)
    users = np.repeat(np.arange(5000), 20)
    slow = rng.normal(0, 10, 5000)[users]
    clustered = quantile(100 + slow + rng.normal(0, 1, 100_000), users, 0.5)
    independent = quantile(100 + rng.normal(0, 10, 100_000), np.arange(100_000), 0.5)
    assert clustered.variance > 10 * independent.variance
    # the median of 5,000 normal users: pi/2 * sigma^2 / n
    assert clustered.variance == pytest.approx(np.pi / 2 * 100 / 5000, rel=0.25)


def test_the_always_valid_interval_is_wider_and_tightest_near_the_planned_users():
    z = stats.norm.isf(0.025)
    widths = {n: always_valid_margin(1.0, n, planned_users=10_000) for n in (1_000, 10_000, 1_000_000)}
    assert all(width > z for width in widths.values())
    assert widths[10_000] < widths[1_000] and widths[10_000] < widths[1_000_000]


def test_sample_ratio_p_is_scipys_chi_square():
    assert sample_ratio_p([5100, 4900], [1, 1]) == pytest.approx(stats.chisquare([5100, 4900]).pvalue, abs=1e-12)
    assert sample_ratio_p([900, 9000], [0.1, 0.9]) == pytest.approx(
        stats.chisquare([900, 9000], [990, 8910]).pvalue, abs=1e-12
    )


def test_holm_is_the_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_papers_good_same_bad_counts_are_significant():
    judged = GoodSameBad(54, 116, 30)
    assert judged.advantage == pytest.approx(0.12)
    assert judged.p == pytest.approx(stats.binomtest(54, 84).pvalue)
    assert GoodSameBad(0, 5, 0).p == 1.0


def test_the_planned_sample_finds_the_lift_as_often_as_promised():
    rng = np.random.default_rng(5)
    baseline = estimate(UserTotals(*visits(rng, 200_000)))
    users = users_needed(baseline, lift=0.05, power=0.8) // 2
    found = 0
    for _ in range(300):
        arms = [estimate(UserTotals(*visits(rng, users, rate))) for rate in (0.3, 0.3 * 1.05)]
        found += compare_arms(*arms).p < 0.05
    assert found / 300 == pytest.approx(0.8, abs=0.08)


def test_a_control_without_a_click_gives_no_lift_but_a_p_value():
    comparison = compare_arms(Estimate(0.0, 0.0, 100), Estimate(0.1, 0.001, 100))
    assert np.isnan(comparison.lift) and 0 < comparison.p < 0.01


@pytest.mark.parametrize(
    "numerator, denominator, reason",
    [
        ([1, 2], [1, 2, 3], "differ in length"),
        ([1], [1], "at least two"),
        ([1, np.nan], [1, 1], "NaN"),
        ([0, 0], [0, 0], "zero for every user"),
    ],
)
def test_totals_that_carry_no_information_are_refused(numerator, denominator, reason):
    with pytest.raises(ValueError, match=reason):
        UserTotals(np.array(numerator, float), np.array(denominator, float))


def test_users_who_do_not_differ_prove_nothing():
    """Seen: three users who all clicked against three who did not gave p = 0 and an interval of no width."""
    control, treatment = UserTotals(np.full(3, 1.0), np.full(3, 2.0)), UserTotals(np.full(3, 2.0), np.full(3, 2.0))
    found = compare_arms(estimate(control), estimate(treatment))
    assert found.p == 1.0 and found.lift == 1.0
    assert np.isnan([found.low, found.high, found.always_low, found.always_high]).all()


def test_a_preference_of_few_users_is_the_exact_sign_test():
    """Seen: p 0 for two users of one page each, and for any number of users whose shares were alike."""
    assert preference(np.ones(2), np.zeros(2)).p == pytest.approx(0.5)
    nearly = preference(np.array([60.0, 61.0, 60.0]), np.array([40.0, 39.0, 40.0]))
    assert nearly.share == pytest.approx(181 / 300) and nearly.p == pytest.approx(0.25)
    assert preference(np.ones(2), np.ones(2)).p == 1.0  # both tied
    alike = preference(np.array([3.0, 6.0] * 20 + [0.0]), np.array([2.0, 4.0] * 20 + [0.0]))
    assert alike.users == 40 and alike.p == pytest.approx(2 * 0.5**40)


def test_a_preference_of_many_users_is_the_delta_methods():
    rng = np.random.default_rng(5)
    pages = rng.geometric(0.3, 400)
    won = rng.binomial(pages, rng.beta(6, 4, 400)).astype(float)
    found, share = preference(won, pages - won), estimate(UserTotals(won, pages.astype(float)))
    assert found.p == pytest.approx(2 * stats.norm.sf((share.value - 0.5) / share.variance**0.5)) and found.p < 1e-6


def test_the_preference_of_few_users_errs_rarely():
    rng = np.random.default_rng(6)
    wrong = 0
    for _ in range(400):
        pages = rng.integers(20, 40, 4)
        won = rng.binomial(pages, 0.5).astype(float)
        wrong += preference(won, pages - won).p < 0.05
    assert wrong == 0  # of four users no direction can be sure
