"""The built-in world's taste, round by round: new intents appear, and words come to mean something else.

Documents stay as they are. From its round on, a head that nobody asked for is searched, or two heads have exchanged the
words that searchers type for them: whoever types "notebook" now wants what "hoover" had meant.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np

from training.world.lexicon import Lexicon
from training.world.queries import Corpus, Query


@dataclass(frozen=True)
class DriftSettings:
    """Which share of the world's heads drifts, and when. Round 0 is the world as it was when it was made.

    Args:
        new_intents: share of each domain's heads that nobody searches for before their round
        moved_meanings: share of each domain's heads that exchange their searchers' words with another head
        first_round: round in which the first of them drift
        last_round: round from which on all have drifted; the heads are dealt out evenly between the two
    """

    new_intents: float = 0.0
    moved_meanings: float = 0.0
    first_round: int = 2
    last_round: int = 4

    def __post_init__(self) -> None:
        for name in ("new_intents", "moved_meanings"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a share from 0 to 1 is needed")
        if self.new_intents + self.moved_meanings > 1:
            raise ValueError("new_intents and moved_meanings are shares of the same heads: more than 1 in all")
        if not 1 <= self.first_round <= self.last_round:
            raise ValueError(f"first_round {self.first_round}, last_round {self.last_round}: 1 <= first <= last")


@dataclass(frozen=True)
class Drift:
    """What drifts. arrival: head -> round from which people search for it; moved: (round, head, other head)."""

    arrival: dict[int, int]
    moved: tuple[tuple[int, int, int], ...]

    def searched(self, head: int, round_number: int) -> bool:
        """Whether people search for this head in a round."""
        return self.arrival.get(head, 0) <= round_number

    def exchanged(self, round_number: int) -> dict[int, int]:
        """Head -> the head whose words it has by a round; heads that kept their own are left out."""
        pairs = [(a, b) for when, a, b in self.moved if when <= round_number]
        return dict([*pairs, *((b, a) for a, b in pairs)])

    def lexicon(self, lexicon: Lexicon, round_number: int) -> Lexicon:
        """The world's lexicon with the searchers' words of a round. The documents' own words keep their meaning."""
        concepts = list(lexicon.concepts)
        for head, other in self.exchanged(round_number).items():
            own, theirs = lexicon.concepts[head], lexicon.concepts[other]
            concepts[head] = replace(own, typed=(own.typed[0], *theirs.typed[1:]))
        return replace(lexicon, concepts=tuple(concepts))


def draw_drift(lexicon: Lexicon, settings: DriftSettings, rng: np.random.Generator) -> Drift:
    """The heads that drift, domain by domain, and their rounds: the same for the same generator."""
    rounds = np.arange(settings.first_round, settings.last_round + 1)
    arrival: dict[int, int] = {}
    moved: list[tuple[int, int, int]] = []
    for domain in lexicon.domains:
        heads = rng.permutation([concept.number for concept in domain.heads]).tolist()
        new = round(settings.new_intents * len(heads))
        pairs = round(settings.moved_meanings * len(heads) / 2)
        for head in heads[:new]:
            arrival[head] = int(rounds[len(arrival) % len(rounds)])
        for place in range(pairs):
            first, second = heads[new + 2 * place : new + 2 * place + 2]
            moved.append((int(rounds[len(moved) % len(rounds)]), first, second))
    return Drift(arrival, tuple(moved))


def corpus_of_round(corpus: Corpus, drift: Drift, round_number: int) -> Corpus:
    """The corpus as the searchers of a round see it."""
    return Corpus(drift.lexicon(corpus.lexicon, round_number), corpus.documents, drift.exchanged(round_number))


def candidates_of(corpus: Corpus, query: Query, count: int, seed: int) -> list[int]:
    """The documents that compete for a query, drawn anew only if its text or its intent is another."""
    return corpus.candidates(query, count, random.Random(f"{seed} {query.text} {query.intent()}"))
