"""Which arm a user gets: GrowthBook's FNV-1a assignment, a pure function of (seed, user id). Standard library only.

    split = Split("student-vs-baseline", arms=("baseline", "student"), coverage=0.2)
    split.assign("user-17")     # "baseline", "student", or None for a user outside the experiment

The same on every machine, in every process and after every restart, so there is nothing to store and nothing to lose: a
user keeps the arm as long as seed and weights stay. Raising the coverage only adds users; lowering it only sends users
out; nobody changes arm. Algorithm: GrowthBook's "Build Your Own SDK" (hash versions 1 and 2, namespaces, bucket
ranges); a user's bucket agrees with a GrowthBook set-up of the same seed, weights, coverage and namespace.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_OFFSET, _PRIME, _MASK = 0x811C9DC5, 0x01000193, 0xFFFFFFFF
_UTF16 = "utf-16-le" if sys.byteorder == "little" else "utf-16-be"

# GrowthBook takes weight sums this close to 1 as they are; beyond, it would silently fall back to equal weights
WEIGHT_SUM_TOLERANCE = 0.01


def fnv1a(text: str, state: int = _OFFSET) -> int:
    """32-bit FNV-1a over the UTF-16 code units of text (as JavaScript's charCodeAt gives them), continued from
    state."""
    # ASCII bytes are their own code units; an emoji is two units, and a lone surrogate is one, as in JavaScript
    units: Iterable[int] = (
        text.encode() if text.isascii() else memoryview(text.encode(_UTF16, "surrogatepass")).cast("H")
    )
    for unit in units:
        state = (state ^ unit) * _PRIME & _MASK
    return state


def bucket(seed: str, user_id: str) -> float:
    """The user's place in [0, 1), in steps of 1/10000: hash version 2."""
    return fnv1a(str(fnv1a(user_id, fnv1a(seed)))) % 10000 / 10000


def namespace_bucket(namespace: str, user_id: str) -> float:
    """The user's place in a namespace, in steps of 1/1000. GrowthBook's namespaces are of hash version 1."""
    return fnv1a(f"{user_id}__{namespace}") % 1000 / 1000


def bucket_ranges(weights: Sequence[float], coverage: float = 1.0) -> list[tuple[float, float]]:
    """[start, end) of each arm in bucket space. Coverage shortens each range from its end, so starts never move."""
    ranges, start = [], 0.0
    for weight in weights:
        ranges.append((start, start + coverage * weight))
        start += weight
    return ranges


@dataclass(frozen=True)
class Namespace:
    """Experiments that share a namespace's name and have disjoint ranges never share a user."""

    name: str
    start: float
    end: float

    def __post_init__(self):
        if not self.name:
            raise ValueError("namespace name is empty")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"namespace {self.name}: range [{self.start}, {self.end}) is not inside [0, 1)")


@dataclass(frozen=True)
class Split:
    """How the users of one experiment are divided. ValueError names the field that makes no sense.

    Args:
        name: the experiment's name
        arms: names of the arms
        weights: share of each arm; None for equal shares
        seed: what the hash starts from, default the name; another seed is another, independent division
        coverage: share of users inside the experiment; raise it to ramp up
        namespace: the part of a namespace that this experiment may use, if it shares one
        forced: user id -> arm, for testing; comes before everything else
    """

    name: str
    arms: Sequence[str]
    weights: Sequence[float] | None = None
    seed: str = ""
    coverage: float = 1.0
    namespace: Namespace | None = None
    forced: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if not self.name:
            raise ValueError("experiment name is empty")
        if not self.arms or len(set(self.arms)) != len(self.arms) or not all(self.arms):
            raise ValueError(f"{self.name}: arms {list(self.arms)} must be one or more distinct names")
        count = len(self.arms)
        weights = [1 / count] * count if self.weights is None else list(self.weights)
        if len(weights) != count:
            raise ValueError(f"{self.name}: {len(weights)} weights for {count} arms")
        if not all(math.isfinite(w) and w >= 0 for w in weights):
            raise ValueError(f"{self.name}: weights {weights} must be finite and not negative")
        if abs(sum(weights) - 1) > WEIGHT_SUM_TOLERANCE:
            raise ValueError(f"{self.name}: weights {weights} sum to {sum(weights):g}, not 1")
        if not 0 <= self.coverage <= 1:
            raise ValueError(f"{self.name}: coverage {self.coverage} is outside 0 to 1")
        unknown = sorted(set(self.forced.values()) - set(self.arms))
        if unknown:
            raise ValueError(f"{self.name}: forced arm {', '.join(unknown)} is not one of {', '.join(self.arms)}")
        # the seed's hash is the same for every user: its state is kept, and only the id is hashed per request
        object.__setattr__(self, "_state", fnv1a(self.seed or self.name))
        ranges = bucket_ranges(weights, self.coverage)
        object.__setattr__(self, "_ranges", [(arm, *r) for arm, r in zip(self.arms, ranges)])

    def assign(self, user_id: str) -> str | None:
        """The user's arm, or None for a user outside the experiment. ValueError if the id is empty."""
        if not user_id:
            raise ValueError("user id is empty")
        if self.forced and user_id in self.forced:
            return self.forced[user_id]
        if self.namespace is not None:
            place = namespace_bucket(self.namespace.name, user_id)
            if not self.namespace.start <= place < self.namespace.end:
                return None
        place = fnv1a(str(fnv1a(user_id, self._state))) % 10000 / 10000  # type: ignore[attr-defined]
        for arm, start, end in self._ranges:  # type: ignore[attr-defined]
            if start <= place < end:
                return arm
        return None


@dataclass(frozen=True)
class Assignment:
    """What a user gets: experiment and arm are empty for a user outside every experiment."""

    experiment: str = ""
    arm: str = ""
    forced: bool = False


OUTSIDE = Assignment()


def assign(splits: Iterable[Split], user_id: str) -> Assignment:
    """The first experiment, in the given order, that the user is inside of.

    Later experiments see only users whom the earlier ones left out: fair, since seeds differ
    (clients/ab/experiment/file.py checks it). Where each needs a fixed share of all users, give them disjoint ranges of
    one namespace.
    """
    for split in splits:
        arm = split.assign(user_id)
        if arm is not None:
            return Assignment(split.name, arm, user_id in split.forced)
    return OUTSIDE
