"""--sample: draw a first slice of a corpus and show its scores, so that a wrong teacher costs minutes and not days."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clients.labelling.candidate_file import CandidateFile, RowRange
from ranking.errors import InputError
from ranking.labels import iter_labels
from ranking.schema import TABLES, duplicate_keys, write_table

STRATA = 50
LONGEST_QUERY = 1000  # rows looked through for the start of the next query


def draw_sample(candidates: CandidateFile, size: int, stratify: bool, seed: int, path: Path) -> int:
    """Write a sample of about `size` sound candidates to path. Returns its rows. InputError if there is none.

    Without stratify the first rows; with it the file is cut into equal strata, and from a seeded place in each whole
    queries are taken, so that a file sorted by anything is seen in all its parts.
    """
    size = min(size, candidates.rows)
    strata = min(STRATA, max(1, size // 20)) if stratify else 1
    draw = random.Random(seed)
    pieces: list[pa.Table] = []
    edges = np.linspace(0, candidates.rows, strata + 1).astype(int)
    for number in range(strata):
        first, end = int(edges[number]), int(edges[number + 1])
        quota = size * (number + 1) // strata - size * number // strata
        if stratify:
            first = draw.randrange(first, max(first + 1, end - quota))
        wanted = RowRange(0, first, min(quota + (LONGEST_QUERY if stratify else 0), end - first))
        for _, rows, refused in candidates.read([wanted] if wanted.rows else []):
            start = _next_query(rows) if first and stratify else 0
            sound = [i for i in range(start, len(rows)) if i not in refused][:quota]
            pieces.append(rows.take(pa.array(sound, pa.int64())))
    if not any(map(len, pieces)):
        raise InputError(f"{candidates.path}: no candidate that can be labelled where the sample was drawn")
    drawn = pa.concat_tables(pieces)
    # the same pair may stand far apart in the file, where labelling does not look for duplicates
    again = {bad.row for bad in duplicate_keys(TABLES["candidates"], drawn, first_row=0)}
    kept = [row for row in range(len(drawn)) if row not in again]
    return write_table(path, "candidates", drawn.take(pa.array(kept, pa.int64())))


def _next_query(rows: pa.Table) -> int:
    """Position of the second query's first row; 0 if the rows are all of one query."""
    ids = rows.column("query_id")
    changed = pc.indices_nonzero(pc.fill_null(pc.not_equal(ids, ids[0]), False)) if len(ids) else []
    return changed[0].as_py() if len(changed) else 0


def show_scores(labels: Path) -> str:
    """The score distribution of a finished folder as text: quantiles, ties, spread within a query, a histogram."""
    tables = pa.concat_tables(iter_labels(labels))
    scores = tables.column("teacher_score").to_numpy().astype(np.float64)
    if not len(scores):
        return "no labels"
    marks = (0, 5, 25, 50, 75, 95, 100)
    lines = [
        f"{len(scores)} scores: mean {scores.mean():.3f}, standard deviation {scores.std():.3f}",
        "quantiles: " + ", ".join(f"{m}% {v:.3f}" for m, v in zip(marks, np.percentile(scores, marks))),
        f"share of scores that another pair has too: {_tied(scores):.1%}",
    ]
    spread = tables.group_by("query_id").aggregate([("teacher_score", "stddev"), ("teacher_score", "count")])
    several = spread.filter(pc.greater(spread.column("teacher_score_count"), 1)).column("teacher_score_stddev")
    if len(several):
        lines.append(
            f"standard deviation within a query, mean over {len(several)} queries: {pc.mean(several).as_py():.3f}"
        )
    counts, edges = np.histogram(scores, bins=20)
    lines += [f"{edges[i]:9.3f} {'#' * round(60 * c / counts.max())} {c}" for i, c in enumerate(counts)]
    return "\n".join(lines)


def _tied(scores: np.ndarray) -> float:
    _, counts = np.unique(scores, return_counts=True)
    return float(counts[counts > 1].sum() / len(scores))


def describe_sample(manifest: dict[str, Any], whole: int) -> str:
    """What the sample says of the long run: its rate and the time that the whole would take."""
    run = manifest["runs"][-1] if manifest.get("runs") else None
    if run is None or not run["pairs_per_second"]:
        return ""
    hours = whole / run["pairs_per_second"] / 3600
    return f"at the sample's {run['pairs_per_second']:.0f} pairs/s the {whole} pairs of the file take {hours:.2f} hours"
