"""What the load test sends: queries of a dataset folder with candidate lists, drawn as users would type them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from ranking.errors import InputError
from ranking.request_tensors import read_scores
from ranking.schema import read_table

POOL_SIZE = 400  # distinct requests; each is checked against its own first answer


@dataclass(frozen=True)
class RankRequest:
    """One query with its candidate list. number: its place in the pool."""

    number: int
    query: str
    doc_ids: tuple[str, ...]
    titles: tuple[str, ...]
    summaries: tuple[str, ...]


def parse_sizes(text: str) -> list[tuple[int, float]]:
    """List-size mix "24:0.5,48:0.5" (size: share) -> [(24, 0.5), (48, 0.5)]. InputError on anything else."""
    try:
        mix = [(int(size), float(share or 1)) for size, _, share in (part.partition(":") for part in text.split(","))]
    except ValueError as problem:
        raise InputError(f"--list-sizes {text!r}: sizes and shares like 24:0.5,48:0.5 are needed") from problem
    if not mix or any(size < 1 or not 0 < share < math.inf for size, share in mix):
        raise InputError(f"--list-sizes {text!r}: sizes from 1 and shares above 0 are needed")
    total = sum(share for _, share in mix)
    return [(size, share / total) for size, share in mix]


class RequestPool:
    """Up to POOL_SIZE requests of a dataset's judged queries, and draws from them with Zipf-like frequencies.

    A request has its query's own judged documents first and is filled to its size with documents of other queries, so
    that text lengths are the dataset's. The draws of one seed are the same in every run.
    """

    def __init__(self, data: Path, split: str, sizes: list[tuple[int, float]], zipf: float, seed: int):
        path = Path(data) / "judgments" / f"{split}.parquet"
        if not path.is_file():
            raise InputError(
                f"{path}: no such file; make a dataset first, e.g. "
                "`python -m training.prepare_data --source world --out data/world`, and name it with --data"
            )
        table = read_table(path, "judgments")
        if not len(table):
            raise InputError(f"{path}: no judgment, so no query to send")
        chosen = random.Random(seed)
        names = pc.unique(table.column("query_id")).to_pylist()
        chosen.shuffle(names)
        documents = list(dict.fromkeys(zip(*(table.column(c).to_pylist() for c in ("doc_id", "title", "summary")))))
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(table.column("query_id").to_pylist()):
            rows.setdefault(name, []).append(row)
        queries = table.column("query").to_pylist()
        triples = list(zip(*(table.column(c).to_pylist() for c in ("doc_id", "title", "summary"))))
        self.requests: list[RankRequest] = []
        for number, name in enumerate(names[:POOL_SIZE]):
            size = chosen.choices([s for s, _ in sizes], [w for _, w in sizes])[0]
            listed = [triples[row] for row in rows[name]][:size]
            while len(listed) < size:
                listed.append(chosen.choice(documents))
            ids, titles, summaries = zip(*listed)
            # the filler may repeat a document; ids must still be distinct for the router
            ids = tuple(f"{doc}#{i}" if doc in ids[:i] else doc for i, doc in enumerate(ids))
            self.requests.append(RankRequest(number, queries[rows[name][0]], ids, titles, summaries))
        weights = 1.0 / np.arange(1, len(self.requests) + 1) ** zipf
        self._cumulative = np.cumsum(weights / weights.sum()).tolist()
        self._random = random.Random(seed + 1)

    def draw(self) -> RankRequest:
        """The next request, by frequency: few queries make most of the traffic, as in a real log."""
        return self._random.choices(self.requests, cum_weights=self._cumulative)[0]


def check_scores(request: RankRequest, scores: np.ndarray, first: np.ndarray | None, tolerance: float) -> str:
    """What is wrong with an answer, or an empty string: count, finite values, the order of this request's first answer.

    Two documents may change places only if their first scores were within 2 * tolerance of one another: batching moves
    a score's last bits, nothing else may.
    """
    try:
        read_scores(scores, len(request.doc_ids))
    except ValueError as problem:
        return str(problem)
    if first is not None and float(np.abs(scores - first).max(initial=0.0)) > tolerance:
        # by how much is not said: the text groups failures, and the result has a line for each
        return f"a score moved by more than {tolerance:g} since the first answer to the same request"
    return ""


def exponential_gap(generator: random.Random, rate: float) -> float:
    """Seconds to the next arrival of a Poisson process with `rate` arrivals a second."""
    return -math.log(1.0 - generator.random()) / rate
