"""Who won the A/B test: one HTML page and a JSON file from the router's compacted log, or from your own events
table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from clients.ab.report.comparison_table import ErrorRates
from clients.ab.report.experiment_pages import ExperimentPages
from clients.ab.report.experiment_plan import plan
from clients.ab.report.load_pages import LogSelection, load_interleaved, load_pages
from clients.ab.report.report_page import metric_line, report_charts, report_figures, write_figures, write_report
from clients.ab.report.side_by_side import read_judgments
from clients.ab.report.statistics import preference
from clients.ab.report.trust_checks import trust_checks
from ranking.errors import DataError, InputError
from ranking.program import run
from ranking.query_engine import QueryEngineSettings, told
from ranking.significance import p_text


@dataclass
class Config(QueryEngineSettings):
    """Say who won an A/B test, or how long one must run.

    Args:
        events: folder written by clients/ab_compact.py, or a Parquet file, folder or glob of the `events` table
        out: HTML file; the same figures go to a JSON file beside it
        control: arm that is online today
        treatment: arm that wants to replace it
        experiment: name of the experiment; needed only where the log holds several
        weights: planned traffic shares of control and treatment, for the sample-ratio check
        alpha: error rate of tests and intervals
        planned_users: users of both arms at which the always-valid interval is tightest; choose it before the start
        start: ISO time of the experiment's start; earlier pages of the same users serve CUPED, those of a
            treatment that had begun do not
        judgments: CSV or Parquet with a column `verdict` of good, same, bad (treatment seen against control)
        max_pages_per_user: leave out users with more pages than this (bots), counted in the report
        interleaved: report the interleaved pages of --experiment only, for an experiment without arms to compare
        plan: print the users and days that find `effect`, from this log's variance, and write no report; the log may
            be one of before the experiment
        effect: relative lift of page CTR that --plan is for; the default is the paper's
        power: chance of finding that lift
    """

    events: Path
    out: Path = Path("report.html")
    control: str = "baseline"
    treatment: str = "student"
    experiment: str = ""
    weights: list[float] = field(default_factory=lambda: [0.5, 0.5])
    alpha: float = 0.05
    planned_users: int = 10_000
    start: str | None = None
    judgments: Path | None = None
    max_pages_per_user: int | None = None
    interleaved: bool = False
    plan: bool = False
    effect: float = 0.0047
    power: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.weights) != 2 or min(self.weights) <= 0:
            raise ValueError("weights: two positive numbers, control's and treatment's share")
        if not 0 < self.alpha < 1:
            raise ValueError("alpha lies between 0 and 1")
        if self.out.suffix == ".json":
            raise ValueError(f"out is {self.out}: the page's own name is needed, the figures go to a .json beside it")
        if self.planned_users < 1:
            raise ValueError(f"planned_users is {self.planned_users}: it must be above 0")
        if self.max_pages_per_user is not None and self.max_pages_per_user < 1:
            raise ValueError(f"max_pages_per_user is {self.max_pages_per_user}: it must be above 0")

    def selection(self) -> LogSelection:
        """Which pages of which log are compared."""
        return LogSelection(
            self.events,
            self.control,
            self.treatment,
            self.experiment,
            self.start,
            self.max_pages_per_user,
            control_alone=self.plan,
        )


def report_interleaving(config: Config) -> None:
    """Print and write what interleaved pages alone say."""
    wins = load_interleaved(config.selection(), config)
    try:
        found = preference(*wins)
    except ValueError as problem:
        raise InputError(f"{config.events}: too few interleaved pages with a winner: {problem}") from problem
    beside = write_figures({"experiment": config.experiment, "interleaving": asdict(found)}, config.out)
    print(
        f"{config.treatment} won {found.share:.1%} of {found.pages:,} decided pages of {found.users:,} users, "
        f"p {p_text(found.p, True)}\n{beside}"
    )


def main(config: Config) -> None:
    """Write the report, or print the plan, and say on the terminal what it found."""
    # not when the settings are read: an object store's folder would be fetched, for one file the whole bucket
    config.temp_folder = config.temp_folder or config.out.parent
    if config.interleaved:
        report_interleaving(config)
        return
    chosen, rates = config.selection(), ErrorRates(config.alpha, config.planned_users)
    pages = load_pages(chosen, config)
    try:
        _report(pages, config, chosen, rates)
    except pages.engine.problems as problem:
        raise DataError(config.events, told(pages.engine, problem)) from problem
    finally:
        pages.engine.close()


def _report(pages: ExperimentPages, config: Config, chosen: LogSelection, rates: ErrorRates) -> None:
    if config.plan:
        share = config.weights[1] / sum(config.weights)
        try:
            print(plan(pages, config.control, config.effect, config.power, config.alpha, share))
        except ValueError as problem:
            raise InputError(f"{config.events}: nothing can be planned from it: {problem}") from problem
        return
    checks, sample_ratio_p = trust_checks(pages, config.weights, config.max_pages_per_user)
    judged = read_judgments(config.judgments, config.control, config.treatment) if config.judgments else None
    figures = report_figures(pages, chosen, rates, checks, sample_ratio_p, judged)
    beside = write_report(figures, report_charts(figures, pages), config.out)
    for check in checks:
        print(("ok   " if check.passed else "FAIL ") + check.text)
    for metric in figures["metrics"]:
        print(metric_line(metric))
    print(figures["verdict"])
    print(f"{config.out} and {beside}")


if __name__ == "__main__":
    run(main, Config, example="python clients/ab_report.py --events runs/ab/data --out runs/ab/report.html")
