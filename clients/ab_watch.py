"""The daily watch: has what is served drifted from its build, or from the days before? (docs/ab-watch.md)

python clients/ab_watch.py --data runs/ab/data --repository model_repository --page runs/watch.html

Exit code 3: at least one alert; each is a line, with what to do.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path

from clients.ab.watch import checks
from clients.ab.watch.checks import Watched, WatchLimits
from clients.ab.watch.findings import RUNBOOK, Finding, judged
from clients.ab.watch.output import write_metrics, write_page
from ranking.database import DuckDbSettings, querying
from ranking.errors import InputError
from ranking.program import run

EXIT_ALERT = 3


@dataclass
class Config(DuckDbSettings):
    """Compare a day of the A/B log with the builds that served it and with the days before.

    Args:
        data: folder of ab_compact
        repository: the model repository that served; left out, scores and text are not compared with builds
        day: the UTC day to look at, as 2026-11-21; the last one that is over when left out
        days_before: how many days before it clicks, queries and latency are compared with
        judgments: fresh judgments (table `judgments`): calibration is measured on those of the day's pages
        text_pairs: pairs of the day whose text is looked at
        alpha: error rate of all of the day's tests together
        limits: from where a change is large
        page: HTML file to write
        metrics: Prometheus text file to write, in the folder of node_exporter's textfile collector
    """

    data: Path
    repository: Path | None = None
    day: str = ""
    days_before: int = 7
    judgments: Path | None = None
    text_pairs: int = 2000
    alpha: float = 0.01
    limits: WatchLimits = field(default_factory=WatchLimits)
    page: Path | None = None
    metrics: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.day:
            date.fromisoformat(self.day)  # ValueError says what is no date
        for name in ("days_before", "text_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: 1 or more is needed")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}: an error rate between 0 and 1 is needed")


def watch(config: Config) -> tuple[date, int, list[Finding]]:
    """The day that was looked at, how many pages it has, and what was found.

    InputError: no such day or repository, or a file that cannot be read.
    """
    if config.repository is not None and not config.repository.is_dir():
        raise InputError(f"{config.repository}: no such model repository, so no score could be checked")
    today = datetime.now(UTC).date()
    day = date.fromisoformat(config.day) if config.day else checks.latest_day(config.data, today)
    with config.open_database() as database, querying(config.data):
        watched = Watched(
            database, config.data, config.repository, day, config.days_before, config.text_pairs, config.limits
        )
        watched.load()
        findings = judged(look(watched, config.judgments), config.alpha)
        return day, watched.value("SELECT count(*) FROM page WHERE today"), findings


def main(config: Config) -> int:
    """Run the checks, print the alerts, write page and metrics; returns the exit code."""
    day, pages, findings = watch(config)
    alerts = [finding for finding in findings if finding.alert]
    print(f"{day}: {pages:,} pages, {len(findings)} checks, {len(alerts)} alerts")
    for alert in alerts:
        where = " ".join(f"{name} {value}" for name, value in alert.where.items())
        print(
            f"ALERT {alert.check} {where}: {alert.value:.4g}, reference {alert.reference:.4g}; {RUNBOOK[alert.check]}"
            + (f" ({alert.note})" if alert.note else "")
        )
    if config.metrics is not None:
        write_metrics(config.metrics, findings, day, time.time())
    if config.page is not None:
        write_page(config.page, findings, day, pages, config.days_before)
    return EXIT_ALERT if alerts else 0


def look(watched: Watched, judgments: Path | None) -> list[Finding]:
    """Every check of the day, not judged yet."""
    return [
        *checks.score_findings(watched),
        *checks.query_findings(watched),
        *checks.text_findings(watched),
        *checks.calibration_findings(watched, judgments),
        *checks.click_findings(watched),
        *checks.latency_findings(watched),
    ]


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python clients/ab_watch.py --data runs/ab/data --repository model_repository --page runs/watch.html",
    )
