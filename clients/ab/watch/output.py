"""What the watch writes: metrics for node_exporter's textfile collector, and a page for people."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from clients.ab.watch.findings import RUNBOOK, Finding
from ranking.files import write_text

LABELS = ("check", "model", "version", "platform", "field")


def write_metrics(path: Path, findings: Sequence[Finding], day: date, finished: float) -> None:
    """Prometheus text: value, reference and alert of each finding, the day, and when the watch ended (since 1970).

    Written aside and renamed, as the textfile collector wants it.
    """
    registry = CollectorRegistry()
    gauges = {
        "value": Gauge("disranker_watch_value", "The day's figure of a check", LABELS, registry=registry),
        "reference": Gauge("disranker_watch_reference", "What it is compared with", LABELS, registry=registry),
        "alert": Gauge("disranker_watch_alert", "1: somebody should look", LABELS, registry=registry),
    }
    for finding in findings:
        labels = [{"check": finding.check, **finding.where}.get(name, "") for name in LABELS]
        for name, gauge in gauges.items():
            gauge.labels(*labels).set(float(getattr(finding, name)))
    began = datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
    Gauge("disranker_watch_day_seconds", "When the day that was looked at began", registry=registry).set(began)
    Gauge("disranker_watch_finished_seconds", "When the watch last ended", registry=registry).set(finished)
    write_text(path, generate_latest(registry).decode())


def write_page(path: Path, findings: Sequence[Finding], day: date, pages: int, days_before: int) -> None:
    """The day's findings as an HTML page, alerts first."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    ordered = sorted(findings, key=lambda finding: not finding.alert)
    alerts = [finding for finding in ordered if finding.alert]
    page = environment.get_template("page.html.jinja").render(
        day=day, pages=pages, days_before=days_before, findings=ordered, alerts=alerts, runbook=RUNBOOK
    )
    write_text(path, page)
