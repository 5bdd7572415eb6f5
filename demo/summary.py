"""The end of a demo run: a table for the terminal and summary.json, both from the files that the stages wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from demo.stages import Stages
from ranking.files import write_json
from ranking.labels import LabelSet
from ranking.metrics import JudgedRanking
from ranking.significance import p_text, paired_bootstrap, randomisation_test

SYSTEMS = ("bm25", "baseline", "teacher", "student", "baseline + bm25", "student + bm25")
AB_METRICS = {"page_ctr": "page CTR", "user_ctr": "user CTR", "dwell": "dwell per click"}


def quality(out: Path) -> dict[str, dict[str, float]]:
    """System -> NDCG@5 and PNR on the test queries."""
    systems = json.loads((out / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["systems"]
    return {name: {metric: systems[name]["metrics"][metric] for metric in ("ndcg@5", "pnr")} for name in SYSTEMS}


def labelling(out: Path) -> dict[str, Any]:
    """Pairs labelled, lost and duplicated, counted from the shards and not taken from the labeller's own report."""
    labels = LabelSet.load(out / "labels")
    keys: list[tuple[str, str]] = []
    for shard in labels.shards:
        table = pq.read_table(labels.folder / shard.file, columns=["query_id", "doc_id"])
        keys += zip(table.column("query_id").to_pylist(), table.column("doc_id").to_pylist())
    wanted = pq.read_metadata(out / "data" / "candidates.parquet").num_rows
    distinct = len(set(keys))
    return {
        "pairs": len(keys),
        "pairs_per_second": rate(labels.manifest["runs"]),
        "rejected": labels.rejects,
        "lost": wanted - labels.rejects - distinct,
        "duplicated": len(keys) - distinct,
    }


def rate(runs: list[dict[str, Any]]) -> float:
    """Pairs a second over all runs of the labeller, interrupted ones included."""
    seconds = sum(run["seconds"] for run in runs)
    return round(sum(run["pairs"] for run in runs) / seconds, 1) if seconds else 0.0


def ab(out: Path) -> dict[str, Any]:
    """Lift with interval and p per metric, the sample ratio's p, and the verdict, from report.json."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    metrics = {metric["name"]: metric for metric in report["metrics"]}
    found: dict[str, Any] = {
        key: {part: metrics[name][part] for part in ("lift", "low", "high", "p")} for key, name in AB_METRICS.items()
    }
    return {**found, "srm_p": report["srm_p"], "verdict": report["verdict"]}


def summarise(out: Path, stages: Stages, experiment: str) -> dict[str, Any]:
    """Write OUT/summary.json; returns it with `text`, the table for the terminal."""
    summary = {
        "quality": quality(out),
        "student against baseline": student_lead(out),
        "labelling": labelling(out),
        "serving": stages.known["load"]["found"],
        "ab": {"experiment": experiment, **ab(out)},
        "stages": {name: {"seconds": stage["seconds"]} for name, stage in stages.known.items()},
    }
    write_json(out / "summary.json", summary)
    return {**summary, "text": text(summary, out)}


def summarise_refusal(out: Path, stages: Stages, reason: str) -> dict[str, Any]:
    """Write OUT/summary.json of a run that ended before anything was published; returns it with `text`."""
    summary = {
        "quality": quality(out),
        "labelling": labelling(out),
        "do_not_ship": reason,
        "stages": {name: {"seconds": stage["seconds"]} for name, stage in stages.known.items()},
    }
    write_json(out / "summary.json", summary)
    ending = f"do not ship: {reason}. Nothing was published, and no A/B test was run."
    return {**summary, "text": "\n".join([*quality_lines(summary), "", ending, f"Evaluation: {out / 'evaluation'}"])}


def student_lead(out: Path) -> dict[str, float]:
    """How far the student is above the baseline in NDCG@5: mean over the queries, interval, p, number of queries."""
    scores = pq.read_table(out / "evaluation" / "scores.parquet")
    groups = np.unique(scores.column("query_id").to_numpy(zero_copy_only=False), return_inverse=True)[1]
    grades = scores.column("grade").to_numpy()
    of_queries = {
        name: JudgedRanking(scores.column(name).to_numpy(), grades, groups).ndcg(5) for name in ("student", "baseline")
    }
    ours, theirs = of_queries["student"], of_queries["baseline"]
    lead = paired_bootstrap(ours, theirs)
    return {
        "lead": lead.value, "low": lead.low, "high": lead.high, "p": randomisation_test(ours, theirs),
        "queries": len(ours),
    }  # fmt: skip


def quality_lines(summary: dict[str, Any]) -> list[str]:
    """The table of ranking quality."""
    lines = ["", f"{'system':15} {'PNR':>7} {'NDCG@5':>8}"]
    return lines + [f"{name:15} {row['pnr']:7.3f} {row['ndcg@5']:8.4f}" for name, row in summary["quality"].items()]


def text(summary: dict[str, Any], out: Path) -> str:
    """The summary as lines for the terminal."""
    labels, lead = summary["labelling"], summary["student against baseline"]
    # the blend writes its labels in one go, and knows no rate
    pace = f" at {labels['pairs_per_second']:.0f} a second" if labels["pairs_per_second"] else ""
    lines = [
        *quality_lines(summary),
        "",
        f"student against baseline: NDCG@5 {lead['lead']:+.3f} [{lead['low']:+.3f}, {lead['high']:+.3f}], "
        f"p {p_text(lead['p'])}, {lead['queries']} test queries",
        "",
        f"labels     {labels['pairs']:,} pairs{pace}, {labels['lost']} lost, "
        f"{labels['duplicated']} duplicated, {labels['rejected']} rejected",
    ]
    for arm, row in summary["serving"].items():
        lines.append(
            f"{arm:10} 24 documents: p50 {_ms(row['p50_ms'])}, p99 {_ms(row['p99_ms'])}, {row['errors']} errors"
        )
    for key, name in AB_METRICS.items():
        row = summary["ab"][key]
        lift = (
            "no lift"
            if row["lift"] is None
            else f"{row['lift']:+.1%} [{row['low']:+.1%}, {row['high']:+.1%}], p {p_text(row['p'])}"
        )
        lines.append(f"A/B        {name}: {lift}")
    total = sum(stage["seconds"] for stage in summary["stages"].values())
    lines += [
        f"A/B        sample ratio p {summary['ab']['srm_p']:.3f}. {summary['ab']['verdict']}",
        "",
        f"{total / 60:.1f} minutes, each stage counted, beside another one too. Report: {out / 'report.html'}",
        f"Models: {out / 'model_repository'}   Figures: {out / 'summary.json'}   Evaluation: {out / 'evaluation'}",
        "Next: `make serve` to search in a browser, `make stop` to end it; README.md says how to use your own data.",
    ]
    return "\n".join(lines)


def _ms(value: float | None) -> str:
    return "failed" if value is None else f"{value:.1f} ms"
