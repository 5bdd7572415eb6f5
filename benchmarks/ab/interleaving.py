"""How many fewer users interleaving needs than an A/B test to find the better ranking, by simulation: plain team draft,
and the router's, in which documents that both rankings want next are nobody's."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import tqdm

from clients.ab.experiment.interleaving import team_draft
from clients.ab.report.statistics import UserTotals, estimate, preference, users_needed
from ranking.click_models import ClickModel
from ranking.program import run


@dataclass
class Config:
    """Compare the users needed by an A/B test on page CTR and by interleaving, both at 80% power and alpha 0.05.

    Args:
        users: simulated users per variance estimate
        trials: simulated experiments that check the power at the planned users
        null_trials: simulated experiments without a difference, of null_users each
        null_users: users of such an experiment
        documents: documents a page
        seed: of the simulation
        out: Markdown file for the results; printed only when left out
    """

    users: int = 100_000
    trials: int = 300
    null_trials: int = 1000
    null_users: int = 200
    documents: int = 10
    seed: int = 3
    out: Path | None = None


# (noise of the baseline's score, of the student's, share of the noise's variance that both have in common): the
# smaller the noise, the better the order by grade
PAIRS = {
    "clearly better": (2.0, 1.0, 0.0),
    "better": (1.5, 1.2, 0.0),
    "slightly better": (1.3, 1.2, 0.0),
    "slightly better, and alike": (1.3, 1.2, 0.8),
}
NO_DIFFERENCE = (1.3, 1.3, 0.5)
SCHEMES = {"team draft": True, "competing pairs": False}  # -> credit_agreed


class Users:
    """Simulated pages, one a user: grades, both rankings, clicks by the click model (a satisfied user stops: DBN)."""

    def __init__(self, config: Config, noise: tuple[float, float, float], rng: np.random.Generator):
        *self.noise, self.common = noise
        self.rng, self.documents = rng, config.documents
        self.model = ClickModel(kind="dbn")

    def grades(self, users: int) -> np.ndarray:
        """Grades of each user's documents, int [users, documents]."""
        return self.rng.choice(5, size=(users, self.documents), p=[0.5, 0.2, 0.15, 0.1, 0.05])

    def orders(self, grades: np.ndarray) -> list[np.ndarray]:
        """Both rankings: document numbers in the order of a noisy score, int [users, documents]."""
        shared = self.rng.standard_normal(grades.shape)
        own = [self.rng.standard_normal(grades.shape) for _ in self.noise]
        mixed = [np.sqrt(self.common) * shared + np.sqrt(1 - self.common) * one for one in own]
        return [np.argsort(-(grades + noise * one), axis=1) for noise, one in zip(self.noise, mixed)]

    def clicked_pages(self, users: int, arm: int) -> np.ndarray:
        """Whether the page got a click, float [users] of 0 and 1."""
        grades = self.grades(users)
        shown = np.take_along_axis(grades, self.orders(grades)[arm], axis=1)
        return self.model.simulate(shown, self.rng).clicked.any(axis=1).astype(float)

    def interleaved(self, users: int, credit_agreed: bool) -> tuple[np.ndarray, np.ndarray]:
        """Pages won by the student and by the baseline, each float [users] of 0 and 1."""
        grades = self.grades(users)
        orders = self.orders(grades)
        pages, teams = np.empty_like(grades), np.empty_like(grades)
        for user in range(users):
            first, second = orders[0][user].tolist(), orders[1][user].tolist()
            pages[user], teams[user] = team_draft(first, second, str(self.rng.integers(1 << 40)), credit_agreed)
        clicked = self.model.simulate(np.take_along_axis(grades, pages, axis=1), self.rng).clicked
        student, baseline = ((clicked & (teams == team)).sum(axis=1) for team in (1, 0))
        return (student > baseline).astype(float), (baseline > student).astype(float)


def split_users(users: Users, config: Config) -> tuple[int, float]:
    """(users that an A/B test needs, true relative lift of page CTR)."""
    control, treatment = (users.clicked_pages(config.users, arm) for arm in (0, 1))
    lift = treatment.mean() / control.mean() - 1
    return users_needed(estimate(UserTotals(control, np.ones(config.users))), lift), float(lift)


def interleaved_users(users: Users, config: Config, credit_agreed: bool) -> int:
    """Users that an interleaving test needs."""
    found = preference(*users.interleaved(config.users, credit_agreed))
    decided = found.pages / config.users
    # a share of one half has the sign test's variance over decided pages
    reach = stats.norm.isf(0.025) + stats.norm.ppf(0.8)
    return int(np.ceil((reach / (2 * (found.share - 0.5))) ** 2 / decided))


def power(users: Users, count: int, trials: int, credit_agreed: bool) -> float:
    """Share of interleaving tests with `count` users that find the student better at alpha 0.05."""
    found = 0
    for _ in range(trials):
        result = preference(*users.interleaved(count, credit_agreed))
        found += result.p < 0.05 and result.share > 0.5
    return found / trials


def false_alarms(config: Config, credit_agreed: bool) -> float:
    """Share of tests between two rankings of one quality that find a difference at alpha 0.05."""
    users = Users(config, NO_DIFFERENCE, np.random.default_rng([config.seed, 99]))
    results = (preference(*users.interleaved(config.null_users, credit_agreed)) for _ in range(config.null_trials))
    return sum(result.p < 0.05 for result in results) / config.null_trials


def main(config: Config) -> None:
    """Plan and simulate the tests for every pair of rankings, print the tables and write them to --out."""
    lines = [
        "| student is | page CTR lift | A/B users | scheme | interleaving users | fewer than A/B by | power there |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, (name, noise) in enumerate(tqdm(PAIRS.items(), unit="pair", file=sys.stderr)):
        users = Users(config, noise, np.random.default_rng([config.seed, number]))
        split, lift = split_users(users, config)
        for scheme, credit_agreed in SCHEMES.items():
            count = interleaved_users(users, config, credit_agreed)
            reached = f"{power(users, count, config.trials, credit_agreed):.0%}" if count < 1000 else "not simulated"
            lines.append(
                f"| {name} | {lift:+.2%} | {split:,} | {scheme} | {count:,} | {split / count:.1f} times | {reached} |"
            )
    lines += ["", "| scheme | A/A tests that find a difference |", "|---|---|"]
    for scheme, credit_agreed in SCHEMES.items():
        lines.append(f"| {scheme} | {false_alarms(config, credit_agreed):.1%} of {config.null_trials:,} |")
    report = "\n".join(lines)
    print(report)
    if config.out is not None:
        about = [
            "# Users needed: A/B test against interleaving",
            "",
            "`python -m benchmarks.ab.interleaving`, two shared x86-64 cores, no GPU",
            "",
            f"One page of {config.documents} results a user, clicks by a dynamic Bayesian network, 80% power at alpha",
            f"0.05. The A/B test is on page CTR. Sizes are planned from {config.users:,} simulated users; the last",
            "column is the power that simulated interleaving tests of that size really have. Under `competing pairs`,",
            "the router's scheme, a document that both rankings want next is nobody's. A/A tests: two rankings of one",
            f"quality that differ, {config.null_users} users each.",
            "",
        ]
        config.out.write_text("\n".join([*about, report]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.ab.interleaving --out docs/results/interleaving.md")
