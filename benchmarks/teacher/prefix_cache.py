"""How many prompt tokens vLLM's prefix cache can save while labelling, by the size of its blocks.

    python -m benchmarks.teacher.prefix_cache --teacher runs/teacher --data data/msrd

The cache keeps whole blocks of a prompt's beginning. Pairs of one query share "Query: ... Title:", which has to fill a
block before anything is saved. Nothing is served here: the teacher's own texts are tokenised and compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.teacher.parity import read_pairs
from ranking.program import run
from ranking.text import TeacherFormat


@dataclass
class Config:
    """Count the tokens that neighbouring prompts share.

    Args:
        teacher: teacher checkpoint: its tokenizer and limits
        data: dataset folder with test judgments, sorted by query as the labeller sends them
        pairs: how many pairs
        block_sizes: tokens of a block
    """

    teacher: Path
    data: Path
    pairs: int = 2000
    block_sizes: list[int] = field(default_factory=lambda: [16, 32, 128])


def main(config: Config) -> None:
    """Print the median length and common beginning, and what each block size saves."""
    pairs = read_pairs(config.data, config.pairs)
    text = TeacherFormat.of_checkpoint(config.teacher)
    texts = text.texts(pairs.queries, pairs.titles, pairs.summaries)
    prompts = [text.tokenizer.encode(each.text).ids for each in texts]
    print(json.dumps(prefix_savings(prompts, config.block_sizes)))


def prefix_savings(prompts: Sequence[Sequence[int]], block_sizes: Sequence[int]) -> dict[str, float]:
    """prompts: token ids in the order of sending. Shares are of all tokens, and whole blocks alone count."""
    common = [common_beginning(before, prompt) for before, prompt in pairwise(prompts)]
    tokens = sum(map(len, prompts))
    found = {
        "median tokens of a prompt": float(np.median([len(prompt) for prompt in prompts])),
        "median tokens in common": float(np.median(common)),
    }
    for size in block_sizes:
        found[f"saved by blocks of {size}"] = round(sum(shared // size * size for shared in common) / tokens, 4)
    return found


def common_beginning(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens that both begin with."""
    for place, (a, b) in enumerate(zip(left, right)):
        if a != b:
            return place
    return min(len(left), len(right))


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.teacher.prefix_cache --teacher runs/teacher --data data/msrd")
