"""What a cascade and kept scores save: NDCG@5 against the encoders' work, over k, on traffic that repeats.

    python -m benchmarks.serving.cascade --data data/world --large runs/world/student --small runs/world/small

Both checkpoints are made into OpenVINO engines, which score the judged lists of the test split in process, with the
front's own code: length buckets, cascade, score cache. Pages are drawn with the popularity of queries in the built-in
world's click log, as many as it takes for `repeats` of them to be of a query that came before. Token rows and cached
documents are counts, so they hold for every machine; processor time is this one's.
"""

from __future__ import annotations

import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build import openvino_engine
from build.export_onnx import export, load_encoder, widen_positions
from build.runners import Runner
from build.triton_config import ServingLimits, bucket_lengths, row_steps
from ranking.cascade import Cascade
from ranking.encoder_inputs import pad
from ranking.errors import InputError
from ranking.metrics import JudgedRanking
from ranking.program import run
from ranking.schema import read_judgments
from ranking.text import StudentFormat
from serving.front.buckets import cut
from serving.front.field_cache import FieldCache
from serving.front.score_cache import ScoreCache, content_keys
from training.world.documents import popularity

K_NDCG = 5
ALONE_SMALL, ALONE_LARGE = "small model alone", "large model alone"


@dataclass
class Config:
    """Measure a cascade of two checkpoints, with and without kept scores.

    Args:
        data: dataset folder with test judgments
        large: checkpoint that scores the best k
        small: checkpoint that scores every document
        k: documents of a list that the large one scores, one row of the table each
        queries: judged test queries at most
        repeats: share of pages whose query came before
        score_cache_mb: memory for kept scores, per encoder
        precision: of both engines
        threads: CPU threads of an engine
        plot: also draw NDCG@5 against processor time into this file
        serving: bucket settings
    """

    data: Path
    large: Path
    small: Path
    k: list[int] = field(default_factory=lambda: [3, 5, 8, 10, 12, 16])
    queries: int = 500
    repeats: float = 1 / 3
    score_cache_mb: float = 64.0
    precision: str = "bf16"
    threads: int = 1
    plot: Path | None = None
    serving: ServingLimits = field(default_factory=ServingLimits)

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision {self.precision}: bf16 and fp32 are measured here")
        if not 0 <= self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}: a share from 0 up to, but not, 1 is needed")


@dataclass(frozen=True)
class JudgedList:
    """One page: a test query with its judged documents. grades: int [n]."""

    query: str
    titles: list[str]
    summaries: list[str]
    grades: NDArray[np.int64]


class Encoder:
    """One engine in process, asked as the front asks a served one. tokens: encoded so far, padding included.

    build: makes the engine of the ONNX file, called as openvino_engine.build_ir.
    """

    def __init__(
        self,
        checkpoint: Path,
        folder: Path,
        precision: str,
        threads: int,
        serving: ServingLimits,
        build: Callable[..., Path] = openvino_engine.build_ir,
    ):
        folder.mkdir()
        encoder = load_encoder(checkpoint)
        positions = widen_positions(encoder)
        onnx = export(encoder, folder / "model.onnx")
        ir = build(onnx, folder, precision, positions)
        self.runner: Runner = openvino_engine.runner(ir, precision, threads)
        self.text = StudentFormat.of_checkpoint(checkpoint)
        self.limits = serving.for_target("openvino")
        self.edges = bucket_lengths(self.limits, "openvino", self.text.max_tokens())
        self.cache: ScoreCache | None = None
        self.steps: Sequence[int] = ()
        self.forget(0)

    def forget(self, score_cache_mb: float) -> None:
        """Start anew, with a score cache of this size or none."""
        self.tokens = 0
        self.text.field_ids = FieldCache(self.text.tokenise_fields, 20_000)
        self.cache = ScoreCache(int(score_cache_mb * 2**20), 1e9) if score_cache_mb else None
        kept = ServingLimits(score_cache_mb=score_cache_mb, max_batch=self.limits.max_batch)
        self.steps = row_steps(kept, "openvino")

    def scores(self, page: JudgedList, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """Raw scores of these documents, float32 [len(rows)]."""
        found = np.full(len(rows), np.nan, np.float32)
        keys: list[bytes] = []
        if self.cache is not None:
            documents = [(page.titles[row].encode(), page.summaries[row].encode()) for row in rows]
            keys = content_keys(page.query.encode(), documents, b"text")
            found, _ = self.cache.find(keys)
        missing = np.flatnonzero(np.isnan(found))
        if len(missing):
            found[missing] = self._encode(page, rows[missing])
            if self.cache is not None:
                self.cache.keep([keys[place] for place in missing], found[missing], np.ones(len(missing), np.int32))
        return found

    def _encode(self, page: JudgedList, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        titles, summaries = [page.titles[row] for row in rows], [page.summaries[row] for row in rows]
        pairs = self.text.encode_together([page.query] * len(rows), titles, summaries)
        limits, scores = self.limits, np.empty(len(rows), np.float32)
        calls = cut(pairs.lengths.tolist(), self.edges, limits.max_batch, limits.batch_tokens, limits.call_tokens)
        for call in calls:
            count = next((step for step in self.steps if step >= len(call.rows)), len(call.rows))
            feed = pad(pairs.take(call.rows), call.length, self.text.pad_id, count)
            scores[call.rows] = self.runner(feed)[: len(call.rows)]
            self.tokens += count * call.length
        return scores


def score_pages(encoder: Encoder, pages: Sequence[JudgedList]) -> None:
    """Score every list from the text on, nothing kept from before."""
    encoder.forget(0)
    for page in pages:
        encoder.scores(page, np.arange(len(page.grades)))


@dataclass(frozen=True)
class Traffic:
    """What serving all pages took: per page, milliseconds of one core, and encoded tokens of both encoders."""

    milliseconds: float
    large_tokens: float
    small_tokens: float
    hit_rate: float


def main(config: Config) -> None:
    """Print the table, and draw its curve where --plot says."""
    lists = read_lists(config.data, config.queries)
    with tempfile.TemporaryDirectory() as folder:
        engine = (config.precision, config.threads, config.serving)
        large = Encoder(config.large, Path(folder) / "large", *engine)
        small = Encoder(config.small, Path(folder) / "small", *engine)
        everything = [np.arange(len(each.grades)) for each in lists]
        scored = {
            name: np.concatenate([encoder.scores(each, rows) for each, rows in zip(lists, everything)])
            for name, encoder in ((ALONE_LARGE, large), (ALONE_SMALL, small))
        }
        groups = np.repeat(np.arange(len(lists)), [len(each.grades) for each in lists])
        grades = np.concatenate([each.grades for each in lists])
        pages = draw_pages(len(lists), config.repeats)

        def quality(scores: NDArray[np.float32]) -> float:
            return float(JudgedRanking(scores, grades, groups, len(lists)).ndcg(K_NDCG).mean())

        rows = []
        for k in (0, *sorted(config.k), None):
            name = ALONE_SMALL if k == 0 else ALONE_LARGE if k is None else f"cascade, k = {k}"
            cascade = Cascade.fit(k, scored[ALONE_LARGE], scored[ALONE_SMALL]) if k else None
            joined = scored.get(name)
            if joined is None and cascade is not None:
                joined = cascade.of_lists(scored[ALONE_SMALL], scored[ALONE_LARGE], groups)
            assert joined is not None
            figures: dict[str, Any] = {"arm": name, "k": k, "ndcg5": quality(joined)}
            for size in (0.0, config.score_cache_mb):
                spent = serve(pages, lists, large, small, cascade, name, size)
                figures["cached" if size else "plain"] = vars(spent)
            rows.append(figures)
    print(report(config, rows, lists, pages))
    if config.plot:
        plot(rows, config.plot)


def read_lists(data: Path, most: int) -> list[JudgedList]:
    """Judged test queries with at least two documents. InputError if there is none."""
    by_query: dict[str, list[dict]] = {}
    for row in read_judgments(data / "judgments" / "test.parquet").to_pylist():
        by_query.setdefault(row["query_id"], []).append(row)
    lists = [
        JudgedList(
            rows[0]["query"],
            [row["title"] for row in rows],
            [row["summary"] for row in rows],
            np.array([row["grade"] for row in rows]),
        )
        for rows in by_query.values()
        if len(rows) > 1
    ]
    if not lists:
        raise InputError(f"{data}: no test query has two judged documents")
    return lists[:most]


def draw_pages(lists: int, repeats: float) -> NDArray[np.intp]:
    """List numbers of pages by popularity, as many as it takes until this share of them is of a list seen before.

    The popularity is that of queries in the built-in world's click log: Zipf's law with a flat head.
    """
    rng = np.random.default_rng(0)
    share = popularity(lists, rng, even=max(12, lists / 100))
    drawn = rng.choice(lists, size=100 * lists, p=share / share.sum())
    new = np.zeros(len(drawn), bool)
    new[np.unique(drawn, return_index=True)[1]] = True
    seen_before = 1 - np.cumsum(new) / np.arange(1, len(drawn) + 1)
    enough = np.flatnonzero(seen_before >= repeats)
    return drawn[: int(enough[0]) + 1] if repeats else np.unique(drawn)


def serve(
    pages: NDArray[np.intp],
    lists: Sequence[JudgedList],
    large: Encoder,
    small: Encoder,
    cascade: Cascade | None,
    name: str,
    score_cache_mb: float,
) -> Traffic:
    """Rank all pages as the front does, with empty caches at the start."""
    for encoder in (large, small):
        encoder.forget(score_cache_mb)
    started = time.process_time()
    for number in pages:
        page = lists[number]
        rows = np.arange(len(page.grades))
        if cascade is None or len(rows) <= cascade.k:
            (small if name == ALONE_SMALL else large).scores(page, rows)
            continue
        first = cascade.on_scale(small.scores(page, rows))
        top = cascade.top(first)
        cascade.join(first, top, large.scores(page, top))
    spent = time.process_time() - started
    caches = [encoder.cache for encoder in (large, small) if encoder.cache is not None]
    looked_up = sum(cache.hits + cache.misses for cache in caches)
    count = len(pages)
    hit_rate = sum(cache.hits for cache in caches) / looked_up if looked_up else 0.0
    return Traffic(spent / count * 1e3, large.tokens / count, small.tokens / count, hit_rate)


def report(config: Config, rows: list[dict], lists: Sequence[JudgedList], pages: NDArray[np.intp]) -> str:
    """The table as Markdown."""
    whole = next(row for row in rows if row["k"] is None)
    documents = np.mean([len(each.grades) for each in lists])
    words = (
        f"{len(lists)} test queries with {documents:.0f} judged documents each; {len(pages)} pages, "
        f"{1 - len(np.unique(pages)) / len(pages):.2f} of them of a query that came before; {config.precision}, "
        f"{config.threads} thread. Token rows are encoded tokens a page, padding included."
    )
    lines = [
        *textwrap.wrap(words, 120),
        "",
        "| arm | NDCG@5 | against large | large's token rows | small's | ms of one core a page | pages per core "
        "| with kept scores: token rows, both | ms | hits | pages per core |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        plain, cached = row["plain"], row["cached"]
        gains = [whole["plain"]["milliseconds"] / each["milliseconds"] for each in (plain, cached)]
        lines.append(
            f"| {row['arm']} | {row['ndcg5']:.4f} | {row['ndcg5'] - whole['ndcg5']:+.4f} | {plain['large_tokens']:.0f} "
            f"| {plain['small_tokens']:.0f} | {plain['milliseconds']:.2f} | {gains[0]:.2f} x "
            f"| {cached['large_tokens'] + cached['small_tokens']:.0f} | {cached['milliseconds']:.2f} "
            f"| {cached['hit_rate']:.2f} | {gains[1]:.2f} x |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """NDCG@5 against processor time a page, with and without kept scores."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for kind, words in (("plain", "every document encoded"), ("cached", "scores kept")):
        axes.plot([row[kind]["milliseconds"] for row in rows], [row["ndcg5"] for row in rows], "o-", label=words)
    for row in rows:
        label = {0: "small", None: "large"}.get(row["k"], f"k={row['k']}")
        axes.annotate(label, (row["plain"]["milliseconds"], row["ndcg5"]), fontsize=8)
    axes.set_xlabel("processor time a page, ms of one core")
    axes.set_ylabel("NDCG@5")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m benchmarks.serving.cascade --data data/world --large runs/world/student "
        "--small runs/world/small",
    )
