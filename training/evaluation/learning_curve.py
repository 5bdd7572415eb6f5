"""Quality against the number of judged train queries: what more judgments would buy, as a table and a plot.

Every checkpoint's card says how many judged queries it was trained on; checkpoints of one role are one line of the
curve. Systems without a card, such as BM25, are level lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ranking.card import CARD_NAME, ScoreCard
from ranking.errors import InputError
from training.evaluation.comparison import PNR, SystemResult
from training.evaluation.result_tables import markdown_table

METRICS = ("ndcg@5", PNR)
LABELS = {"ndcg@5": "NDCG@5", PNR: "PNR"}


@dataclass(frozen=True)
class CurvePoint:
    """A system's place on the curve. line: the card's role; judged_queries: that it was trained on."""

    system: str
    line: str
    judged_queries: int


def curve_points(checkpoints: Mapping[str, Path]) -> list[CurvePoint]:
    """The points of checkpoints (system name -> folder), by line and judged queries.

    InputError: fewer than two points, or a card that does not say how many judged queries it was trained on.
    """
    points = []
    for system, folder in checkpoints.items():
        if not (folder / CARD_NAME).is_file():
            continue
        card = ScoreCard.load(folder)
        if card.judged_queries is None:
            raise InputError(
                f"{folder}: its card does not say how many judged queries it was trained on; train it again"
            )
        points.append(CurvePoint(system, card.role, card.judged_queries))
    if len(points) < 2:
        raise InputError("--curve: two checkpoints at least are needed, trained with different --train-share")
    return sorted(points, key=lambda point: (point.line, point.judged_queries))


def curve_table(points: list[CurvePoint], results: Mapping[str, SystemResult]) -> str:
    """Markdown table: line, judged queries, NDCG@5 and PNR with 95% intervals over queries; level lines last."""
    rows = [["", "judged train queries", *(f"{LABELS[metric]} [95% CI]" for metric in METRICS)]]
    for point in points:
        rows.append([point.line, str(point.judged_queries), *_figures(results[point.system])])
    for system in _level_lines(points, results):
        rows.append([system, "", *_figures(results[system])])
    return markdown_table(rows)


def _figures(result: SystemResult) -> list[str]:
    found = []
    for metric, digits in (("ndcg@5", 4), (PNR, 2)):
        low, high = result.intervals[metric]
        found.append(f"{result.values[metric]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
    return found


def _level_lines(points: list[CurvePoint], results: Mapping[str, SystemResult]) -> list[str]:
    placed = {point.system for point in points}
    return [system for system in results if system not in placed]


def plot_curve(points: list[CurvePoint], results: Mapping[str, SystemResult], path: Path) -> None:
    """Write the plot, one panel per metric, intervals as bars. InputError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as problem:
        raise InputError('--curve plots with matplotlib: pip install "disranker[bench]"') from problem
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(METRICS), figsize=(11, 4), layout="constrained")
    for panel, metric in zip(panels, METRICS):
        for line in dict.fromkeys(point.line for point in points):
            of_line = [point for point in points if point.line == line]
            values = [results[point.system].values[metric] for point in of_line]
            intervals = [results[point.system].intervals[metric] for point in of_line]
            below = [value - low for value, (low, _) in zip(values, intervals)]
            above = [high - value for value, (_, high) in zip(values, intervals)]
            counts = [point.judged_queries for point in of_line]
            panel.errorbar(counts, values, yerr=[below, above], marker="o", capsize=3, label=line)
        for number, system in enumerate(_level_lines(points, results)):
            panel.axhline(
                results[system].values[metric], linestyle="--", color=f"{0.2 + 0.15 * (number % 4)}", label=system
            )
        panel.set(xlabel="judged train queries", ylabel=LABELS[metric])
        # queries double along the axis, and 0 has to have a place on it
        panel.set_xscale("symlog", linthresh=10)
        panel.grid(alpha=0.3)
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
