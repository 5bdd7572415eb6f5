"""Who won the A/B test: one HTML page and a JSON file from the router's compacted log, or from your own events table."""

from __future__ import annotations

import csv
import logging
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from scipy import stats
from tqdm import tqdm

from clients.ab.report import charts as ab_charts
from clients.ab.report.aggregate import RATIO_METRICS, AbLog, open_log, read_interleaved
from clients.ab.report.statistics import (
    Comparison,
    Estimate,
    GoodSameBad,
    UserTotals,
    compare,
    cuped,
    estimate,
    holm,
    preference,
    quantile,
    sample_ratio_p,
    users_needed,
)
from ranking.errors import DataError, InputError
from ranking.files import write_json, write_text
from ranking.program import run

log = logging.getLogger("ab_report")

DECIDING = ("page CTR", "user CTR", "dwell per click")  # the paper's online table; the others are guardrails
LATENCIES = {"latency p50": 0.5, "latency p95": 0.95, "latency p99": 0.99}
SRM_ALARM = 0.001  # the usual threshold for a sample-ratio mismatch (Fabijan et al. 2019)
LEAK_ALARM = 0.001  # share of users seen in both arms
HEAVY_ALARM = 0.01  # share of all pages made by one user
HIGHER_IS_BETTER = {name: name in DECIDING for name in (*RATIO_METRICS, *LATENCIES)}


@dataclass
class Config:
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
        start: ISO time of the experiment's start; earlier pages of the same users serve CUPED
        judgements: CSV or Parquet with a column `verdict` of good, same, bad (treatment seen against control)
        max_pages_per_user: leave out users with more pages than this (bots), counted in the report
        interleaved: report the interleaved pages of --experiment only, for an experiment without arms to compare
        plan: print the users and days that find `effect`, from this log's variance, and write no report
        effect: relative lift of page CTR that --plan is for; the default is the paper's
        power: chance of finding that lift
        memory_limit: DuckDB's; beyond it the log spills to disk
        threads: DuckDB's
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
    judgements: Path | None = None
    max_pages_per_user: int | None = None
    interleaved: bool = False
    plan: bool = False
    effect: float = 0.0047
    power: float = 0.8
    memory_limit: str = "4GB"
    threads: int = 2

    def __post_init__(self):
        if len(self.weights) != 2 or min(self.weights) <= 0:
            raise ValueError("weights: two positive numbers, control's and treatment's share")
        if not 0 < self.alpha < 1:
            raise ValueError("alpha lies between 0 and 1")


@dataclass
class Metric:
    """One row of the report: both arms, the lift with its intervals, or the reason why there is none."""

    name: str
    control: float | None = None
    treatment: float | None = None
    control_text: str = "n/a"
    treatment_text: str = "n/a"
    lift: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    adjusted_p: float | None = None
    always_low: float | None = None
    always_high: float | None = None
    cuped_variance: float | None = None
    reason: str = ""
    tone: str = ""


def value_text(name: str, value: float) -> str:
    if name.startswith("latency"):
        return f"{value:.1f} ms"
    return f"{value:.1f} s" if name.startswith("dwell") else f"{value * 100:.2f}%"


def row(name: str, comparison: Comparison, cuped_variance: float | None = None) -> Metric:
    metric = Metric(name, comparison.control, comparison.treatment)
    metric.control_text, metric.treatment_text = (
        value_text(name, v) for v in (comparison.control, comparison.treatment)
    )
    metric.p = metric.adjusted_p = comparison.p
    metric.cuped_variance = cuped_variance
    if math.isnan(comparison.lift):
        metric.reason = f"no lift: {name} of the control is zero"
        return metric
    metric.lift, metric.low, metric.high = comparison.lift, comparison.low, comparison.high
    metric.always_low, metric.always_high = comparison.always_low, comparison.always_high
    return metric


def ratio_row(ab: AbLog, name: str, config: Config) -> Metric:
    totals = ab.totals(name)
    try:
        covariates: Sequence[np.ndarray | None] = totals.covariate if totals.covariate is not None else (None, None)
        arms = [UserTotals(n, d, x) for n, d, x in zip(totals.numerator, totals.denominator, covariates)]
    except ValueError as problem:
        return Metric(name, reason=str(problem))
    left: float | None = None
    if totals.covariate is not None:
        control, treatment, left = cuped(arms[0], arms[1])
    else:
        control, treatment = map(estimate, arms)
    return row(name, compare(control, treatment, config.alpha, config.planned_users), left)


def metrics(ab: AbLog, config: Config) -> tuple[list[Metric], list[tuple[str, np.ndarray]]]:
    """Every row of the table, and the latencies per arm for the picture (empty where none were logged)."""
    rows = [ratio_row(ab, name, config) for name in tqdm(RATIO_METRICS, desc="metrics", unit="metric")]
    deciding = [r for r in rows if r.name in DECIDING and r.p is not None]
    for metric, p in zip(deciding, holm([r.p for r in deciding if r.p is not None])):
        metric.adjusted_p = p
    if not ab.has_latency:
        return coloured([r for r in rows if r.name != "fallback share"], config.alpha), []
    latencies = ab.latencies()
    for name, level in LATENCIES.items():
        try:
            arms: list[Estimate] = [quantile(values, users, level) for values, users in latencies]
            rows.append(row(name, compare(arms[0], arms[1], config.alpha, config.planned_users)))
        except (ValueError, IndexError) as problem:
            rows.append(Metric(name, reason=f"no latency in one arm: {problem}"))
    return rows, [
        (arm, values) for arm, (values, _) in zip((config.control, config.treatment), latencies) if len(values)
    ]


def coloured(rows: list[Metric], alpha: float) -> list[Metric]:
    """Mark lifts that the adjusted p calls real as up (better for users) or down (worse)."""
    for metric in rows:
        if metric.lift is not None and metric.adjusted_p is not None and metric.adjusted_p < alpha:
            metric.tone = "up" if (metric.lift > 0) == HIGHER_IS_BETTER[metric.name] else "down"
    return rows


def checks(ab: AbLog, config: Config) -> tuple[list[dict[str, Any]], float]:
    """What must hold before any lift is believed, and the sample-ratio p."""
    srm = sample_ratio_p(list(ab.users), config.weights)
    leaked = ab.users_in_both_arms / sum(ab.users)
    planned = " : ".join(f"{w:g}" for w in config.weights)
    found = [
        (srm >= SRM_ALARM, f"Sample ratio: {ab.users[0]:,} : {ab.users[1]:,} users for a planned {planned}, p = {srm:.4g}"),
        (leaked <= LEAK_ALARM, f"Users seen in both arms: {ab.users_in_both_arms:,} ({leaked:.2%})"),
        (
            ab.heaviest_user_share <= max(HEAVY_ALARM, 10 / sum(ab.users)),
            f"Pages of the busiest user: {ab.heaviest_user_share:.2%} of all"
            + (f"; {ab.dropped_heavy_users:,} users with more than {config.max_pages_per_user} pages left out "
               f"({ab.dropped_heavy_pages:,} pages)" if config.max_pages_per_user else ""),
        ),
    ]  # fmt: skip
    return [{"passed": bool(passed), "text": text} for passed, text in found], srm


def cumulative_lift(ab: AbLog, config: Config) -> dict[str, list]:
    """Page CTR's lift over all users up to the end of each time slice, with the confidence sequence."""
    size = sum(ab.users)
    n, d = np.zeros(size), np.zeros(size)
    is_treatment = np.zeros(size, dtype=bool)
    points: dict[str, list] = {"time": [], "lift": [], "low": [], "high": []}
    for bucket, treatment, user, numerator, denominator in ab.by_bucket("page CTR"):
        n[user] += numerator
        d[user] += denominator
        is_treatment[user] = treatment
        seen = d > 0
        try:
            arms = [estimate(UserTotals(n[seen & side], d[seen & side])) for side in (~is_treatment, is_treatment)]
        except ValueError:  # an arm without two users yet: the line starts later
            continue
        comparison = compare(arms[0], arms[1], config.alpha, config.planned_users)
        if not math.isnan(comparison.lift):
            points["time"].append(ab.buckets[bucket])
            points["lift"].append(comparison.lift)
            points["low"].append(comparison.always_low)
            points["high"].append(comparison.always_high)
    return points


def segment_lifts(ab: AbLog, config: Config) -> list[dict[str, Any]]:
    """Page CTR's lift within each segment that has clicks in both arms."""
    found = []
    for family, members in ab.segments().items():
        for label, where in members:
            totals = ab.totals("page CTR", where)
            try:
                arms = [estimate(UserTotals(n, d)) for n, d in zip(totals.numerator, totals.denominator)]
            except ValueError as problem:
                log.info("segment %s left out: %s", label, problem)
                continue
            comparison = compare(arms[0], arms[1], config.alpha, config.planned_users)
            if not math.isnan(comparison.lift):
                found.append(
                    {
                        "family": family,
                        "name": label,
                        "lift": comparison.lift,
                        "low": comparison.low,
                        "high": comparison.high,
                    }
                )
    return found


def verdict(rows: list[Metric], trustworthy: bool, config: Config) -> str:
    """Plain words, with what they rest on: the adjusted p of the deciding metrics at the planned end."""
    if not trustworthy:
        return (
            "No verdict: a check above failed, so the arms are not comparable and no lift below may be believed. "
            "Find the cause, then run the experiment again."
        )
    deciding = [m for m in rows if m.name in DECIDING and m.lift is not None and m.adjusted_p is not None]
    if not deciding:
        return "No verdict: there are no clicks to compare."
    better = [m for m in deciding if m.lift > 0 and m.adjusted_p < config.alpha]  # type: ignore[operator]
    worse = [m for m in deciding if m.lift < 0 and m.adjusted_p < config.alpha]  # type: ignore[operator]

    def listed(found: list[Metric]) -> str:
        return ", ".join(
            f"{m.name} {ab_charts.percent(m.lift or 0)} (adjusted p {ab_charts.p_text(m.adjusted_p or 0, True)})"
            for m in found
        )

    if better and worse:
        return f"Mixed: {config.treatment} is better on {listed(better)}, worse on {listed(worse)}. Weigh them before a launch."
    if better:
        early = [m.name for m in better if m.always_low is not None and m.always_low > 0]
        note = (
            " This holds at any time of looking."
            if len(early) == len(better)
            else " It holds if this is the planned end of the experiment; the always-valid interval does not exclude zero yet."
        )
        return f"{config.treatment} wins: {listed(better)}.{note}"
    if worse:
        return f"{config.treatment} loses: {listed(worse)}. Keep {config.control}."
    widest = max(deciding, key=lambda m: (m.high or 0) - (m.low or 0))
    return (
        f"No difference found. Lifts between {ab_charts.percent(deciding[0].low or 0)} and "
        f"{ab_charts.percent(deciding[0].high or 0)} of {deciding[0].name} remain possible"
        + (f" (least certain: {widest.name})." if widest is not deciding[0] else ".")
        + " `--plan` says how long to run for a smaller effect."
    )


def read_judgements(path: Path) -> GoodSameBad:
    """Counts of good, same, bad from a CSV or Parquet file. DataError names the first row with another verdict."""
    try:
        if path.suffix == ".parquet":
            verdicts = pq.read_table(path, columns=["verdict"]).column("verdict").to_pylist()
        else:
            with path.open(encoding="utf-8", newline="") as stream:
                verdicts = [r["verdict"] for r in csv.DictReader(stream)]
    except (OSError, KeyError, ValueError) as problem:
        raise DataError(path, f"no readable column `verdict`: {problem}") from problem
    for number, given in enumerate(verdicts, 1):
        if given not in ("good", "same", "bad"):
            raise DataError(path, f"verdict {given!r} is not good, same or bad", number)
    if not verdicts:
        raise DataError(path, "no judgement")
    return GoodSameBad(*(verdicts.count(name) for name in ("good", "same", "bad")))


def charts(rows, cumulative: dict[str, list], segments, latencies) -> dict[str, str]:
    lifts = [(m.name, m.lift, m.low, m.high) for m in rows if m.lift is not None]
    drawn = {
        "lifts": ab_charts.forest(lifts, "lift of every metric") if lifts else "",
        "cumulative": "",
        "segments": "",
        "latency": "",
    }
    if len(cumulative["time"]) > 1:
        lift, low, high = (np.array(cumulative[name]) for name in ("lift", "low", "high"))
        drawn["cumulative"] = ab_charts.cumulative(cumulative["time"], lift, low, high, "page CTR lift so far")
    if segments:
        drawn["segments"] = ab_charts.forest(
            [(s["name"], s["lift"], s["low"], s["high"]) for s in segments], "lift by segment"
        )
    if len(latencies) == 2:
        drawn["latency"] = ab_charts.ecdf(latencies, "latency per arm")
    return drawn


def build(ab: AbLog, config: Config) -> tuple[dict[str, Any], dict[str, str]]:
    """The report's figures as a JSON-able dict, and its pictures."""
    rows, latencies = metrics(ab, config)
    found, srm = checks(ab, config)
    trustworthy = all(check["passed"] for check in found)
    wins = ab.interleaved
    preferred = None
    if wins is not None:
        try:
            preferred = asdict(preference(*wins))
        except ValueError as problem:
            log.warning("interleaved pages are left out: %s", problem)
    judged = read_judgements(config.judgements) if config.judgements else None
    cumulative, segments = cumulative_lift(ab, config), segment_lifts(ab, config)
    figures: dict[str, Any] = {
        "experiment": ab.experiment,
        "control": config.control,
        "treatment": config.treatment,
        "first": ab.first,
        "last": ab.last,
        "pages": ab.pages,
        "users": dict(zip((config.control, config.treatment), ab.users)),
        "srm_p": srm,
        "trustworthy": trustworthy,
        "checks": found,
        "verdict": verdict(rows, trustworthy, config),
        "confidence": f"{1 - config.alpha:.0%}",
        "dwell_cap": ab.dwell_cap,
        "metrics": [asdict(m) for m in rows],
        "segments": segments,
        "cumulative": cumulative,
        "interleaving": preferred,
        "judged": {**asdict(judged), "advantage": judged.advantage, "p": judged.p} if judged else None,
        "basis": {
            "log": str(config.events),
            "arms": f"{config.control} (control) and {config.treatment}, by assignment: pages that fell back stay in their arm",
            "model versions": ", ".join(f"{v} ({n:,} pages)" for v, n in ab.model_versions.items()) or "not logged",
            "left out": f"{ab.forced_pages:,} forced pages, {ab.outside_pages:,} pages outside the two arms",
            "variance": "delta method over users"
            + (", reduced by CUPED with each user's pages before the start" if ab.has_pre_period else ""),
            "error rate": f"{config.alpha:g}, Holm over {', '.join(DECIDING)}; "
            f"always-valid interval tuned for {config.planned_users:,} users",
            "software": f"Python {platform.python_version()}, NumPy {np.__version__}",
        },
    }  # fmt: skip
    return figures, charts(rows, cumulative, segments, latencies)


def write(figures: dict[str, Any], pictures: dict[str, str], out: Path) -> Path:
    """Write the HTML page and the JSON beside it, each aside and renamed. Returns the JSON's path."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "ab" / "report"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("page.html.jinja").render(
        r={**figures, "charts": pictures}, pct=ab_charts.percent, p_text=ab_charts.p_text
    )
    beside = out.with_suffix(".json")
    write_text(out, page)
    write_json(beside, figures)
    return beside


def found_text(metric: dict[str, Any]) -> str:
    """One line for the terminal: the lift with its interval and p, or why there is none."""
    if metric["lift"] is None:
        return metric["reason"]
    lift, low, high = (ab_charts.percent(metric[k]) for k in ("lift", "low", "high"))
    return f"{lift} [{low}, {high}], p {ab_charts.p_text(metric['p'], True)}"


def plan(ab: AbLog, config: Config) -> str:
    """Users and days that find config.effect on page CTR, from the control's variance and the log's users per day."""
    totals = ab.totals("page CTR")
    baseline = estimate(UserTotals(totals.numerator[0], totals.denominator[0]))
    share = config.weights[1] / sum(config.weights)
    users = users_needed(baseline, config.effect, config.alpha, config.power, share)
    first, last = (datetime.fromisoformat(moment).timestamp() for moment in (ab.first, ab.last))
    days = max((last - first) / 86_400, 1 / 24)
    per_day = sum(ab.users) / days
    reach = stats.norm.isf(config.alpha / 2) + stats.norm.ppf(config.power)
    variance = baseline.variance * baseline.users * (1 / share + 1 / (1 - share))
    findable = reach * math.sqrt(variance / sum(ab.users)) / baseline.value
    return (
        f"page CTR of {config.control}: {baseline.value:.2%} over {baseline.users:,} users\n"
        f"a lift of {ab_charts.percent(config.effect)} with power {config.power:.0%} at alpha {config.alpha:g}: "
        f"{users:,} users in both arms\n"
        f"at {per_day:,.0f} new users a day, as in this log: {math.ceil(users / per_day):,} days\n"
        f"the {sum(ab.users):,} users of this log find lifts from {ab_charts.percent(findable)}"
    )


def interleaving_report(config: Config) -> None:
    """Print and write what interleaved pages alone say."""
    wins = read_interleaved(config.events, config.control, config.treatment, config.experiment)
    try:
        found = preference(*wins)
    except ValueError as problem:
        raise InputError(f"{config.events}: too few interleaved pages with a winner: {problem}") from problem
    beside = config.out.with_suffix(".json")
    write_json(beside, {"experiment": config.experiment, "interleaving": asdict(found)})
    print(
        f"{config.treatment} won {found.share:.1%} of {found.pages:,} decided pages of {found.users:,} users, "
        f"p {ab_charts.p_text(found.p, True)}\n{beside}"
    )


def main(config: Config) -> None:
    if config.interleaved:
        interleaving_report(config)
        return
    ab = open_log(
        config.events,
        control=config.control,
        treatment=config.treatment,
        experiment=config.experiment,
        start=config.start,
        max_pages_per_user=config.max_pages_per_user,
        memory_limit=config.memory_limit,
        threads=config.threads,
    )
    if config.plan:
        try:
            print(plan(ab, config))
        except ValueError as problem:
            raise InputError(f"{config.events}: nothing can be planned from it: {problem}") from problem
        return
    figures, pictures = build(ab, config)
    beside = write(figures, pictures, config.out)
    for check in figures["checks"]:
        print(("ok   " if check["passed"] else "FAIL ") + check["text"])
    for m in figures["metrics"]:
        print(f"{m['name']:16} {m['control_text']:>10} {m['treatment_text']:>10}  {found_text(m)}")
    print(figures["verdict"])
    print(f"{config.out} and {beside}")


if __name__ == "__main__":
    run(main, Config, example="python clients/ab_report.py --events runs/ab/data --out runs/ab/report.html")
