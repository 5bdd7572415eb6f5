"""The small model of a cascade: an arm that is published already, whose engine becomes a part of the new version.

The new version holds a copy of the small arm's engine, tokenizer and card, so neither a promotion nor a deletion of
that arm changes what the cascade serves.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build.gate import Reference
from build.judged_pairs import JudgedPairs
from build.quality_gate import Comparison, kept_scores, ndcg5
from build.releases import manifest, serving_versions
from build.triton_config import CONFIG_NAME, encoder_name, read_config
from ranking.card import ScoreCard
from ranking.cascade import Cascade
from ranking.errors import InputError, Refused

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class FirstArm:
    """The version of the small arm that serves now, and its fp32 checkpoint's scores of the judged pairs.

    front, encoder: its two version folders; manifest: of the front; scores: float32 [n].
    """

    name: str
    version: int
    front: Path
    encoder: Path
    manifest: dict[str, Any]
    scores: NDArray[np.float32]

    @property
    def engine_files(self) -> list[Path]:
        """The files of its engine."""
        return [self.encoder / name for name in ("model.xml", "model.bin")]


def read_first_arm(repository: Path, name: str, judged: JudgedPairs) -> FirstArm:
    """The serving version of arm `name`.

    judged: the pairs [n] that the cascade is measured on; it must have been gated on them too.
    InputError if no version serves, or it is none of OpenVINO, a cascade itself, or reads documents in chunks.
    """
    serving = serving_versions(repository, name)
    if not serving:
        raise InputError(f"cascade_first {name}: no version of it serves in {repository}; build that arm first")
    version = max(serving)
    front, encoder = repository / name / str(version), repository / encoder_name(name) / str(version)
    about = manifest(repository, name, version)
    if about["target"] != "openvino" or read_config(encoder / CONFIG_NAME).backend != "openvino":
        raise InputError(
            f"cascade_first {name}: version {version} is for {about['target']}; one for openvino is needed"
        )
    if about.get("cascade"):
        raise InputError(f"cascade_first {name}: version {version} is a cascade itself; name a single model")
    chunks = ScoreCard.load(front).chunking.most
    if chunks > 1:
        raise InputError(
            f"cascade_first {name}: version {version} reads up to {chunks} chunks of a document, a cascade reads one; "
            "name a model that reads one"
        )
    scores = kept_scores(repository, name, version, judged)
    if np.isnan(scores).any():
        raise InputError(
            f"cascade_first {name}: version {version} was gated on other judged pairs than these, so the cascade "
            "cannot be measured: build both with the same --data, --split and --gate-queries"
        )
    return FirstArm(name, version, front, encoder, about, scores)


@dataclass(frozen=True)
class CascadeCost:
    """What the cascade loses against its large model alone on the judged queries, and how many it can differ on."""

    against_large: Comparison
    queries_beyond_k: int

    def as_json(self) -> dict[str, Any]:
        """The figures as a version's manifest.json keeps them."""
        return asdict(self)


def measure_cost(cascade: Cascade, large: Reference, joined: Reference, max_loss: float) -> CascadeCost:
    """NDCG@5 of both on the judged queries. InputError if the cascade loses more than max_loss, or cannot be judged.

    large: the large model's own scores; joined: the cascade's, of the same pairs.
    """
    sizes = np.bincount(large.groups, minlength=len(large.queries))
    beyond = int((sizes > cascade.k).sum())
    if not beyond:
        raise InputError(
            f"cascade_k is {cascade.k}: no judged query has more documents (at most {sizes.max()}), so what the "
            "cascade costs cannot be measured; choose a smaller k, or judge longer lists"
        )
    found = Comparison.of("the large model alone", ndcg5(joined.scores, joined), ndcg5(large.scores, large))
    LOGGER.info("cascade: %s; %d queries have more than %d documents", found.line(), beyond, cascade.k)
    if found.difference < -max_loss:
        raise Refused(
            f"the cascade is not published: {found.line()}, which is more than --gate.max-cascade-loss {max_loss:g}; "
            "raise cascade_k, or train a better small model"
        )
    return CascadeCost(found, beyond)
