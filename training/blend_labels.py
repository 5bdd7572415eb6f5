"""Labels candidates by a blend of rankers: a teacher that needs no judgments, or an ensemble of teachers.

Without a word more, the blend is BM25 and the embedding similarity of a pretrained sentence encoder, both of the whole
document and of its title: nothing is trained, and a collection without a single judgment has a teacher. `--ranker`
adds checkpoints (an encoder trained on judgments or clicks) and finished labels of other teachers. The labels folder is
the one that clients/label_corpus.py writes (ranking/labels.py).
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ranking.errors import InputError
from ranking.label_writer import check_new, write_labels
from ranking.metrics import JudgedRanking, mean
from ranking.program import run
from ranking.schema import read_table
from training.evaluation.blend import UNTRAINED, Blend, BlendScorer, Combination, Precision, Ranker, query_numbers
from training.evaluation.blend_combination import disagreement, rank_fractions, ridge_weights
from training.evaluation.blend_weights import fit_weights
from training.trainer.training_settings import bf16_is_native

LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Config:
    """Label candidates by a weighted blend of rankers.

    Args:
        data: dataset folder: candidates, dev judgments for the weights, and the documents of BM25's word statistics
        out: labels folder to write
        candidates: file to label, if not the dataset's candidates.parquet
        ranker: bm25, bm25:title, similarity, similarity:title, checkpoint:PATH (ours, or any cross-encoder) and
            labels:PATH (a finished labels folder; without --weight it must hold the judged dev pairs too)
        weight: weights of the rankers, in their order; left out, they are fitted on dev judgments, equal without any
        combine: what is added up: weighted sums scores on one scale; ridge too, with weights of a ridge regression on
            dev judgments; rank sums ranks within the query, which no ranker's scale can bend
        encoder: sentence encoder of the similarity: minilm, a folder or a hub id
        max_tokens: length limit of a text that is embedded
        precision: float32, bfloat16 matrix products, or auto: bfloat16 where the processor multiplies it natively
    """

    data: Path
    out: Path
    candidates: Path | None = None
    ranker: list[str] = field(default_factory=lambda: list(UNTRAINED))
    weight: list[float] = field(default_factory=list)
    combine: Combination = "weighted"
    encoder: str = "minilm"
    max_tokens: int = 128
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        if not self.ranker or len(set(self.ranker)) < len(self.ranker):
            raise ValueError("ranker: at least one is needed, each once")
        if self.weight and len(self.weight) != len(self.ranker):
            raise ValueError(f"weight: {len(self.weight)} weights for {len(self.ranker)} rankers")
        if any(not 0 <= weight < math.inf for weight in self.weight) or (self.weight and not sum(self.weight)):
            raise ValueError("weight: weights must be finite, not negative, and not all 0")
        if self.weight and self.combine == "ridge":
            raise ValueError("weight: combine ridge finds the weights itself; leave them out")
        if self.max_tokens < 4:
            raise ValueError(f"max_tokens is {self.max_tokens}: at least 4 are needed")


def blend_labels(config: Config) -> Blend:
    """Score the candidates, choose the weights, write the labels folder, and return the blend."""
    path = config.candidates or config.data / "candidates.parquet"
    check_new(config.out)  # before the scoring, which may take hours
    rows = read_table(path, "candidates")
    if not len(rows):
        raise InputError(f"{path}: there is no candidate to label")
    precision: Precision = "bfloat16" if config.precision == "auto" and bf16_is_native() else "float32"
    if config.precision != "auto":
        precision = config.precision
    scorer = BlendScorer(config.data, config.encoder, config.max_tokens, precision)
    rankers, columns = [], []
    for source in config.ranker:
        ranker = scorer.ranker(source)
        scores = scorer.scores(source, rows)
        spread = float(scores.std())
        if not np.isfinite(scores).all():
            raise InputError(f"--ranker {source}: its scores of {path} are not finite")
        if not spread and source in UNTRAINED and not config.weight:
            # of a collection without titles, or in another script than the encoder's, there is nothing to standardise
            LOGGER.info("%s is left out: it scores all candidates alike", source)
            continue
        if not spread:
            raise InputError(f"--ranker {source}: it scores all candidates of {path} alike")
        rankers.append(replace(ranker, mean=float(scores.mean()), spread=spread))
        columns.append((scores - rankers[-1].mean) / spread)
    if not rankers:
        raise InputError(f"{path}: no ranker tells its candidates apart; are titles and summaries empty?")
    weights = choose_weights(config, scorer, rankers)
    blend = Blend(
        tuple(replace(ranker, weight=float(weight)) for ranker, weight in zip(rankers, weights)),
        config.encoder,
        config.max_tokens,
        precision,
        scorer.corpus,
        config.combine,
    )
    LOGGER.info("teacher: %s", blend.describe())
    added = columns
    if config.combine == "rank":
        groups = query_numbers(rows)
        added = [rank_fractions(column, groups) for column in columns]
    labels = (np.stack(added, axis=1) @ weights).astype(np.float32)
    apart = disagreement(np.stack(columns, axis=1)) if len(columns) > 1 else None
    write_labels(config.out, path, rows, labels, blend.teacher_id(), {"blend": asdict(blend)}, apart)
    LOGGER.info("%s: %d labels by teacher %s", config.out, len(labels), blend.teacher_id())
    return blend


def choose_weights(config: Config, scorer: BlendScorer, rankers: list[Ranker]) -> NDArray[np.float64]:
    """The given weights, those that dev judgments want, or equal ones; sum 1. Says which, and what dev says of them."""
    equal = np.full(len(rankers), 1 / len(rankers))
    if config.weight:
        return np.array(config.weight) / sum(config.weight)
    dev_path = config.data / "judgments" / "dev.parquet"
    dev = read_table(dev_path, "judgments") if dev_path.is_file() else None
    if config.combine == "ridge" and (dev is None or not len(dev)):
        raise InputError(f"{dev_path}: no judgments, which combine ridge needs; take weighted or rank")
    if dev is None or not len(dev) or len(rankers) == 1 or config.combine == "rank":
        reason = "ranks are added up" if config.combine == "rank" else f"no judgments in {dev_path}"
        LOGGER.info("equal weights: %s", "one ranker" if len(rankers) == 1 else reason)
        return equal
    scores = np.stack([(scorer.scores(r.source, dev) - r.mean) / r.spread for r in rankers], axis=1)
    grades = dev.column("grade").to_numpy()
    _, groups = np.unique(dev.column("query_id").to_numpy(zero_copy_only=False), return_inverse=True)

    def dev_ndcg(weights: NDArray[np.float64]) -> float:
        return mean(JudgedRanking((scores @ weights).astype(np.float32), grades, groups).ndcg(5))

    fit = ridge_weights if config.combine == "ridge" else fit_weights
    weights = fit(scores.astype(np.float64), grades, groups)
    alone = {r.source: dev_ndcg(row) for r, row in zip(rankers, np.eye(len(rankers)))}
    LOGGER.info(
        "weights fitted on %d judged dev queries: dev NDCG@5 %.4f; equal weights %.4f; alone: %s",
        groups.max() + 1,
        dev_ndcg(weights),
        dev_ndcg(equal),
        ", ".join(f"{source} {value:.4f}" for source, value in alone.items()),
    )
    return weights


def main(config: Config) -> None:
    """Write the labels that the settings describe."""
    blend_labels(config)


if __name__ == "__main__":
    run(main, Config, example="python -m training.blend_labels --data data/shop --out runs/shop/labels")
