"""Assignments a second in one core, ours beside the growthbook package's hash on the same ids.

python -m benchmarks.ab.split --users 200000
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.paired_rounds import interleaved, ratio_of_medians, timed
from clients.ab.experiment.split import Namespace, Split
from ranking.program import run


@dataclass
class Config:
    """Measure how many users a second are assigned to arms.

    Args:
        users: ids to assign in each round
        rounds: interleaved rounds; a figure is the median of its rounds, in processor time
    """

    users: int = 200_000
    rounds: int = 5


def rate(assign: Callable[[str], object], ids: list[str]) -> float:
    """Calls per second of processor time."""

    def assign_all() -> None:
        for user_id in ids:
            assign(user_id)

    return len(ids) / timed(assign_all).processor_seconds


def main(config: Config) -> None:
    """Measure both hashes on every kind of id in turns and print the rates."""
    import growthbook.core as oracle

    split = Split("student-vs-baseline", ("baseline", "student"), coverage=0.5)
    spaced = Split("student-vs-baseline", ("baseline", "student"), namespace=Namespace("ranking", 0.0, 0.5))
    ranges = oracle.getBucketRanges(2, 0.5, None)

    def theirs(user_id: str):
        place = oracle.gbhash("student-vs-baseline", user_id, 2)
        assert place is not None
        return oracle.chooseVariation(place, ranges)

    cases = {
        "numbers (user-123456)": [f"user-{i:06d}" for i in range(config.users)],
        "32 hex digits": [f"{i * 2654435761 % 2**32:032x}" for i in range(config.users)],
        "non-ASCII (用户123456)": [f"用户{i:06d}" for i in range(config.users)],
    }
    print(f"{'ids':26} {'ours/s':>12} {'growthbook/s':>14}  ratio")
    for name, ids in cases.items():
        functions = {"ours": split.assign, "growthbook": theirs, "in a namespace": spaced.assign}
        found = interleaved({key: partial(rate, assign, ids) for key, assign in functions.items()}, config.rounds)
        ratio = ratio_of_medians(found["ours"], found["growthbook"])
        print(f"{name:26} {np.median(found['ours']):12,.0f} {np.median(found['growthbook']):14,.0f}  {ratio}")
        print(f"{'  in a namespace':26} {np.median(found['in a namespace']):12,.0f}")


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.ab.split --users 200000")
