"""How long the metrics take on a million judged pairs, beside ir-measures and a pair-by-pair enumeration."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import ir_measures
import numpy as np
from numpy.typing import NDArray

from ranking.errors import InputError
from ranking.files import replacing
from ranking.metrics import JudgedRanking
from ranking.program import run
from ranking.significance import paired_bootstrap, pnr_randomisation_test, randomisation_test

LIMIT_SECONDS = 5.0
T = TypeVar("T")


@dataclass
class Config:
    """Time and check ranking/metrics.py on generated judgments and write a results page.

    Args:
        pairs: judged query-document pairs
        queries: queries that they belong to
        checked_queries: queries on which every pair is enumerated as a check
        out: results page; empty for none
        note: a line on the machine and the date for the page
        seed: draws scores, grades and groups
    """

    pairs: int = 1_000_000
    queries: int = 50_000
    checked_queries: int = 500
    out: str = "docs/results/metrics.md"
    note: str = ""
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.checked_queries <= self.queries <= self.pairs:
            raise ValueError("1 <= checked_queries <= queries <= pairs is needed")


@dataclass
class Judged:
    """Two systems' scores, float32 [n] with ties; grades 0..4 and query numbers, int [n]."""

    scores: NDArray[np.float32]
    others: NDArray[np.float32]
    grades: NDArray[np.int64]
    groups: NDArray[np.int64]


@dataclass
class Seconds:
    """Wall-clock and processor seconds; on a shared machine the first depends on the neighbours."""

    wall: float
    processor: float

    def __str__(self) -> str:
        return f"{self.wall:.2f} | {self.processor:.2f}"


def make_judged(config: Config) -> Judged:
    """Two systems' scores of generated judgments; every query has at least one document."""
    rng = np.random.default_rng(config.seed)
    groups = rng.integers(0, config.queries, config.pairs)
    groups[: config.queries] = np.arange(config.queries)  # no query without a document
    grades = rng.choice(5, config.pairs, p=[0.6, 0.15, 0.1, 0.1, 0.05])
    noise = rng.normal(0, 1.5, (2, config.pairs))
    scores, others = np.round(grades + noise, 2).astype(np.float32)  # rounded, so that some scores tie
    return Judged(scores, others, grades, groups)


def timed(work: Callable[[], T]) -> tuple[Seconds, T]:
    """The seconds that the work takes, and its result."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor), result


def all_metrics(judged: Judged, scores: NDArray[np.float32]) -> dict[str, float]:
    """Everything that evaluation reports of one system."""
    ranking = JudgedRanking(scores, judged.grades, judged.groups)
    found = {f"ndcg@{k}": ranking.ndcg(k).mean() for k in (1, 5, 10)}
    found |= {f"ndcg_exp@{k}": ranking.ndcg(k, "exponential").mean() for k in (1, 5, 10)}
    pairs = ranking.pairs()
    return found | {"mrr": ranking.mrr().mean(), "pnr": pairs.pnr, "ties": pairs.tie_share}


def enumerated(judged: Judged, queries: int) -> tuple[float, float]:
    """NDCG@5 with exponential gain and PNR of the first queries, document by document and pair by pair."""
    ndcg, right, wrong = [], 0, 0
    chosen = judged.groups < queries
    rows: dict[int, list[tuple[float, int]]] = {}
    for score, grade, query in zip(judged.scores[chosen], judged.grades[chosen], judged.groups[chosen]):
        rows.setdefault(int(query), []).append((float(score), int(grade)))
    for documents in rows.values():
        ranked = [grade for _, grade in sorted(documents, key=lambda document: -document[0])]
        dcg, ideal = (
            sum((2**grade - 1) / math.log2(place + 2) for place, grade in enumerate(order[:5]))
            for order in (ranked, sorted(ranked, reverse=True))
        )
        ndcg.append(dcg / ideal if ideal else 0.0)
        for (s1, g1), (s2, g2) in itertools.combinations(documents, 2):
            right += (s1 - s2) * (g1 - g2) > 0
            wrong += (s1 - s2) * (g1 - g2) < 0
    return sum(ndcg) / len(ndcg), right / wrong


def ir_measures_ndcg(judged: Judged) -> float:
    """Linear NDCG@10 by ir-measures; it breaks ties by document id, so ids are numbered to fall in row order."""
    last = len(judged.grades)
    names = [f"{last - i:09d}" for i in range(last)]
    qrels = [ir_measures.Qrel(str(q), d, int(g)) for q, d, g in zip(judged.groups, names, judged.grades)]
    scored = [ir_measures.ScoredDoc(str(q), d, float(s)) for q, d, s in zip(judged.groups, names, judged.scores)]
    measure = ir_measures.nDCG @ 10
    return ir_measures.calc_aggregate([measure], qrels, scored)[measure]


def main(config: Config) -> None:
    """Time and check the metrics; InputError if one disagrees with its reference."""
    judged = make_judged(config)
    seconds, ours = timed(lambda: all_metrics(judged, judged.scores))
    theirs_seconds, theirs = timed(lambda: ir_measures_ndcg(judged))
    head = Judged(*(part[judged.groups < config.checked_queries] for part in vars(judged).values()))
    enumerated_seconds, truth = timed(lambda: enumerated(judged, config.checked_queries))
    checked = all_metrics(head, head.scores)
    test_seconds = timed(lambda: _tests(judged))[0]
    gaps = {
        "NDCG@10, linear, against ir-measures, all queries": abs(ours["ndcg@10"] - theirs),
        f"NDCG@5, 2^g-1, enumerated, {config.checked_queries} queries": abs(checked["ndcg_exp@5"] - truth[0]),
        f"PNR, every pair enumerated, {config.checked_queries} queries": abs(checked["pnr"] - truth[1]),
    }
    share = config.queries / config.checked_queries
    everything = Seconds(enumerated_seconds.wall * share, enumerated_seconds.processor * share)
    met = "met" if seconds.wall < LIMIT_SECONDS else "missed"
    lines = [
        f"| what, {config.pairs:,} pairs, {config.queries:,} queries | seconds | processor seconds | |",
        "|---|---|---|---|",
        f"| all metrics of one system: NDCG@1/5/10 with both gains, MRR, PNR, ties | {seconds} | "
        f"limit {LIMIT_SECONDS:.0f}: {met} |",
        f"| ir-measures, NDCG@10 alone, its input built | {theirs_seconds} | {_times(theirs_seconds, seconds)} |",
        f"| NDCG@5 and PNR by enumeration (from {config.checked_queries} queries) | {everything} | "
        f"{_times(everything, seconds)} |",
        f"| bootstrap interval, and randomisation p for NDCG@5 and for PNR, of two systems | {test_seconds} | "
        "2,000 resamples, 10,000 permutations |",
        "",
        "| value | largest difference |",
        "|---|---|",
        *(f"| {name} | {gap:.1e} |" for name, gap in gaps.items()),
    ]
    print("\n".join(lines))
    if config.out:
        _write_page(Path(config.out), lines, config)
    if max(gaps.values()) > 1e-6:
        raise InputError(f"the metrics disagree with their references: {gaps}")


def _times(theirs: Seconds, ours: Seconds) -> str:
    return f"{theirs.processor / ours.processor:.0f} times the processor time of ours"


def _tests(judged: Judged) -> None:
    ours, theirs = (JudgedRanking(s, judged.grades, judged.groups) for s in (judged.scores, judged.others))
    paired_bootstrap(ours.ndcg(5), theirs.ndcg(5))
    randomisation_test(ours.ndcg(5), theirs.ndcg(5))
    counts = [(r.concordant, r.discordant) for r in (ours.pairs(), theirs.pairs())]
    pnr_randomisation_test(*counts)


def _write_page(path: Path, lines: list[str], config: Config) -> None:
    command = f"python -m benchmarks.data.metrics --pairs {config.pairs} --queries {config.queries}"
    text = ["# Speed and correctness of the metrics", "", f"`{command}`", "", config.note, "", *lines]
    with replacing(path) as aside:
        aside.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.data.metrics --pairs 100000 --queries 5000 --out ''")
