"""Interleaving: two rankings share one page, and clicks say whose documents users prefer.

Team draft (Radlinski, Kurup, Joachims, "How does clickthrough data reflect retrieval quality?", CIKM 2008, algorithm
2): like two captains picking a team, the two rankings take turns, a coin decides who goes first in each round, and each
takes its best document that is not on the page yet. Each user compares both rankings on one page, so far fewer users
are needed than in an A/B test.

A document that both rankings want next says nothing about which is better, and a coin that gave it to one of them would
only add noise to the comparison. It goes on the page for neither team, and only pairs of different documents compete:
Airbnb's competitive pairs (Zhang et al., "Harnessing the Power of Interleaving and Counterfactual Evaluation for Airbnb
Search Ranking", KDD 2025). The coin of each competing pair decides which document stands higher, so that position
favours neither.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

AGREED = -1  # the team of a document that both rankings wanted next


def team_draft(
    first: Sequence[int], second: Sequence[int], seed: str, credit_agreed: bool = False
) -> tuple[list[int], list[int]]:
    """Interleave two rankings of the same documents.

    first, second: permutations of 0..n-1, best first; seed: decides the coins, e.g. the request id, so that a page can
    be made again; credit_agreed: give documents that both want next to the captain, as plain team draft does. Returns
    (order, teams): the n documents in page order, and for each 0 or 1, the ranking that put it there, or AGREED.
    """
    if sorted(first) != list(range(len(first))) or sorted(second) != sorted(first):
        raise ValueError("team_draft needs two permutations of the same documents")
    coin = random.Random(seed)
    rankings, next_place = (first, second), [0, 0]
    taken: set[int] = set()
    order: list[int] = []
    teams: list[int] = []

    def wanted(team: int) -> int:
        while rankings[team][next_place[team]] in taken:
            next_place[team] += 1
        return rankings[team][next_place[team]]

    def take(document: int, team: int) -> None:
        taken.add(document)
        order.append(document)
        teams.append(team)

    while len(order) < len(first):
        if not credit_agreed and wanted(0) == wanted(1):
            take(wanted(0), AGREED)
            continue
        captain = coin.getrandbits(1)
        for team in (captain, 1 - captain):
            if len(order) < len(first):
                take(wanted(team), team)
    return order, teams
