"""How many fewer users team-draft interleaving needs than an A/B test to find the better ranking, by simulation."""

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
        documents: documents a page
        seed: of the simulation
        out: Markdown file for the results; printed only when left out
    """

    users: int = 100_000
    trials: int = 300
    documents: int = 10
    seed: int = 3
    out: Path | None = None


# (noise of the baseline's score, of the student's): the smaller, the better the order by grade
PAIRS = {"clearly better": (2.0, 1.0), "better": (1.5, 1.2), "slightly better": (1.3, 1.2)}


class Users:
    """Simulated pages, one a user: grades, both rankings, clicks by the click model (a satisfied user stops: DBN)."""

    def __init__(self, config: Config, noise: tuple[float, float], rng: np.random.Generator):
        self.noise, self.rng, self.documents = noise, rng, config.documents
        self.model = ClickModel(kind="dbn")

    def grades(self, users: int) -> np.ndarray:
        """Grades of each user's documents, int [users, documents]."""
        return self.rng.choice(5, size=(users, self.documents), p=[0.5, 0.2, 0.15, 0.1, 0.05])

    def ranked(self, grades: np.ndarray, noise: float) -> np.ndarray:
        """Document numbers in the order of a noisy score, int [users, documents]."""
        return np.argsort(-(grades + noise * self.rng.standard_normal(grades.shape)), axis=1)

    def clicked_pages(self, users: int, arm: int) -> np.ndarray:
        """Whether the page got a click, float [users] of 0 and 1."""
        grades = self.grades(users)
        shown = np.take_along_axis(grades, self.ranked(grades, self.noise[arm]), axis=1)
        return self.model.simulate(shown, self.rng).clicked.any(axis=1).astype(float)

    def interleaved(self, users: int) -> tuple[np.ndarray, np.ndarray]:
        """Pages won by the student and by the baseline, each float [users] of 0 and 1."""
        grades = self.grades(users)
        orders = [self.ranked(grades, noise) for noise in self.noise]
        pages, teams = np.empty_like(grades), np.empty_like(grades)
        for user in range(users):
            first, second = orders[0][user].tolist(), orders[1][user].tolist()
            pages[user], teams[user] = team_draft(first, second, str(self.rng.integers(1 << 40)))
        clicked = self.model.simulate(np.take_along_axis(grades, pages, axis=1), self.rng).clicked
        student, baseline = ((clicked & (teams == team)).sum(axis=1) for team in (1, 0))
        return (student > baseline).astype(float), (baseline > student).astype(float)


def needed(users: Users, config: Config) -> tuple[int, int, float]:
    """(users of an A/B test, users of an interleaving test, true relative lift of page CTR)."""
    control, treatment = (users.clicked_pages(config.users, arm) for arm in (0, 1))
    baseline = estimate(UserTotals(control, np.ones(config.users)))
    lift = treatment.mean() / control.mean() - 1
    wins = users.interleaved(config.users)
    found = preference(*wins)
    decided = found.pages / config.users
    # a share of one half has the sign test's variance over decided pages
    reach = stats.norm.isf(0.025) + stats.norm.ppf(0.8)
    interleaved = (reach / (2 * (found.share - 0.5))) ** 2 / decided
    return users_needed(baseline, lift), int(np.ceil(interleaved)), float(lift)


def power(users: Users, count: int, trials: int) -> float:
    """Share of interleaving tests with `count` users that find the student better at alpha 0.05."""
    found = 0
    for _ in range(trials):
        result = preference(*users.interleaved(count))
        found += result.p < 0.05 and result.share > 0.5
    return found / trials


def main(config: Config) -> None:
    """Plan and simulate both tests for every pair of rankings, print the table and write it to --out."""
    lines = [
        "| student is | page CTR lift | A/B users | interleaving users | fewer by | power at that size |",
        "|---|---|---|---|---|---|",
    ]
    for name, noise in tqdm(PAIRS.items(), unit="pair", file=sys.stderr):
        users = Users(config, noise, np.random.default_rng([config.seed, len(lines)]))
        split, interleaved, lift = needed(users, config)
        reached = power(users, interleaved, config.trials) if interleaved < 5000 else None
        lines.append(
            f"| {name} | {lift:+.2%} | {split:,} | {interleaved:,} | {split / interleaved:.1f} times | "
            f"{'not simulated' if reached is None else f'{reached:.0%}'} |"
        )
    report = "\n".join(lines)
    print(report)
    if config.out is not None:
        config.out.write_text(
            "# Users needed: A/B test against team-draft interleaving\n\n`python -m benchmarks.ab.interleaving`\n\n"
            f"One page of {config.documents} results a user, clicks by a dynamic Bayesian network, 80% power at alpha "
            f"0.05. The A/B test is\non page CTR. Sizes are planned from {config.users:,} simulated users; the last "
            f"column is the power that simulated\ninterleaving tests of that size really have.\n\n{report}\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.ab.interleaving --out docs/results/interleaving.md")
