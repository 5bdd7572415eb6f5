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
    if held_out := _held_out_table(rows, out, beats):
        table += f"\n\n{held_out}"
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
    by_name = {name: sorted((r for r in rows if r["row"] == name), key=folder_of) for name in beats}
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
    reference = {folder_of(row): row["test_ndcg@5"] for row in teacher}
    shares = [row["test_ndcg@5"] / reference[folder_of(row)] for row in found if folder_of(row) in reference]
    return f"{np.mean(shares):.1%}" if shares else ""


def folder_of(row: dict[str, Any]) -> str:
    """The folder of a finished row's seed, or of its world and seed."""
    return f"world-{row['world']}-seed-{row['seed']}" if "world" in row else f"seed-{row['seed']}"


def _stored(out: Path, row: dict, split: str, held_out: bool = False) -> tuple[NDArray, NDArray, NDArray]:
    """Scores, grades and groups; held_out: of the queries with a held-out intent alone."""
    stored = np.load(out / folder_of(row) / "scores" / f"{row['row']}-{split}.npz")
    chosen = stored["held_out"] if held_out else slice(None)
    return stored["scores"][chosen], stored["grades"][chosen], stored["groups"][chosen]


def _held_out_table(rows: list[dict[str, Any]], out: Path, beats: dict[str, str | None]) -> str:
    """The main figure again on test queries whose intent occurs in neither log nor labels; "" if none are known."""

    def known(row: dict[str, Any]) -> bool:
        return "held_out" in np.load(out / folder_of(row) / "scores" / f"{row['row']}-test.npz")

    lines = ["| held-out intents | seeds | queries | NDCG@5 | PNR | must beat | difference in NDCG@5 | p |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, rival in beats.items():
        found, rivals = ([row for row in rows if row["row"] == one and known(row)] for one in (name, rival))
        if not found:
            continue
        judged = [JudgedRanking(*_stored(out, row, "test", held_out=True)) for row in found]
        ndcg, pnr = [float(one.ndcg(5).mean()) for one in judged], [one.pairs().pnr for one in judged]
        queries = sum(len(one.ndcg(5)) for one in judged)
        cells = [name, str(len(found)), str(queries), _spread(ndcg, 4), _spread(pnr, 2)]
        lines.append("| " + " | ".join([*cells, *_against(out, found, rivals, held_out=True)]) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _calibration_error(out: Path, row: dict) -> float:
    """ECE on test after Platt scaling on dev: what a threshold over all queries can count on."""
    scores, grades, _ = _stored(out, row, "dev")
    try:
        curve = fit("platt", scores, grades > 0)
    except InputError:
        return float("nan")  # scores that do not rank have no curve; the table shows it as nan
    scores, grades, _ = _stored(out, row, "test")
    return ece(probability(scores, curve), grades > 0)


def _against(out: Path, found: list[dict], rivals: list[dict], held_out: bool = False) -> list[str]:
    """Rival, difference with its interval and p, over the queries of all seeds that both rows have.

    Where seeds share one dataset their queries are the same: each counts once, with its mean over those seeds.
    """
    shared = {folder_of(row) for row in found} & {folder_of(row) for row in rivals}
    if not shared:
        return ["", "", ""]
    ours, theirs = (_by_query(out, [r for r in some if folder_of(r) in shared], held_out) for some in (found, rivals))
    gap, p = paired_bootstrap(ours, theirs), randomisation_test(ours, theirs)
    return [rivals[0]["row"], f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})", f"{p:.4f}"]


def _by_query(out: Path, rows: list[dict], held_out: bool) -> NDArray[np.float64]:
    """NDCG@5 of each query of each dataset, the mean over the seeds that share the dataset."""
    of_dataset: dict[bytes, list[NDArray[np.float64]]] = {}
    for row in sorted(rows, key=folder_of):
        scores, grades, groups = _stored(out, row, "test", held_out)
        of_dataset.setdefault(grades.tobytes() + groups.tobytes(), []).append(
            JudgedRanking(scores, grades, groups).ndcg(5)
        )
    return np.concatenate([np.mean(of_seeds, axis=0) for of_seeds in of_dataset.values()])


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
