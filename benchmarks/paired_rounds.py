"""Measure variants of one thing in interleaved rounds, and compare them by the ratio of their medians.

    found = interleaved({"ours": lambda: timed(ours), "theirs": lambda: timed(theirs)}, rounds=5)
    ratio_of_medians([t.wall_seconds for t in found["theirs"]], [t.wall_seconds for t in found["ours"]])

Another program on the machine slows the variants of one round alike, so a ratio within rounds moves less than either
time. Processor time stands beside wall time, because it moves less again when the machine is busy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from tqdm import tqdm

RESAMPLES = 2000

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Timed(Generic[Result]):
    """What a piece of work gave, and the wall-clock and processor seconds of this process that it took."""

    result: Result
    wall_seconds: float
    processor_seconds: float


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its 95% interval over rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def timed(work: Callable[[], Result]) -> Timed[Result]:
    """Run the work once. Processor seconds are of this process with all its threads, not of its children."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return Timed(result, time.perf_counter() - wall, time.process_time() - processor)


def interleaved(
    variants: Mapping[Name, Callable[[], Result]], rounds: int, progress: str = ""
) -> dict[Name, list[Result]]:
    """Run every variant once a round; returns each one's results, round by round.

    Every second round runs backwards, so that no variant always follows the same other one. progress: what the progress
    bar is called; none is shown without it.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: at least 1 is needed")
    found: dict[Name, list[Result]] = {name: [] for name in variants}
    names = list(variants)
    plan = [name for number in range(rounds) for name in (names if number % 2 == 0 else reversed(names))]
    for name in tqdm(plan, desc=progress, disable=not progress):
        found[name].append(variants[name]())
    return found


def ratio_of_medians(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """median(first) / median(second) over paired rounds, with a 95% bootstrap interval that resamples whole rounds.

    first, second: one value per round, of the same rounds. ValueError if their numbers differ. The interval of a few
    rounds is hardly more than their range; that of one round has no width.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} rounds: one value of each per round is needed")
    values = np.array([first, second], dtype=float)
    drawn = np.random.default_rng(0).integers(0, len(first), (RESAMPLES, len(first)))
    medians = np.median(values[:, drawn], axis=2)
    low, high = np.quantile(medians[0] / medians[1], [0.025, 0.975])
    center = np.median(values, axis=1)
    return Ratio(float(center[0] / center[1]), float(low), float(high))
