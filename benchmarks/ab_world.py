"""Does the whole A/B stack find the student better, by the right amount? Simulated users on a trained demo, then the report.

    make demo && python -m benchmarks.ab_world --users 20000

tritonserver with both arms, the router, simulate_traffic, ab_compact, ab_report, as a team would run them; and beside the
measured lift the true one: the page CTR that each arm's ranking earns by many draws of the click model per query.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.local_router import start_router
from demo.run import experiment_text, only_arms
from demo.stages import run_program
from ranking.errors import InputError
from ranking.program import run
from ranking.schema import replacing
from serving.local_server import start_triton


@dataclass
class Config:
    """Compare the lift that the A/B report finds with the one that the simulation has.

    Args:
        demo: folder of a finished `make demo` on the built-in world
        out: empty or new folder for the log, its Parquet files and the report
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
    data, repository = config.demo / "data", config.demo / "model_repository"
    if not (repository / "student").is_dir() or not (data / "judgments" / "test.parquet").is_file():
        raise InputError(f"{config.demo}: no finished demo with {data} and {repository}: run `make demo`")
    if config.out.exists() and any(config.out.iterdir()):
        raise InputError(f"{config.out} is not empty: the users of another run would count too; give another --out")
    config.out.mkdir(parents=True, exist_ok=True)
    experiment, truth = config.out / "experiment.yaml", config.out / "truth.json"
    experiment.write_text(experiment_text())
    began = time.perf_counter()
    with (
        start_triton(repository, *only_arms("baseline", "student")) as server,
        # a deadline that no page of a busy machine meets: the comparison is of rankings, not of fallbacks
        start_router(
            experiment, server.grpc, config.out / "log", "--deadline-ms", "4000", "--allow-forced-arm"
        ) as router,
    ):
        run_program(
            "clients/simulate_traffic.py", "--data", data, "--router", router.url, "--users", str(config.users),
            "--concurrency", str(config.concurrency), "--seed", str(config.seed), "--truth-out", truth,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    run_program("clients/ab_compact.py", "--log", config.out / "log", "--out", config.out / "data")
    run_program(
        "clients/ab_report.py", "--events", config.out / "data", "--out", config.out / "report.html",
        "--planned-users", str(config.users),
    )  # fmt: skip
    page = results_page(
        config,
        json.loads((config.out / "report.json").read_text()),
        json.loads(truth.read_text())["page_ctr"],
        json.loads((config.demo / "summary.json").read_text()),
        seconds,
    )
    print(page)
    if config.page:
        with replacing(config.page) as aside:
            aside.write_text(page, encoding="utf-8")


def results_page(
    config: Config, report: dict[str, Any], truth: dict[str, float], summary: dict[str, Any], seconds: float
) -> str:
    (ctr,) = [metric for metric in report["metrics"] if metric["name"] == "page CTR"]
    true_lift = truth["student"] / truth["baseline"] - 1
    covered = "covers" if ctr["low"] <= true_lift <= ctr["high"] else "does not cover"
    found = "better" if ctr["low"] > 0 else "worse" if ctr["high"] < 0 else "neither better nor worse"
    lift = (
        f"{ctr['lift']:+.2%} [{ctr['low']:+.2%}, {ctr['high']:+.2%}], p {ctr['p']:.4f} (Holm {ctr['adjusted_p']:.4f})"
    )
    return f"""# An A/B test on the world through the whole stack

The two arms of `make demo` behind tritonserver and the router, {config.users:,} simulated users with {report["pages"]:,} pages
over HTTP, then `ab_compact` and `ab_report`. The true lift is of the page CTR that each ranking earns by 400 draws of the
click model per query, over the same query frequencies.

| page CTR | baseline | student | lift |
|---|--:|--:|--:|
| measured | {ctr["control"]:.2%} | {ctr["treatment"]:.2%} | {lift} |
| true | {truth["baseline"]:.2%} | {truth["student"]:.2%} | {true_lift:+.2%} |

The report finds the student **{found}**; its 95% interval {covered} the true lift. Sample ratio p {report["srm_p"]:.2f}.
Always-valid interval [{ctr["always_low"]:+.2%}, {ctr["always_high"]:+.2%}].

| other metrics | baseline | student | lift |
|---|--:|--:|--:|
{other_rows(report)}

Verdict of the report: {report["verdict"]}

NDCG@5 of the arms on the same queries: {ndcg_line(summary)}.

Command: `python -m benchmarks.ab_world --users {config.users}`; {seconds / 60:.1f} minutes of traffic,
{report["pages"] / seconds:.0f} pages/s. {config.note}
"""


def other_rows(report: dict[str, Any]) -> str:
    return "\n".join(
        f"| {metric['name']} | {metric['control_text']} | {metric['treatment_text']} "
        f"| {metric['lift']:+.2%} [{metric['low']:+.2%}, {metric['high']:+.2%}] |"
        for metric in report["metrics"]
        if metric["name"] != "page CTR" and metric["lift"] is not None
    )


def ndcg_line(summary: dict[str, Any]) -> str:
    return ", ".join(f"{name} {row['ndcg@5']:.3f}" for name, row in summary["quality"].items())


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.ab_world --users 20000")
