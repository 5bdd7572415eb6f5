"""Whether an engine's score of a pair depends on what it is encoded together with, to the bit.

It need not: no layer of an encoder lets the pairs of a batch meet. But a kernel is chosen by the shape of the batch,
and two kernels may add in another order, which moves bf16 and fp32 scores in their last places. A front that keeps
scores (serving/front/score_cache.py) may give a kept score in place of a computed one only where no bit moves, so
every shape of call that such a front can make is tried here on real pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from build.runners import Runner
from build.triton_config import ServingLimits, row_steps
from ranking.encoder_inputs import pad
from ranking.telemetry import bars_are_read
from ranking.text import EncodedPairs

LOGGER = logging.getLogger(__name__)


def call_shapes(limits: ServingLimits, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Every (rows, length) of an OpenVINO front's calls. lengths: its bucket lengths; limits: as of for_target()."""
    steps = row_steps(limits, "openvino")
    shapes = []
    for length in lengths:
        most = max(1, min(limits.max_batch, limits.batch_tokens // length))
        largest = next(step for step in steps if step >= most)
        shapes += [(step, length) for step in steps if step <= largest]
    return shapes


def shapes_that_move_scores(
    runner: Runner, pairs: EncodedPairs, pad_id: int, limits: ServingLimits, lengths: Sequence[int]
) -> list[tuple[int, int]]:
    """The shapes of call, (rows, length), in which some pair's score differs from the one that it has alone.

    Each shape is run with pairs as long as it holds, in places that change from shape to shape, the last row left to
    padding. ValueError if there are no pairs.
    """
    if not len(pairs):
        raise ValueError("no pairs to try the shapes of calls on")
    shapes = call_shapes(limits, lengths)
    alone = np.full(len(pairs), np.nan, np.float32)
    rng = np.random.default_rng(0)
    moved = []
    for rows, length in tqdm(shapes, desc="shapes of calls", leave=False, disable=not bars_are_read()):
        fitting = np.flatnonzero(pairs.lengths <= length)
        if not len(fitting):
            continue  # no real pair is so short
        # half of them the longest that the bucket holds, which it is made for
        count = max(1, rows - 1)
        longest = fitting[np.argsort(-pairs.lengths[fitting], kind="stable")][: -(-count // 2)]
        chosen = rng.permutation(np.concatenate([longest, rng.choice(fitting, count - len(longest))]))
        for row in chosen[np.isnan(alone[chosen])]:
            own = next(edge for edge in lengths if edge >= pairs.lengths[row])
            alone[row] = runner(pad(pairs.take([row]), own, pad_id))[0]
        scores = runner(pad(pairs.take(chosen), length, pad_id, rows))[:count].astype(np.float32)
        if (scores.view(np.int32) != alone[chosen].view(np.int32)).any():
            moved.append((rows, length))
    LOGGER.info("scores alone and in %d shapes of calls: %d shapes move a score", len(shapes), len(moved))
    return moved
