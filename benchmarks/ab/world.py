"""Does the whole A/B stack find the student better, by the right amount? Simulated users on a demo's models, a report.

    make demo && python -m benchmarks.ab.world --users 20000

tritonserver with both arms, the router, simulate_traffic, ab_compact, ab_report, as a team would run them; and beside
the measured lift the true one: the page CTR that each arm's ranking earns by many draws of the click model per query.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb

from clients.ab.router.local_router import start_router
from demo.run import experiment_text, only_arms
from demo.stages import ROOT
from ranking.errors import InputError
from ranking.files import replacing
from ranking.program import run
from serving.temporary_server import start_triton


@dataclass
class Config:
    """Compare the lift that the A/B report finds with the one that the simulation has.

    Args:
        demo: folder of a finished `make demo` on the built-in world
        out: folder for the log, its Parquet files and the report; one that holds a report is not measured again
        users: simulated users; four times as many halve the interval
        concurrency: pages in flight
        seed: of users, queries and clicks
        page: Markdown file for the results; empty for none
        note: a line on the machine and the date for the page
    """

    demo: Path = Path("runs/demo")
    out: Path = Path("runs/ab_world")
    users: int = 20_000
    concurrency: int = 8
    seed: int = 1
    page: str = "docs/results/ab_world.md"
    note: str = ""


def main(config: Config) -> None:
    """Run the experiment unless its report lies in --out already, and write the page."""
    data, repository = config.demo / "data", config.demo / "model_repository"
    if not (repository / "student").is_dir() or not (data / "judgments" / "test.parquet").is_file():
        raise InputError(f"{config.demo}: no finished demo with {data} and {repository}: run `make demo`")
    report, truth = config.out / "report.json", config.out / "truth.json"
    if not report.is_file():
        if config.out.exists() and any(config.out.iterdir()):
            raise InputError(f"{config.out}: a run that was cut off; its users would count too: remove it")
        measure(config, data, repository, truth)
    page = results_page(
        json.loads(report.read_text()),
        json.loads(truth.read_text())["page_ctr"],
        json.loads((config.demo / "summary.json").read_text())["quality"],
        click_figures(config.out / "data", data / "judgments" / "test.parquet"),
        config.note,
    )
    print(page)
    if config.page:
        with replacing(config.page) as aside:
            aside.write_text(page, encoding="utf-8")


def measure(config: Config, data: Path, repository: Path, truth: Path) -> None:
    """Traffic, compaction and report, as a team would run them. The report is written last."""
    config.out.mkdir(parents=True, exist_ok=True)
    experiment = config.out / "experiment.yaml"
    experiment.write_text(experiment_text())
    with (
        start_triton(repository, *only_arms("baseline", "student")) as server,
        # a deadline that no page misses, however busy the machine: the comparison is of rankings, not of fallbacks
        start_router(
            experiment, server.grpc, config.out / "log", "--deadline-ms", "4000", "--allow-forced-arm"
        ) as router,
    ):
        run_command(
            "clients/simulate_traffic.py", "--data", data, "--router", router.url, "--users", str(config.users),
            "--concurrency", str(config.concurrency), "--seed", str(config.seed), "--truth-out", truth,
        )  # fmt: skip
    run_command("clients/ab_compact.py", "--log", config.out / "log", "--out", config.out / "data")
    run_command(
        "clients/ab_report.py", "--events", config.out / "data", "--out", config.out / "report.html",
        "--planned-users", str(config.users),
    )  # fmt: skip


def run_command(*command: str | Path) -> None:
    """Run `python COMMAND...` from the repository's root, its output on this terminal."""
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def click_figures(events: Path, judgments: Path) -> dict[str, list[float]]:
    """Figure -> [baseline, student], per page: what the arms' users clicked, which the report does not break down."""
    grades = ", ".join(f"count(*) filter (clicked and grade = {grade}) / pages as grade_{grade}" for grade in range(5))
    query = f"""
        with judged as (select query, doc_id, any_value(grade) as grade from read_parquet($judgments) group by all),
        rows as (
            select e.arm, e.request_id, e.clicked, e.position, e.dwell_seconds, judged.grade,
                count(distinct e.request_id) over (partition by e.arm) as pages
            from read_parquet($events, union_by_name = true) e left join judged using (query, doc_id)
            where e.arm in ('baseline', 'student') and not starts_with(e.user_id, 'truth-')
        )
        select arm, count(*) filter (clicked) / pages as clicks, {grades},
            sum(dwell_seconds) filter (clicked) / pages as dwell
        from rows group by arm, pages order by arm
    """
    with duckdb.connect() as connection:
        values = {"events": f"{events}/**/*.parquet", "judgments": str(judgments)}
        found = connection.execute(query, values).fetchnumpy()
    return {name: column.tolist() for name, column in found.items() if name != "arm"}


def results_page(
    report: dict[str, Any],
    truth: dict[str, float],
    quality: dict[str, Any],
    clicks: dict[str, list[float]],
    note: str,
) -> str:
    """The page in Markdown. report: ab_report's JSON; truth: page CTR by arm; quality: of summary.json, by ranker."""
    (ctr,) = [metric for metric in report["metrics"] if metric["name"] == "page CTR"]
    true_lift = truth["student"] / truth["baseline"] - 1
    covered = "covers" if ctr["low"] <= true_lift <= ctr["high"] else "does not cover"
    found = "better" if ctr["low"] > 0 else "worse" if ctr["high"] < 0 else "neither better nor worse"
    lift = (
        f"{ctr['lift']:+.2%} [{ctr['low']:+.2%}, {ctr['high']:+.2%}], p {ctr['p']:.4f} (Holm {ctr['adjusted_p']:.4f})"
    )
    users = sum(report["users"].values())
    span = datetime.fromisoformat(report["last"]) - datetime.fromisoformat(report["first"])
    ndcg = ", ".join(f"{arm} {quality[arm]['ndcg@5']:.3f}" for arm in ("baseline", "student"))
    return f"""# An A/B test on the world through the whole stack

The two arms of `make demo` behind tritonserver and the router, {users:,} simulated users with {report["pages"]:,} pages
over HTTP, then `ab_compact` and `ab_report`. The true lift is of the page CTR that each ranking earns by 400 draws of
the click model per query, over the same query frequencies. NDCG@5 of the arms on these queries: {ndcg}.

| page CTR | baseline | student | lift |
|---|--:|--:|--:|
| measured | {ctr["control"]:.2%} | {ctr["treatment"]:.2%} | {lift} |
| true | {truth["baseline"]:.2%} | {truth["student"]:.2%} | {true_lift:+.2%} |

**On page CTR the student is {found}**, and the 95% interval {covered} the true lift. Sample ratio p
{report["srm_p"]:.2f}; always-valid interval [{ctr["always_low"]:+.2%}, {ctr["always_high"]:+.2%}].

| other metrics | baseline | student | lift |
|---|--:|--:|--:|
{other_rows(report)}

Verdict of the report: {report["verdict"]}

What users clicked, per page:

| | baseline | student |
|---|--:|--:|
{click_rows(clicks)}

Command: `python -m benchmarks.ab.world --users {users}`; {span.total_seconds() / 60:.1f} minutes of traffic,
{report["pages"] / max(span.total_seconds(), 1e-9):.0f} pages/s. {note}
"""


def other_rows(report: dict[str, Any]) -> str:
    """Table rows of every metric but page CTR."""

    def lift(metric: dict[str, Any]) -> str:
        return metric["reason"] if metric["lift"] is None else "{lift:+.2%} [{low:+.2%}, {high:+.2%}]".format(**metric)

    return "\n".join(
        f"| {metric['name']} | {metric['control_text']} | {metric['treatment_text']} | {lift(metric)} |"
        for metric in report["metrics"]
        if metric["name"] != "page CTR"
    )


def click_rows(clicks: dict[str, list[float]]) -> str:
    """Table rows of click_figures()."""

    names = {"clicks": "clicks", "dwell": "seconds after clicks"}
    return "\n".join(
        f"| {names.get(name, f'clicks on documents of grade {name[-1]}')} | {baseline:.3f} | {student:.3f} |"
        for name, (baseline, student) in clicks.items()
    )


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.ab.world --users 20000")
