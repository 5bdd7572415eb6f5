"""Team-draft interleaving: two rankings share one page, and clicks say whose documents users prefer.

Radlinski, Kurup, Joachims, "How does clickthrough data reflect retrieval quality?" (CIKM 2008), algorithm 2: like two
captains picking a team, the two rankings take turns, a coin decides who goes first in each round, and each takes its
best document that is not on the page yet. Each user compares both rankings on one page, so far fewer users are needed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def team_draft(first: Sequence[int], second: Sequence[int], seed: str) -> tuple[list[int], list[int]]:
    """Interleave two rankings of the same documents.

    first, second: permutations of 0..n-1, best first; seed: decides the coins, e.g. the request id, so that a page can
    be made again. Returns (order, teams): the n documents in page order, and for each 0 or 1, the ranking that put it
    there.
    """
    if sorted(first) != list(range(len(first))) or sorted(second) != sorted(first):
        raise ValueError("team_draft needs two permutations of the same documents")
    coin = random.Random(seed)
    rankings, next_place = (first, second), [0, 0]
    taken: set[int] = set()
    order: list[int] = []
    teams: list[int] = []
    while len(order) < len(first):
        captain = coin.getrandbits(1)
        for team in (captain, 1 - captain):
            if len(order) == len(first):
                break
            ranking = rankings[team]
            while ranking[next_place[team]] in taken:
                next_place[team] += 1
            document = ranking[next_place[team]]
            taken.add(document)
            order.append(document)
            teams.append(team)
    return order, teams
