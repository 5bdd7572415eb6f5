"""Whether the student is worth shipping: it must beat what the user has, on the test queries, by more than chance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ranking.significance import Interval, paired_bootstrap

METRIC = "ndcg@5"


def reason_not_to_ship(evaluation: Path, with_prior: bool) -> str:
    """Why the student should not replace what ranks today; empty if it should.

    evaluation: folder of training.evaluate with the systems bm25, baseline and student, and "baseline + bm25" and
    "student + bm25" for with_prior: the arms are then judged as they would serve, with BM25 as their prior. The student
    has to beat BM25: the 95% interval of the paired difference lies above 0. And it must not be worse than the
    baseline: that interval does not lie below 0.
    """
    arms = ("student + bm25", "baseline + bm25") if with_prior else ("student", "baseline")
    student, baseline = (per_query(evaluation, name) for name in arms)
    bm25 = per_query(evaluation, "bm25")
    whose = "the student with BM25 as its prior" if with_prior else "the student"
    against_bm25, against_baseline = paired_bootstrap(student, bm25), paired_bootstrap(student, baseline)
    if against_bm25.low <= 0:
        gain = paired_bootstrap(baseline, bm25)
        other = (
            f"the baseline does beat it ({_said(gain)}): build that one, or distil from more labels"
            if gain.low > 0
            else "nothing trained here beats what you have; more judgments, clicks or a better teacher are needed"
        )
        return (
            f"on {len(student)} test queries NDCG@5 of {whose} is {student.mean():.3f} and BM25's {bm25.mean():.3f} "
            f"({_said(against_bm25)}): no gain that chance does not explain; {other}"
        )
    if against_baseline.high < 0:
        return (
            f"on {len(student)} test queries NDCG@5 of {whose} is {student.mean():.3f} and the baseline's "
            f"{baseline.mean():.3f} ({_said(against_baseline)}): ship the baseline, or distil from more labels"
        )
    return ""


def per_query(evaluation: Path, system: str) -> NDArray[np.float64]:
    """NDCG@5 per query, float64 [q], in the order that all systems share."""
    table = pq.read_table(evaluation / "per_query.parquet", columns=["system", METRIC])
    return table.filter(pc.equal(table.column("system"), system)).column(METRIC).to_numpy()


def _said(difference: Interval) -> str:
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
