"""The ablation's table and plots, from results.jsonl and the stored scores of every row and seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranking.calibration import ece, probability
from ranking.calibration_fit import fit
from ranking.errors import InputError
from ranking.files import replacing
from ranking.metrics import JudgedRanking
from ranking.significance import paired_bootstrap, randomisation_test


def write_report(rows: list[dict[str, Any]], out: Path, beats: dict[str, str | None], report: Path | None) -> str:
    """The Markdown table; with `report`, also ablation.md (what stands between its marks) and ablation.png there.

    rows: lines of results.jsonl; out: the ablation's folder; beats: row -> the row it must beat.
    """
    if not rows:
        raise InputError(f"{out}: no finished row to report")
    table = _table(rows, out, beats)
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        _write_between_marks(report / "ablation.md", table)
        _plot(rows, beats, report / "ablation.png")
    return table


def _table(rows: list[dict[str, Any]], out: Path, beats: dict[str, str | None]) -> str:
    lines = [
        "| row | seeds | NDCG@5 | PNR | NDCG@5 kept of teacher | ECE, Platt on dev | must beat | "
        "difference in NDCG@5 | p |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_name = {name: sorted((r for r in rows if r["row"] == name), key=lambda r: r["seed"]) for name in beats}
    for name, found in by_name.items():
        if not found:
            continue
        ndcg, pnr = ([row[f"test_{metric}"] for row in found] for metric in ("ndcg@5", "pnr"))
        kept = _ratio(found, by_name["teacher"])
        errors = [_calibration_error(out, row) for row in found]
        cells = [name, str(len(found)), _spread(ndcg, 4), _spread(pnr, 2), kept, _spread(errors, 4)]
        lines.append("| " + " | ".join([*cells, *_against(out, found, by_name.get(beats[name] or "", []))]) + " |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    """Mean and, of several seeds, their standard deviation."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def _ratio(found: list[dict], teacher: list[dict]) -> str:
    reference = {row["seed"]: row["test_ndcg@5"] for row in teacher}
    shares = [row["test_ndcg@5"] / reference[row["seed"]] for row in found if row["seed"] in reference]
    return f"{np.mean(shares):.1%}" if shares else ""


def _stored(out: Path, row: dict, split: str) -> tuple[NDArray, NDArray, NDArray]:
    stored = np.load(out / f"seed-{row['seed']}" / "scores" / f"{row['row']}-{split}.npz")
    return stored["scores"], stored["grades"], stored["groups"]


def _calibration_error(out: Path, row: dict) -> float:
    """ECE on test after Platt scaling on dev: what a threshold over all queries can count on."""
    scores, grades, _ = _stored(out, row, "dev")
    try:
        curve = fit("platt", scores, grades > 0)
    except InputError:
        return float("nan")  # scores that do not rank have no curve; the table shows it as nan
    scores, grades, _ = _stored(out, row, "test")
    return ece(probability(scores, curve), grades > 0)


def _against(out: Path, found: list[dict], rivals: list[dict]) -> list[str]:
    """Rival, difference with its interval and p, over the queries of all seeds that both rows have.

    Where the seeds share one dataset their queries are the same: each counts once, with its mean over the seeds.
    """
    shared = sorted({row["seed"] for row in found} & {row["seed"] for row in rivals})
    if not shared:
        return ["", "", ""]
    judged = [_stored(out, row, "test")[1:] for row in found if row["seed"] in shared]
    same_queries = all(all(map(np.array_equal, judged[0], other)) for other in judged)
    join = (lambda rows: np.mean(rows, axis=0)) if same_queries else np.concatenate
    ours, theirs = (join([_ndcg(out, row) for row in some if row["seed"] in shared]) for some in (found, rivals))
    gap, p = paired_bootstrap(ours, theirs), randomisation_test(ours, theirs)
    return [rivals[0]["row"], f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})", f"{p:.4f}"]


def _ndcg(out: Path, row: dict) -> NDArray[np.float64]:
    return JudgedRanking(*_stored(out, row, "test")).ndcg(5)


def _write_between_marks(path: Path, table: str) -> None:
    """Replace the table and keep what people wrote around it."""
    begin, end = "<!-- table: benchmarks/students/ablation.py -->", "<!-- end of table -->"
    text = (
        path.read_text(encoding="utf-8") if path.is_file() else f"# Ablation on the built-in world\n\n{begin}\n{end}\n"
    )
    if begin not in text or end not in text:
        raise InputError(f"{path}: has no {begin} ... {end} for the table to go between")
    head, tail = text.split(begin)[0], text.split(end)[1]
    with replacing(path) as aside:
        aside.write_text(f"{head}{begin}\n{table}\n{end}{tail}", encoding="utf-8")


def _plot(rows: list[dict[str, Any]], beats: dict[str, str | None], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in beats if any(row["row"] == name for row in rows)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.35 * len(names) + 1.2), sharey=True)
    for axis, metric, title in zip(axes, ("ndcg@5", "pnr"), ("NDCG@5", "PNR")):
        for place, name in enumerate(names):
            values = [row[f"test_{metric}"] for row in rows if row["row"] == name]
            colour = {"t": "tab:orange", "s": "tab:blue", "b": "tab:gray"}[name[0]]
            axis.barh(place, np.mean(values), color=colour, alpha=0.6)
            axis.plot(values, [place] * len(values), "k.", markersize=4)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel(f"{title} on test (bar: mean, dots: seeds)")
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.tight_layout()
    with replacing(path) as aside:
        figure.savefig(aside, dpi=110, format="png")
    plt.close(figure)
