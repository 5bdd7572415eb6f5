"""What depth and width of a student cost and bring: NDCG@5 against processor time a page. One command, resumable.

python -m benchmarks.students.sizes --data runs/demo-data/data --labels runs/demo-data/labels --out runs/sizes

The whole student starts from MiniLM-L6. A smaller one starts from the whole one, without the layers that its scores
miss least (left out one by one, by the scores of dev queries; no judgment is looked at) and without the inner neurons
of least weight, and learns the same labels again. BM25 and the blend teacher of the labels stand beside. Every encoder
then scores whole lists in process, in OpenVINO and with the front's own code, in rounds that take turns. A second table
has each smaller student as the first of a cascade whose best k the whole one scores; its time is put together from the
first table's, by the share of documents that each scores (benchmarks/serving/cascade.py times cascades).
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from benchmarks.paired_rounds import interleaved, ratio_of_medians, timed
from benchmarks.serving.cascade import Encoder, read_lists, score_pages
from benchmarks.students.runs import paired_gain, train_as_shipped
from build.triton_config import ServingLimits
from ranking.cascade import Cascade
from ranking.errors import InputError
from ranking.files import replacing, write_json
from ranking.metrics import JudgedRanking
from ranking.program import run
from training import distill_student
from training.evaluate import judgments_of, score_system
from training.evaluation.checkpoint_scores import Precision, Scorer
from training.evaluation.comparison import Judgments

LOGGER = logging.getLogger(__name__)
SETTINGS = "student_minilm.yaml"


@dataclass
class Config:
    """Train students of several sizes, and print the table.

    Args:
        data: dataset folder with dev and test judgments
        labels: labels folder of its candidates, made by training.blend_labels, whose teacher is measured too
        out: folder for checkpoints, chosen layers and scores
        shapes: LAYERS or LAYERSxINNER, inner being the neurons of a layer's feed-forward that are kept; all layers
            alone are the whole student trained on for as long as the smaller ones
        epochs: passes of a smaller student over the labels
        judged_epochs: passes of a smaller student over the judged train queries after that
        probe_queries: dev queries by whose scores layers are left out
        from_pretrained: depths that are trained from MiniLM's own layers as well, evenly spaced, as long as the whole
        seed: of all trainings
        pages: test lists that are timed
        rounds: rounds of the timing
        k: documents that the whole student scores in a cascade, a column of the second table each
        precision: bf16 or fp32, of the engines that are timed
        evaluation: precision of the scores on test: float32, bfloat16 or auto
        plot: also draw NDCG@5 against processor time into this file
    """

    data: Path
    labels: Path
    out: Path = Path("runs/sizes")
    shapes: list[str] = field(default_factory=lambda: ["4", "3", "2", "1", "6x512", "3x512"])
    epochs: int = 2
    judged_epochs: int = 2
    probe_queries: int = 10
    from_pretrained: list[int] = field(default_factory=lambda: [3])
    seed: int = 0
    pages: int = 40
    rounds: int = 3
    k: list[int] = field(default_factory=lambda: [5, 8, 12, 16])
    precision: str = "fp32"
    evaluation: Precision = "auto"
    plot: Path | None = None

    def __post_init__(self):
        for shape in self.shapes:
            parse_shape(shape)
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision {self.precision}: bf16 and fp32 are measured here")


@dataclass
class Row:
    """A system of the table. scores: float32 [test documents]."""

    name: str
    scores: NDArray[np.float32]
    checkpoint: Path | None = None


def parse_shape(shape: str) -> tuple[int, int | None]:
    """Layers, and inner neurons where they are named. ValueError for anything else."""
    layers, _, inner = shape.partition("x")
    if not layers.isdecimal() or (inner and not inner.isdecimal()) or shape.endswith("x"):
        raise ValueError(f"shapes: {shape!r} is none; 3 or 3x512 is expected")
    return int(layers), int(inner) if inner else None


def main(config: Config) -> None:
    """Train what is not finished, score the test documents, time the encoders, print the table."""
    config.out.mkdir(parents=True, exist_ok=True)
    refuse_other_settings(config)
    judgments = judgments_of(config.data / "judgments" / "test.parquet")
    checkpoints = trained(config)
    references = {"BM25": "bm25", "teacher": f"blend:{config.labels}"}
    rows = [Row(name, scores_on_test(config, name, source, judgments)) for name, source in references.items()]
    for name, folder in checkpoints.items():
        rows.append(Row(name, scores_on_test(config, folder.name, f"checkpoint:{folder}", judgments), folder))
    milliseconds = page_times(config, checkpoints)
    print(table(rows, judgments, milliseconds))
    print()
    print(cascades(rows, judgments, milliseconds, config.k))
    if config.plot:
        draw(rows, judgments, milliseconds, config.plot)


def refuse_other_settings(config: Config) -> None:
    """InputError if what `out` keeps is of other data, labels or settings; what is timed and printed may differ."""
    free = ("out", "shapes", "from_pretrained", "pages", "rounds", "k", "precision", "plot")
    settings = {name: str(value) for name, value in vars(config).items() if name not in free}
    kept = config.out / "settings.json"
    if not kept.is_file():
        write_json(kept, settings)
    elif json.loads(kept.read_text(encoding="utf-8")) != settings:
        raise InputError(f"{config.out}: trainings of other settings lie here; give another --out")


def trained(config: Config) -> dict[str, Path]:
    """Name -> checkpoint of every student, trained where it is not finished."""
    train = partial(
        train_as_shipped, distill_student, SETTINGS, data=config.data, labels=config.labels, seed=config.seed
    )
    whole = train(config.out / "whole")
    layers = json.loads((whole / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    found = {named(layers, []): whole}
    passes = {"epochs": config.epochs, "judged-epochs": config.judged_epochs}
    order = layers_by_need(config, whole, layers)
    for depth in (*(parse_shape(shape)[0] for shape in config.shapes), *config.from_pretrained):
        if not 1 <= depth <= layers:
            raise InputError(f"{depth} layers are asked for, the start has 1 to {layers}")
    for shape in config.shapes:
        depth, inner = parse_shape(shape)
        kept = sorted(order[:depth])
        flags: dict[str, object] = {"init-layers": json.dumps(kept)} if depth < layers else {}
        flags |= {"init-inner": inner} if inner else {}
        name = named(depth, kept if depth < layers else []) + (f", {inner} inner" if inner else "")
        name += ", trained on" if name in found else ""
        found[name] = train(config.out / f"shape-{shape}", init=whole, **passes, **flags)
    for depth in config.from_pretrained:
        kept = [number * layers // depth for number in range(depth)]
        name = f"{named(depth, kept)} of MiniLM itself"
        found[name] = train(config.out / f"pretrained-{depth}", **{"init-layers": json.dumps(kept)})
    return found


def named(depth: int, kept: list[int]) -> str:
    """What the table calls a depth, and the layers that are left of a deeper one."""
    return f"{depth} layer{'s' * (depth > 1)}" + (f" ({', '.join(map(str, kept))})" if kept else "")


def layers_by_need(config: Config, whole: Path, layers: int) -> list[int]:
    """The layers of the whole student, those that its scores can least do without first.

    One after the other is left out, always the one without which the scores of dev queries' documents, each query's
    mean taken off, differ least from the whole student's by mean square.
    """
    kept = config.out / "layers_by_need.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    dev = judgments_of(config.data / "judgments" / "dev.parquet", config.probe_queries)
    scorer = Scorer.load(whole)
    stack: Any = scorer.model.base_model.encoder

    def scores(numbers: list[int]) -> NDArray[np.float64]:
        with only_layers(stack, numbers):
            found = scorer.score(*dev.texts(), precision=config.evaluation).astype(np.float64)
        means = np.bincount(dev.groups, found) / np.bincount(dev.groups)
        return found - means[dev.groups]

    target, left, dropped = scores([*range(layers)]), [*range(layers)], []
    while len(left) > 1:
        without = {number: [each for each in left if each != number] for number in left}
        errors = {number: float(np.square(scores(rest) - target).mean()) for number, rest in without.items()}
        least = min(errors, key=errors.__getitem__)
        LOGGER.info("without layer %d of %s: mean square %.4f of %.4f", least, left, errors[least], target.var())
        dropped.append(least)
        left = without[least]
    order = [*left, *reversed(dropped)]
    write_json(kept, order)
    return order


@contextmanager
def only_layers(stack: Any, numbers: list[int]) -> Iterator[None]:
    """The encoder with some of its layers, until the block ends."""
    whole = stack.layer
    stack.layer = nn.ModuleList(whole[number] for number in numbers)
    try:
        yield
    finally:
        stack.layer = whole


def scores_on_test(config: Config, name: str, source: str, judgments: Judgments) -> NDArray[np.float32]:
    """A system's scores of the test documents, kept in a file."""
    kept = config.out / f"test-{name}.npy"
    if not kept.is_file():
        found = score_system(f"{name}={source}", judgments, corpus=config.data, precision=config.evaluation)
        with replacing(kept) as aside, aside.open("wb") as stream:
            np.save(stream, found.scores)
    return np.load(kept)


def page_times(config: Config, checkpoints: dict[str, Path]) -> dict[str, list[float]]:
    """Milliseconds of one core that a page of judged test documents takes, by student and round."""
    pages = read_lists(config.data, config.pages)
    with tempfile.TemporaryDirectory() as folder:
        encoders = {
            name: Encoder(checkpoint, Path(folder) / str(number), config.precision, 1, ServingLimits())
            for number, (name, checkpoint) in enumerate(checkpoints.items())
        }
        ways = {name: partial(timed, partial(score_pages, encoder, pages)) for name, encoder in encoders.items()}
        for way in ways.values():
            way()  # the first pages of an engine compile their shapes
        found = interleaved(ways, config.rounds, "pages")
    return {name: [1e3 * each.processor_seconds / len(pages) for each in of_one] for name, of_one in found.items()}


def ndcg_by_query(scores: NDArray[np.float32], judgments: Judgments) -> NDArray[np.float64]:
    """NDCG@5 of each test query."""
    return JudgedRanking(scores, judgments.grades, judgments.groups, len(judgments.query_ids)).ndcg(5)


def table(rows: list[Row], judgments: Judgments, milliseconds: dict[str, list[float]]) -> str:
    """Markdown, with the first student as what the others are compared to."""
    whole = next(row for row in rows if row.checkpoint)
    lines = [
        "| system | encoder's weights | NDCG@5 | less the whole student | p | ms of one core a page | pages per core |",
        "|---|--:|--:|---|--:|--:|--:|",
    ]
    for row in rows:
        ndcg = ndcg_by_query(row.scores, judgments)
        cells = [row.name, f"{layer_weights(row.checkpoint) / 1e6:.1f} M" if row.checkpoint else ""]
        cells.append(f"{ndcg.mean():.4f}")
        cells += ["", ""] if row is whole else paired_gain((ndcg - ndcg_by_query(whole.scores, judgments))[None])
        if row.checkpoint:
            times = milliseconds[row.name]
            gain = "1" if row is whole else f"{ratio_of_medians(milliseconds[whole.name], times)} x"
            cells += [f"{statistics.median(times):.1f}", gain]
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cascades(rows: list[Row], judgments: Judgments, milliseconds: dict[str, list[float]], k: list[int]) -> str:
    """Markdown: NDCG@5 less the whole student's, and pages per core against its own, by first student and k."""
    whole, *smaller = (row for row in rows if row.checkpoint)
    ndcg, times = (
        ndcg_by_query(whole.scores, judgments),
        {name: statistics.median(of) for name, of in milliseconds.items()},
    )
    lists = np.bincount(judgments.groups)
    lines = ["| first | " + " | ".join(f"k = {each}" for each in k) + " |", "|---|" + "---|" * len(k)]
    for row in smaller:
        cells = [row.name]
        for each in k:
            cascade = Cascade.fit(each, whole.scores, row.scores)
            joined = cascade.of_lists(row.scores, whole.scores, judgments.groups)
            lost = float((ndcg_by_query(joined, judgments) - ndcg).mean())
            # a list of at most k documents is the whole student's alone
            by_whole, by_small = np.minimum(lists, each).sum() / lists.sum(), lists[lists > each].sum() / lists.sum()
            spent = by_whole * times[whole.name] + by_small * times[row.name]
            cells.append(f"{lost:+.4f}, {times[whole.name] / spent:.2f} x")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def layer_weights(checkpoint: Path) -> int:
    """Weights of the layers, without embeddings and head: what a token passes through."""
    encoder: Any = Scorer.load(checkpoint).model.base_model.encoder
    return sum(weights.numel() for weights in encoder.parameters())


def draw(rows: list[Row], judgments: Judgments, milliseconds: dict[str, list[float]], path: Path) -> None:
    """NDCG@5 against processor time a page, BM25 and the teacher as lines."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for number, row in enumerate(rows):
        ndcg = float(ndcg_by_query(row.scores, judgments).mean())
        if row.checkpoint:
            time = statistics.median(milliseconds[row.name])
            axes.plot([time], [ndcg], "o", color="tab:blue")
            axes.annotate(
                row.name, (time, ndcg), textcoords="offset points", xytext=(5, (4, -10)[number % 2]), fontsize=7
            )
        else:
            axes.axhline(ndcg, linestyle="--", color="gray")
            axes.annotate(row.name, (0, ndcg), textcoords="offset points", xytext=(3, 3), fontsize=8)
    axes.set_xlim(0, 1.2 * max(statistics.median(times) for times in milliseconds.values()))
    axes.set_xlabel("processor time a page, ms of one core")
    axes.set_ylabel("NDCG@5")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m benchmarks.students.sizes --data runs/demo-data/data --labels runs/demo-data/labels",
    )
