"""Does ab_forecast's interval hold the true lift? Simulated arm pairs under two click models, and a real bandit log.

python -m benchmarks.ab.forecast --out docs/results/forecast.md
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from clients.ab.forecast.estimators import Limits, Outlook, forecast
from clients.ab.forecast.router_pages import PositionBias, ScoredPages, rows_of
from clients.ab_forecast import Config as ForecastConfig
from clients.ab_forecast import read_rows
from ranking.click_models import ClickModel
from ranking.files import write_text
from ranking.program import run

ESTIMATORS = ("IPS", "SNIPS", "DR")
PROPENSITY_ERROR = 0.03  # the largest that prepare_clicks makes on the built-in world's log (docs/clicks.md)


@dataclass
class Config:
    """Measure how often the forecast's interval holds the true lift.

    Args:
        pairs: arm pairs, each two rankers of other noise
        logs: logs simulated for each pair
        users: users of a log
        pages: pages of a user on average
        queries: distinct queries; their frequencies fall as 1 / rank
        unseen: up to so many documents stand below the ten that users look at, another number for each pair
        seed: of the simulation
        obd: folder of the Open Bandit Dataset with random/men.csv.gz and bts/men.csv.gz; left out, it is not measured
        out: Markdown file for the results; printed only when left out
    """

    pairs: int = 30
    logs: int = 10
    users: int = 1500
    pages: float = 2.0
    queries: int = 400
    unseen: int = 3
    seed: int = 5
    obd: Path | None = None
    out: Path | None = None


@dataclass
class Coverage:
    """What became of the forecasts under one click model. held: by estimator, of the logs that were not refused."""

    held: dict[str, list[bool]] = field(default_factory=lambda: {name: [] for name in ESTIMATORS})
    widths: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in ESTIMATORS})
    refused: list[str] = field(default_factory=list)

    def add(self, outlook: Outlook, true_lift: float) -> None:
        """Count one log."""
        if outlook.refusal:
            self.refused.append(outlook.refusal)
        for one in outlook.forecasts:
            self.held[one.estimator].append(one.lift_low <= true_lift <= one.lift_high)
            self.widths[one.estimator].append(one.lift_high - one.lift_low)


class ArmPair:
    """Two rankers of one collection. Their scores are grade plus noise, fixed for each query and document."""

    def __init__(self, config: Config, kind: str, rng: np.random.Generator):
        self.config, self.rng = config, rng
        self.model = ClickModel(kind="dbn") if kind == "dbn" else ClickModel()
        self.documents = 10 + int(rng.integers(0, config.unseen + 1))
        shape = (config.queries, self.documents)
        self.grades = rng.choice(5, size=shape, p=[0.5, 0.2, 0.15, 0.1, 0.05])
        popularity = 1 / np.arange(1, config.queries + 1)
        self.popularity = popularity / popularity.sum()
        noises = np.exp(rng.uniform(np.log(0.5), np.log(4), 2))
        # both rankers stand on one first stage, as a student and the baseline before it do
        common = rng.normal(size=shape)
        scores = [self.grades + noise * (0.6 * common + 0.8 * rng.normal(size=shape)) for noise in noises]
        self.orders = [np.argsort(-one, axis=1) for one in scores]
        self.bias = np.zeros(self.documents)
        if kind == "pbm":
            self.bias[:10] = self.model.propensities(10)
        else:  # how often each place is looked at under the logging ranker, whatever stands there
            queries = rng.choice(config.queries, 50_000, p=self.popularity)
            shown = np.take_along_axis(self.grades, self.orders[0], axis=1)[queries, :10]
            looked_at = self.model.simulate(shown, rng).examined.mean(0)
            self.bias[:10] = looked_at / looked_at[0]

    def visits(self, order: NDArray[np.int64], queries: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Clicks [pages, documents] by place; nobody looks below the tenth."""
        grades = np.take_along_axis(self.grades, order, axis=1)[queries]
        grades[:, 10:] = -1
        return self.model.simulate(grades, self.rng).clicked

    def true_clicks(self, order: NDArray[np.int64]) -> float:
        """Expected clicks a page, exact for the position-based model, else from 400,000 pages."""
        if self.model.kind == "pbm":
            grades = np.take_along_axis(self.grades, order, axis=1)
            return float(self.popularity @ (np.asarray(self.model.attractiveness)[grades] * self.bias).sum(1))
        total = 0
        for _ in range(8):
            total += int(self.visits(order, self.rng.choice(len(self.popularity), 50_000, p=self.popularity)).sum())
        return total / 400_000

    def log(self) -> ScoredPages:
        """One log of the first ranker, with the places that the second would give."""
        config, rng = self.config, self.rng
        user = np.repeat(np.arange(config.users), rng.geometric(1 / config.pages, config.users))
        # a user has a few queries and asks them again: pages of a user are alike
        own = rng.choice(config.queries, size=(config.users, 3), p=self.popularity)
        queries = own[user, rng.integers(0, 3, len(user))]
        logged, other = self.orders
        clicked = self.visits(logged, queries)
        places = np.argsort(other, axis=1)  # of each document, by the second ranker
        new_place = np.take_along_axis(places, logged, axis=1)[queries]
        pages, documents = clicked.shape
        return ScoredPages(
            np.repeat(np.arange(pages), documents),
            np.tile(np.arange(documents), pages),
            new_place.reshape(-1),
            clicked.reshape(-1).astype(np.float64),
            (queries[:, None] * documents + logged[queries]).reshape(-1),
            user,
        )

    def estimated_bias(self) -> PositionBias:
        """The propensities as prepare_clicks would know them: a little wrong, with their standard errors."""
        errors = np.where(self.bias > 0, PROPENSITY_ERROR / 2, 0.0)
        errors[0] = 0.0
        return PositionBias(self.bias * np.exp(errors * self.rng.normal(size=len(errors))), errors)


def measure(config: Config, kind: str) -> Coverage:
    """Forecast every log of every pair under one click model."""
    rng, coverage = np.random.default_rng(config.seed), Coverage()
    for _ in tqdm(range(config.pairs), desc=f"arm pairs, {kind}", leave=False):
        pair = ArmPair(config, kind, rng)
        logged, other = (pair.true_clicks(order) for order in pair.orders)
        for _ in range(config.logs):
            coverage.add(forecast(rows_of(pair.log(), pair.estimated_bias()), Limits()), other / logged - 1)
    return coverage


def open_bandit(folder: Path) -> list[str]:
    """Rows of a table: each policy estimated from the other's log, beside what its own log has."""
    paths = {name: folder / name / "men.csv.gz" for name in ("random", "bts")}
    rows = ["| from | to | estimator | clicks an impression | 95% interval | logged truth | held |", "|" + "---|" * 7]
    for source, target in (("random", "bts"), ("bts", "random")):
        outlook = forecast(read_rows(ForecastConfig(bandit_log=paths[source], bandit_target=paths[target])), Limits())
        back = forecast(read_rows(ForecastConfig(bandit_log=paths[target], bandit_target=paths[source])), Limits())
        for one in outlook.forecasts:
            held = "yes" if one.low <= back.logged <= one.high else "no"
            interval = f"{one.low:.4f} to {one.high:.4f}"
            rows.append(
                f"| {source} | {target} | {one.estimator} | {one.value:.4f} | {interval} | {back.logged:.4f} | {held} |"
            )
        if outlook.refusal:
            rows.append(f"| {source} | {target} | refused: {outlook.refusal} | | | {back.logged:.4f} | |")
    return rows


def main(config: Config) -> None:
    """Print the results, and write them as a page."""
    started = time.time()
    lines = [
        "# Forecast: does the interval hold what an arm would get?",
        "",
        "Command: `python -m benchmarks.ab.forecast`; two shared x86-64 cores, no GPU. "
        f"{config.pairs} arm pairs, {config.logs}",
        f"logs of {config.users:,} users for each; 95% intervals of the lift of the second ranker, from pages of the "
        "first. Propensities",
        "are wrong by 1.5%, as estimated ones are.",
        "",
        "| click model | estimator | held the true lift | median width | logs refused |",
        "|" + "---|" * 5,
    ]
    for kind in ("pbm", "dbn"):
        coverage = measure(config, kind)
        total = config.pairs * config.logs
        for name in ESTIMATORS:
            held = coverage.held[name]
            share = f"{np.mean(held):.1%} of {len(held)}" if held else "-"
            width = f"{np.median(coverage.widths[name]):.3f}" if held else "-"
            lines.append(f"| {kind} | {name} | {share} | {width} | {len(coverage.refused)} of {total} |")
    if config.obd is not None:
        lines += [
            "",
            "Open Bandit Dataset, Men, 10,000 impressions of each policy (Saito et al., arXiv 2008.07146):",
            "",
        ]
        lines += open_bandit(config.obd)
    text = "\n".join(lines) + "\n"
    if config.out is not None:
        write_text(config.out, text)
    print(text, f"\n{time.time() - started:.0f} s", sep="")


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.ab.forecast --out docs/results/forecast.md")
