"""The report as one dictionary of figures, and the HTML page and JSON file made of it."""

from __future__ import annotations

import logging
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from clients.ab.report import charts
from clients.ab.report.comparison_table import ErrorRates, ReportRow, comparison_rows, latency_per_arm
from clients.ab.report.experiment_pages import ExperimentPages
from clients.ab.report.lift_breakdown import lift_by_segment, lift_over_time
from clients.ab.report.load_pages import LogSelection
from clients.ab.report.statistics import GoodSameBad, preference
from clients.ab.report.trust_checks import TrustCheck
from clients.ab.report.verdict import verdict
from ranking.files import write_json, write_text
from ranking.significance import p_text

logger = logging.getLogger("ab_report")


def report_figures(
    pages: ExperimentPages,
    chosen: LogSelection,
    rates: ErrorRates,
    checks: list[TrustCheck],
    sample_ratio_p: float,
    judged: GoodSameBad | None,
) -> dict[str, Any]:
    """Every figure of the report as JSON-able values; the pictures are made of them (and of the latencies)."""
    rows = comparison_rows(pages, rates)
    trustworthy = all(check.passed for check in checks)
    users = dict(zip((chosen.control, chosen.treatment), pages.users))
    return {
        "experiment": pages.experiment,
        "control": chosen.control,
        "treatment": chosen.treatment,
        "first": pages.first,
        "last": pages.last,
        "pages": pages.pages,
        "users": users,
        "srm_p": sample_ratio_p,
        "trustworthy": trustworthy,
        "checks": [asdict(check) for check in checks],
        "verdict": verdict(rows, trustworthy, users),
        "confidence": f"{100 * (1 - rates.alpha):g}%",
        "dwell_cap": pages.dwell_cap,
        "metrics": [asdict(row) for row in rows],
        "segments": lift_by_segment(pages, rates),
        "cumulative": lift_over_time(pages, rates),
        "interleaving": _interleaving(pages),
        "judged": {**asdict(judged), "advantage": judged.advantage, "p": judged.p} if judged else None,
        "basis": _basis(pages, chosen, rates, rows),
    }


def _interleaving(pages: ExperimentPages) -> dict[str, Any] | None:
    if pages.interleaved is None:
        return None
    try:
        return asdict(preference(*pages.interleaved))
    except ValueError as problem:
        logger.warning("interleaved pages are left out: %s", problem)
        return None


def _basis(pages: ExperimentPages, chosen: LogSelection, rates: ErrorRates, rows: list[ReportRow]) -> dict[str, str]:
    versions = ", ".join(f"{version} ({n:,} pages)" for version, n in pages.model_versions.items())
    reduced = ", reduced by CUPED with each user's pages before the start" if pages.has_pre_period else ""
    deciding = ", ".join(row.name for row in rows if row.decides)
    early = pages.left_out.early_pages
    return {
        "log": str(chosen.path),
        "arms": f"{chosen.control} (control) and {chosen.treatment}, by assignment: "
        "pages that fell back stay in their arm",
        "model versions": versions or "not logged",
        "left out": f"{pages.left_out.forced_pages:,} forced pages, "
        f"{pages.left_out.outside_pages:,} pages outside the two arms"
        + (f", {early:,} pages of the arms before {chosen.start}" if early else ""),
        "variance": f"delta method over users{reduced}",
        "error rate": f"{rates.alpha:g}, Holm over {deciding}; "
        f"always-valid interval tuned for {rates.planned_users:,} users",
        "software": f"Python {platform.python_version()}, NumPy {np.__version__}",
    }


def report_charts(figures: dict[str, Any], pages: ExperimentPages) -> dict[str, str]:
    """The pictures as SVG: lifts, cumulative, segments, latency; an empty text where there is nothing to draw."""
    lifts = [(m["name"], m["lift"], m["low"], m["high"]) for m in figures["metrics"] if m["lift"] is not None]
    segments = [(s["name"], s["lift"], s["low"], s["high"]) for s in figures["segments"]]
    over_time = figures["cumulative"]
    drawn = {
        "lifts": charts.forest(lifts, "lift of every metric") if lifts else "",
        "cumulative": "",
        "segments": charts.forest(segments, "lift by segment") if segments else "",
        "latency": "",
    }
    if len(over_time["time"]) > 1:
        lift, low, high = (np.array(over_time[name]) for name in ("lift", "low", "high"))
        drawn["cumulative"] = charts.cumulative(over_time["time"], lift, low, high, "page CTR lift so far")
    if "latency_ms" in pages.columns:
        latencies = latency_per_arm(pages, (figures["control"], figures["treatment"]))
        if len(latencies) == 2:
            drawn["latency"] = charts.ecdf(latencies, "latency per arm")
    return drawn


def write_report(figures: dict[str, Any], pictures: dict[str, str], out: Path) -> Path:
    """Write the JSON and the HTML page beside it, each aside and renamed. Returns the JSON's path."""
    beside = write_figures(figures, out)  # first: a page never stands beside older figures
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("page.html.jinja").render(
        r={**figures, "charts": pictures}, pct=charts.percent, p_text=p_text
    )
    write_text(out, page)
    return beside


def write_figures(figures: dict[str, Any], out: Path) -> Path:
    """Write figures as JSON beside `out`. Returns the path."""
    beside = out.with_suffix(".json")
    write_json(beside, figures)
    return beside


def metric_line(metric: dict[str, Any]) -> str:
    """One metric of the figures for the terminal: both arms, the lift with its interval and p, or why there is none."""
    if metric["lift"] is None:
        found = metric["reason"]
    else:
        lift, low, high = (charts.percent(metric[name]) for name in ("lift", "low", "high"))
        found = f"{lift} [{low}, {high}], p {p_text(metric['p'], True)}"
    return f"{metric['name']:16} {metric['control_text']:>10} {metric['treatment_text']:>10}  {found}"
