"""Assignments a second in one core, ours beside the growthbook package's hash on the same ids.

python -m benchmarks.ab.split --users 200000
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from clients.ab.experiment.split import Namespace, Split
from ranking.program import run


@dataclass
class Config:
    """Measure how many users a second are assigned to arms.

    Args:
        users: ids to assign in each round
        rounds: rounds; the best one counts, since other programs only ever take time away
    """

    users: int = 200_000
    rounds: int = 5


def rate(assign: Callable[[str], object], ids: list[str], rounds: int) -> float:
    """Best number of calls a second over rounds."""
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        for user_id in ids:
            assign(user_id)
        best = max(best, len(ids) / (time.perf_counter() - start))
    return best


def main(config: Config) -> None:
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
    print(f"{'ids':26} {'ours/s':>12} {'growthbook/s':>14} {'ratio':>7}")
    for name, ids in cases.items():
        ours, other = rate(split.assign, ids, config.rounds), rate(theirs, ids, config.rounds)
        print(f"{name:26} {ours:12,.0f} {other:14,.0f} {ours / other:7.2f}")
    print(f"{'numbers, in a namespace':26} {rate(spaced.assign, next(iter(cases.values())), config.rounds):12,.0f}")


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.ab.split --users 200000")
