"""Is the A/B report's statistics calibrated? Simulated experiments with a known truth, every claim beside its target.

Users differ in how often they come, how readily they click, how long they stay and how fast their answers are, so that
pages of one user are correlated: what a pooled per-page test gets wrong. Writes a Markdown report with --out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import tqdm

from clients.ab.report.statistics import (
    UserTotals,
    always_valid_margin,
    compare_arms,
    cuped,
    estimate,
    quantile,
    sample_ratio_p,
    users_needed,
)
from ranking.program import run


@dataclass
class Config:
    """Check the calibration of the A/B statistics by simulation.

    Args:
        experiments: simulated A/A experiments; the targets are set for 1000
        users: users per arm
        seed: of the simulation
        out: Markdown file for the results; printed only when left out
    """

    experiments: int = 1000
    users: int = 2000
    seed: int = 7
    out: Path | None = None


@dataclass
class Arm:
    """One arm of a simulated log, a row per page, pages of a user together."""

    user: np.ndarray
    clicked: np.ndarray
    dwell: np.ndarray
    latency: np.ndarray
    users: int

    def per_user(self, weights: np.ndarray) -> np.ndarray:
        """Sums over each user's pages, float [users]. weights: float [pages]."""
        return np.bincount(self.user, weights=weights, minlength=self.users)

    def ratios(self) -> dict[str, UserTotals]:
        """Every ratio metric of the report, as numerators and denominators per user."""
        clicks = self.per_user(self.clicked)
        return {
            "page CTR": UserTotals(clicks, self.per_user(np.ones_like(self.clicked))),
            "user CTR": UserTotals((clicks > 0).astype(float), np.ones(self.users)),
            "dwell per click": UserTotals(self.per_user(self.dwell), clicks),
        }


def simulate(rng: np.random.Generator, users: int, lift: float = 0.0) -> Arm:
    """Users with a visit rate, click rate (mean 0.3), dwell and latency each; lift: relative, on the click rate."""
    pages = rng.geometric(0.25, users)
    own_rate = rng.beta(1.2, 2.8, users) * (1 + lift)
    user = np.repeat(np.arange(users), pages)
    clicked = (rng.random(len(user)) < np.minimum(own_rate, 1.0)[user]).astype(float)
    dwell = clicked * rng.lognormal(3.5 + rng.normal(0, 0.6, users)[user], 0.8)
    latency = rng.lognormal(2.3 + rng.normal(0, 0.3, users)[user], 0.25)
    return Arm(user, clicked, dwell, latency, users)


def pooled_p(control: Arm, treatment: Arm) -> float:
    """The naive test: every page an independent coin."""
    clicks = np.array([control.clicked.sum(), treatment.clicked.sum()])
    pages = np.array([len(control.clicked), len(treatment.clicked)])
    rate = clicks.sum() / pages.sum()
    z = np.diff(clicks / pages)[0] / np.sqrt(rate * (1 - rate) * (1 / pages).sum())
    return float(2 * stats.norm.sf(abs(z)))


def latency_p(arms: tuple[Arm, Arm], level: float, clustered: bool) -> float:
    """p of a latency quantile's difference; clustered: by user as the report does, else every page by itself."""
    control, treatment = (
        quantile(arm.latency, arm.user if clustered else np.arange(len(arm.latency)), level) for arm in arms
    )
    return compare_arms(control, treatment).p


def ratio_p(control: UserTotals, treatment: UserTotals) -> float:
    """p of a ratio metric's difference, as the report computes it."""
    return compare_arms(estimate(control), estimate(treatment)).p


def peeked(control: Arm, treatment: Arm, looks: int, users: int) -> tuple[bool, bool]:
    """Whether (the fixed-horizon test, the always-valid interval) rejects at any of `looks` equally spaced looks."""
    totals = [arm.ratios()["page CTR"] for arm in (control, treatment)]
    fixed = always = False
    for n in np.linspace(users / looks, users, looks).astype(int):
        before, after = (estimate(UserTotals(t.numerator[:n], t.denominator[:n])) for t in totals)
        seen = compare_arms(before, after, planned_users=users)
        fixed |= seen.p < 0.05
        always |= not seen.always_low <= 0 <= seen.always_high
    return fixed, always


LEVELS = {"latency p50": 0.5, "latency p95": 0.95, "latency p99": 0.99}


def aa_experiments(config: Config) -> tuple[dict[str, list[float]], np.ndarray]:
    """p values of every metric over A/A experiments, and [experiments, 2] rejections under peeking."""
    p_values: dict[str, list[float]] = {}
    peeks = []
    for experiment in tqdm(range(config.experiments), desc="A/A", unit="experiment", file=sys.stderr):
        rng = np.random.default_rng([config.seed, experiment])
        control, treatment = simulate(rng, config.users), simulate(rng, config.users)
        for name, totals in control.ratios().items():
            p_values.setdefault(name, []).append(ratio_p(totals, treatment.ratios()[name]))
        for name, level in LEVELS.items():
            p_values.setdefault(name, []).append(latency_p((control, treatment), level, clustered=True))
            naive = latency_p((control, treatment), level, clustered=False)
            p_values.setdefault(f"{name}, naive per request", []).append(naive)
        p_values.setdefault("page CTR, naive pooled", []).append(pooled_p(control, treatment))
        peeks.append(peeked(control, treatment, 100, config.users))
    return p_values, np.array(peeks)


def cuped_ratio(config: Config) -> tuple[float, float]:
    """(variance ratio measured, 1 - rho^2 of the same data) with the pre-period click count as covariate."""
    rng = np.random.default_rng([config.seed, 10**6])
    arms, correlations = [], []
    for _ in range(2):
        rate = rng.beta(1.2, 2.8, 50_000)
        before, after = rng.binomial(20, rate).astype(float), rng.binomial(20, rate).astype(float)
        arms.append(UserTotals(after, np.full(50_000, 20.0), before))
        correlations.append(np.corrcoef(before, after)[0, 1])
    return cuped(*arms)[2], 1 - float(np.mean(correlations)) ** 2


def bootstrap_ratio(config: Config, resamples: int = 2000) -> float:
    """Delta-method variance of page CTR over the user bootstrap's."""
    rng = np.random.default_rng([config.seed, 10**6 + 1])
    totals = simulate(rng, config.users).ratios()["page CTR"]
    chosen = (rng.integers(0, config.users, config.users) for _ in range(resamples))
    values = [totals.numerator[c].sum() / totals.denominator[c].sum() for c in chosen]
    return estimate(totals).variance / float(np.var(values))


def power(config: Config, lift: float = 0.05) -> tuple[int, float]:
    """(users per arm planned for 80% power, share of simulated A/B experiments that find the lift)."""
    rng = np.random.default_rng([config.seed, 10**6 + 2])
    baseline = estimate(simulate(rng, 200_000).ratios()["page CTR"])
    users = users_needed(baseline, lift) // 2
    trials = max(config.experiments // 2, 1)
    found = 0
    for _ in tqdm(range(trials), desc="A/B power", unit="experiment", file=sys.stderr):
        control, treatment = (simulate(rng, users, effect).ratios()["page CTR"] for effect in (0.0, lift))
        found += ratio_p(control, treatment) < 0.05
    return users, found / trials


def main(config: Config) -> None:
    """Run all simulations, print the claims beside their targets and write them to --out."""
    p_values, peeks = aa_experiments(config)
    lines = [
        f"{config.experiments} A/A experiments, {config.users} users per arm, seed {config.seed}.",
        "",
        "| metric | rejected at 0.05 | target | uniformity p (KS) | |",
        "|---|---|---|---|---|",
    ]
    for name, values in p_values.items():
        rejected, uniform = float(np.mean(np.array(values) < 0.05)), stats.kstest(values, "uniform").pvalue
        naive = "naive" in name
        met = rejected > 0.065 if naive else 0.035 <= rejected <= 0.065 and uniform > 0.01
        target = "above 6.5% (the control must fail)" if naive else "3.5% to 6.5%"
        lines.append(f"| {name} | {rejected:.1%} | {target} | {uniform:.3f} | {'met' if met else 'MISSED'} |")
    left, expected = cuped_ratio(config)
    users, found = power(config)
    counts = [50_300, 49_700]
    srm = abs(sample_ratio_p(counts, [0.5, 0.5]) - stats.chi2.sf(sum((c - 50_000) ** 2 / 50_000 for c in counts), 1))
    ratio = bootstrap_ratio(config)
    checks = [
        (
            "fixed-horizon test, any of 100 looks",
            f"{peeks[:, 0].mean():.1%}",
            "far above 5% (control)",
            peeks[:, 0].mean() > 0.1,
        ),
        (
            "always-valid interval, any of 100 looks",
            f"{peeks[:, 1].mean():.1%}",
            "at most 5%",
            peeks[:, 1].mean() <= 0.05,
        ),
        ("CUPED variance left", f"{left:.4f}", f"1 - rho^2 = {expected:.4f}", abs(left - expected) < 0.01),
        ("SRM p against the chi-square formula", f"{srm:.1e}", "1e-9", srm < 1e-9),
        ("delta variance / user bootstrap", f"{ratio:.3f}", "0.9 to 1.1", abs(ratio - 1) < 0.1),
        (f"power of a 5% lift at {users} users per arm", f"{found:.1%}", "80%", abs(found - 0.8) < 0.05),
        (
            "width at the planned users against fixed horizon",
            f"{always_valid_margin(1, 10_000) / stats.norm.isf(0.025):.2f} times",
            "(the price of peeking)",
            True,
        ),
    ]
    lines += ["", "| check | measured | target | |", "|---|---|---|---|"]
    lines += [f"| {name} | {value} | {target} | {'met' if met else 'MISSED'} |" for name, value, target, met in checks]
    report = "\n".join(lines)
    print(report)
    if config.out is not None:
        command = f"python -m benchmarks.ab.calibration --experiments {config.experiments} --users {config.users}"
        config.out.write_text(f"# Calibration of the A/B statistics\n\n`{command}`\n\n{report}\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.ab.calibration --out docs/results/ab_calibration.md")
