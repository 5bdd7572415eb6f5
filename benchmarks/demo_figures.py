"""The figures of a finished demo run as tables for docs/results/demo.md.

python -m benchmarks.demo_figures --run runs/demo
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranking.errors import InputError
from ranking.program import run
from ranking.significance import p_text

SYSTEMS = {"bm25": "BM25", "baseline": "baseline", "teacher": "teacher", "student": "student"}
AB_METRICS = {"page_ctr": "page CTR", "user_ctr": "user CTR", "dwell": "dwell per click"}


@dataclass
class Config:
    """Print the figures of a demo run.

    Args:
        run: folder of a finished demo run
    """

    run: Path


def main(config: Config) -> None:
    """Print two tables: quality of the systems, and all else. InputError without a finished run."""
    path = config.run / "summary.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; `make demo OUT={config.run}` makes it")
    print("\n".join(tables(json.loads(path.read_text(encoding="utf-8")))))


def tables(summary: dict[str, Any]) -> list[str]:
    """The lines of both tables, from summary.json."""
    quality = summary["quality"]
    queries = f", {summary['student against baseline']['queries']} test queries" if published(summary) else ""
    lines = [
        f"| | {' | '.join(SYSTEMS.values())} |",
        "|---|" + "--:|" * len(SYSTEMS),
        f"| NDCG@5{queries} | " + " | ".join(f"{quality[name]['ndcg@5']:.3f}" for name in SYSTEMS) + " |",
        "| PNR | " + " | ".join(f"{quality[name]['pnr']:.2f}" for name in SYSTEMS) + " |",
        "",
        "| what | figure |",
        "|---|---|",
    ]
    return lines + [f"| {name} | {figure} |" for name, figure in others(summary).items()]


def published(summary: dict[str, Any]) -> bool:
    """Whether the run went on to its A/B test; one that found nothing to ship did not."""
    return "do_not_ship" not in summary


def others(summary: dict[str, Any]) -> dict[str, str]:
    """Name -> figure of all that is not the quality of a system."""
    labels = summary["labelling"]
    rate = f" at {labels['pairs_per_second']:.0f} a second" if labels["pairs_per_second"] else ""
    found = {
        "labels": f"{labels['pairs']:,}{rate}; {labels['lost']} lost, {labels['duplicated']} duplicated, "
        f"{labels['rejected']} rejected"
    }
    stages = {name: stage["seconds"] for name, stage in summary["stages"].items()}
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stages.items())
    minutes = {"stages": f"{sum(stages.values()) / 60:.1f} minutes in sum: {times}"}
    if not published(summary):
        return {"do not ship": summary["do_not_ship"], **found, **minutes}
    lead, prior = summary["student against baseline"], summary["quality"]["student + bm25"]
    found = {
        "student over baseline, NDCG@5": f"{lead['lead']:+.3f} [{lead['low']:+.3f}, {lead['high']:+.3f}], "
        f"p {p_text(lead['p'])}",
        "student with BM25 as prior, NDCG@5": f"{prior['ndcg@5']:.3f}",
        **found,
    }
    for arm, row in summary["serving"].items():
        p50, p99 = ("failed" if row[key] is None else f"{row[key]:.1f} ms" for key in ("p50_ms", "p99_ms"))
        found[f"24 documents from the {arm}"] = f"p50 {p50}, p99 {p99}, {row['errors']} errors"
    for key, name in AB_METRICS.items():
        row = summary["ab"][key]
        found[f"A/B, {name}"] = (
            "no lift"
            if row["lift"] is None
            else f"{row['lift']:+.1%} [{row['low']:+.1%}, {row['high']:+.1%}], p {p_text(row['p'])}"
        )
    return {**found, "A/B, sample ratio": f"p {summary['ab']['srm_p']:.2f}", **minutes}


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.demo_figures --run runs/demo")
