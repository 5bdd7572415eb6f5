"""How many clicks would an arm get that nobody has seen yet? Estimated from logged pages (docs/ab-forecast.md).

python clients/ab_forecast.py --data runs/ab/data --model student --propensities runs/clicks.report.json

Exit code 3: the log cannot speak for that arm, and the line says why.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from clients.ab.forecast import bandit_log, router_pages
from clients.ab.forecast.estimators import Limits, LoggedRows, Outlook, forecast
from ranking.database import DuckDbSettings, querying
from ranking.errors import InputError
from ranking.files import write_json
from ranking.program import run

EXIT_REFUSED = 3


@dataclass
class Config(DuckDbSettings):
    """Estimate the clicks a page of a new arm from pages logged without it: IPS, SNIPS and doubly robust.

    Args:
        data: folder of ab_compact with exposures and, unless there is `scores`, shadows
        model: the model that scored these pages in the shadow
        scores: Parquet (request_id, doc_id, score): how the new arm would score the logged documents
        propensities: the .report.json that prepare_clicks wrote from this log: how likely each position is looked at
        experiment: take only pages of this experiment
        arm: take only pages of this arm, the one that the lift is over; all pages when left out
        bandit_log: in place of `data`, a log of drawn items in the Open Bandit Dataset's format
        bandit_target: with bandit_log, the log of the policy to estimate; only what it showed is read
        alpha: error rate of the intervals
        limits: where the forecast is refused
        out: JSON file for the figures
    """

    data: Path | None = None
    model: str = ""
    scores: Path | None = None
    propensities: Path | None = None
    experiment: str = ""
    arm: str = ""
    bandit_log: Path | None = None
    bandit_target: Path | None = None
    alpha: float = 0.05
    limits: Limits = field(default_factory=Limits)
    out: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.data is None) == (self.bandit_log is None):
            raise ValueError("give either data (the router's log) or bandit_log")
        if (self.bandit_log is None) != (self.bandit_target is None):
            raise ValueError("bandit_log and bandit_target belong together")
        if self.data is not None and self.propensities is None:
            raise ValueError("propensities: the .report.json that prepare_clicks wrote from this log is needed")
        if self.data is not None and bool(self.model) == (self.scores is not None):
            raise ValueError("give either model (its shadow scores) or scores")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}: an error rate between 0 and 1 is needed")


def main(config: Config) -> int:
    """Print the estimates, or in one line why there are none; returns the exit code."""
    try:
        outlook = forecast(read_rows(config), config.limits, config.alpha)
    except ValueError as problem:
        raise InputError(f"{config.data or config.bandit_log}: {problem}") from problem
    if config.out is not None:
        figures = asdict(outlook)
        figures["forecasts"] = [
            {name: None if value != value else value for name, value in one.items()} for one in figures["forecasts"]
        ]  # JSON has no NaN
        write_json(config.out, figures)
    print(told(outlook, config.alpha))
    return EXIT_REFUSED if outlook.refusal else 0


def read_rows(config: Config) -> LoggedRows:
    """The log as rows for the estimators."""
    with config.open_database() as database, querying(config.data or config.bandit_log or ""):
        if config.bandit_log is not None and config.bandit_target is not None:
            logs = [bandit_log.read_bandit_log(database, path) for path in (config.bandit_log, config.bandit_target)]
            return bandit_log.rows_of(*logs)
        assert config.data is not None and config.propensities is not None, "__post_init__ has checked it"
        bias = router_pages.PositionBias.read(config.propensities)
        pages = router_pages.read_pages(
            database, config.data, config.model, config.experiment, config.arm, config.scores
        )
        return router_pages.rows_of(pages, bias)


def told(outlook: Outlook, alpha: float) -> str:
    """The outlook in lines for a person."""
    overlap = outlook.overlap
    lines = [
        f"{outlook.pages:,} pages of {outlook.users:,} users, {outlook.logged:.4f} clicks a page as logged; for the "
        f"new arm they are worth {overlap.effective_rows:,.0f} shown documents and "
        f"{overlap.effective_clicks:,.0f} clicks, {overlap.unsupported:.1%} of it unseen"
    ]
    if outlook.refusal:
        return "\n".join([*lines, f"no forecast: {outlook.refusal}"])
    for one in outlook.forecasts:
        if one.value <= 0:
            lines.append(f"{one.estimator:6} {one.value:.4f} clicks a page: not above 0, so there is no interval")
            continue
        lines.append(
            f"{one.estimator:6} {one.value:.4f} clicks a page [{one.low:.4f}, {one.high:.4f}]   "
            f"lift {one.lift:+.1%} [{one.lift_low:+.1%}, {one.lift_high:+.1%}]"
        )
    lines.append(f"intervals of {1 - alpha:.0%}, by user; a forecast decides what to test, an A/B test decides")
    return "\n".join(lines)


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python clients/ab_forecast.py --data runs/ab/data --model student --propensities "
        "runs/clicks.report.json",
    )
