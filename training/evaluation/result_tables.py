"""What a person reads of an evaluation: the table of systems, and the documents on which two systems differ most."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.evaluation.comparison import PNR, Judgments, SystemResult


def table(results: Mapping[str, SystemResult], queries: int, test_metric: str) -> str:
    """Markdown table, one row per system, aligned for a terminal; the paired test is on test_metric."""
    rows = [
        ["system", "PNR", "NDCG@1", "NDCG@5", "NDCG@10", "MRR", "ties", "queries",
         f"{label(test_metric)} 95% CI", "difference to the first [95% CI]", "p"]
    ]  # fmt: skip
    for name, result in results.items():
        values = result.values
        low, high = result.intervals[test_metric]
        row = [name, f"{values[PNR]:.3f}", *(f"{values[f'ndcg@{k}']:.4f}" for k in (1, 5, 10)), f"{values['mrr']:.4f}"]
        row += [f"{values['ties']:.2%}", str(queries), f"{low:.4f} to {high:.4f}"]
        against = result.against_first.get(test_metric)
        if against:
            gap = f"{against['difference']:+.4f} [{against['low']:+.4f}, {against['high']:+.4f}]"
            row += [gap, f"{against['p']:.4f}"]
        else:
            row += ["", ""]
        rows.append(row)
    return markdown_table(rows)


def teacher_table(results: Mapping[str, SystemResult], teacher: str) -> str:
    """Retention (system / teacher) per metric and Kendall's tau with the teacher."""
    rows = [["against " + teacher, "PNR kept", "NDCG@5 kept", "NDCG@10 kept", "MRR kept", "Kendall tau"]]
    for name, result in results.items():
        kept = [result.retention.get(metric, float("nan")) for metric in (PNR, "ndcg@5", "ndcg@10", "mrr")]
        tau = float("nan") if result.agreement is None else result.agreement
        rows.append([name, *(f"{value:.1%}" for value in kept), f"{tau:.4f}"])
    return markdown_table(rows)


def calibration_table(results: Mapping[str, SystemResult]) -> str:
    """Expected calibration error of the systems whose scores are logits, before and after their card's map."""
    rows = [["calibration", "ECE of the raw logit", "ECE after the card's map"]]
    for name, result in results.items():
        if result.calibration:
            after = result.calibration.get("after")
            rows.append([name, f"{result.calibration['before']:.4f}", "none" if after is None else f"{after:.4f}"])
    return markdown_table(rows) if len(rows) > 1 else ""


def label(metric: str) -> str:
    """A metric as readers know it: ndcg_exp@5 -> NDCG@5 (2^g-1)."""
    name, at, k = metric.partition("@")
    return {"ndcg": "NDCG", "ndcg_exp": "NDCG"}.get(name, name.upper()) + at + k + (" (2^g-1)" if "exp" in name else "")


def markdown_table(rows: list[list[str]]) -> str:
    """A Markdown table of cells, the first row its header, aligned for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def disagreements(
    teacher: ArrayLike, student: ArrayLike, judgments: Judgments, count: int, per_query: int = 2
) -> NDArray[np.int64]:
    """Rows on which two systems differ most, int [at most count], largest first, at most per_query of one query.

    Scores are centred per query and divided by the spread of the centred scores: scales and per-query offsets, which
    move no ranking, do not count.
    """
    gap = np.abs(_standardised(teacher, judgments.groups) - _standardised(student, judgments.groups))
    chosen: list[int] = []
    taken = np.zeros(len(judgments.query_ids), np.int64)
    for row in np.argsort(-gap, kind="stable"):
        if len(chosen) == count or gap[row] < 1e-6:  # below, only rounding differs
            break
        if taken[judgments.groups[row]] < per_query:
            taken[judgments.groups[row]] += 1
            chosen.append(int(row))
    return np.array(chosen, np.int64)


def _standardised(scores: ArrayLike, groups: NDArray[np.int64]) -> NDArray[np.float64]:
    values = np.asarray(scores, np.float64)
    centred = values - (np.bincount(groups, weights=values) / np.bincount(groups))[groups]
    return centred / (centred.std() or 1.0)


def disagreement_page(
    names: tuple[str, str], scores: tuple[ArrayLike, ArrayLike], judgments: Judgments, count: int
) -> str:
    """Markdown page of the largest disagreements of names[1] with names[0]: query, document, grade, scores, places."""
    rows = disagreements(scores[0], scores[1], judgments, count)
    places = [_places(judgments, values) for values in scores]
    sizes = np.bincount(judgments.groups)
    lines = [f"# Where {names[1]} differs most from {names[0]}", ""]
    lines += [f"Scores are raw; the place is that among the query's judged documents. {len(rows)} rows, largest first."]
    texts = judgments.table.take(rows).to_pylist()
    for row, text in zip(rows, texts):
        of = sizes[judgments.groups[row]]
        lines += ["", f"**{_short(text['query'], 100)}** (query {text['query_id']})"]
        lines += [f"- grade {text['grade']}: {_short(text['title'], 100)} (document {text['doc_id']})"]
        lines += [f"- {_short(text['summary'], 240)}"] if text["summary"].strip() else []
        for name, values, place in zip(names, scores, places):
            lines.append(f"- {name}: {float(np.asarray(values)[row]):.3f}, place {place[row]} of {of}")
    return "\n".join(lines) + "\n"


def _places(judgments: Judgments, scores: ArrayLike) -> NDArray[np.int64]:
    """1-based place of every row within its query."""
    judged = judgments.ranking(scores)
    places = np.empty(len(judged.order), np.int64)
    places[judged.order] = judged.places + 1
    return places


def _short(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
