"""Rank one page within its deadline: by the arm's model, else by the default model, else in the incoming order.

rank_page() is the main path of the router.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from clients.ab.experiment.definition import Arm
from clients.ab.experiment.interleaving import AGREED, team_draft
from clients.ab.router.guarded_scorer import GuardedScorer
from clients.triton.scoring import ModelScores, PageTensors, ScoringFailure
from ranking.request_tensors import descending

# what `served_by` says where no single model made the order
INCOMING = "incoming"
INTERLEAVED = "interleaved"
KILLED = "killed"  # the reason of a fallback that a person asked for, beside those of ScoringFailure


class PageRefused(Exception):
    """The page itself is wrong, says the model that was to rank it."""


@dataclass(kw_only=True)
class DeadlineSettings:
    """How long a page may take.

    Args:
        deadline_ms: time for a page; whatever has not answered by then is not waited for
        arm_share: part of the deadline that the arm's own model may use; the rest is the fallback's
    """

    deadline_ms: float = 200.0
    arm_share: float = 0.6

    def __post_init__(self) -> None:
        if self.deadline_ms <= 0:
            raise ValueError(f"deadline_ms is {self.deadline_ms}: it must be above 0")
        if not 0 < self.arm_share < 1:
            raise ValueError(
                f"arm_share is {self.arm_share}: it must be between 0 and 1, or no time is left to fall back"
            )


@dataclass(frozen=True)
class PageRanking:
    """What is shown. order: indices of the incoming documents, best first.

    scores, probabilities, teams: in that order or empty; served_by: the model, INTERLEAVED or INCOMING; fallback: why
    the arm's model did not rank the page, empty if it did; arm_asked: False if the page had no time left to ask the
    arm's model, which therefore says nothing about the arm.
    """

    order: list[int]
    scores: list[float]
    served_by: str
    fallback: str = ""
    model_version: str = ""
    teams: list[str] = field(default_factory=list)
    arm_asked: bool = True
    probabilities: list[float] = field(default_factory=list)

    def at_least(self, probability: float) -> PageRanking:
        """The ranking without documents of a lower probability; unchanged where no probability is known."""
        if not self.probabilities:
            return self
        kept = [place for place, value in enumerate(self.probabilities) if value >= probability]
        return replace(
            self,
            order=[self.order[place] for place in kept],
            scores=[self.scores[place] for place in kept],
            teams=[self.teams[place] for place in kept] if self.teams else [],
            probabilities=[self.probabilities[place] for place in kept],
        )


async def rank_page(
    scorer: GuardedScorer,
    page: PageTensors,
    user: str,
    request_id: str,
    arm: Arm,
    default_model: str,
    deadline: DeadlineSettings,
    arrived: float,
) -> PageRanking:
    """Rank by the arm, else by the default model, else leave the incoming order. Never raises ScoringFailure.

    user: whose page it is, for the models' breakers; request_id: decides the coins of an interleaved page; arrived:
    time.perf_counter() when the request was there, from where the deadline counts. PageRefused if a model says that the
    page itself is wrong: no other model, and no order of the documents, is the answer to that.
    """

    def left_ms(share: float) -> float:
        return deadline.deadline_ms * share - (time.perf_counter() - arrived) * 1000

    failure, arm_asked = KILLED if arm.killed else "", True
    known: dict[str, ModelScores | ScoringFailure] = {}
    if not failure:
        only_default = arm.models == (default_model,)
        deadline_ms = left_ms(1.0 if only_default else deadline.arm_share)
        known = await _score_all(scorer, arm.models, page, deadline_ms, user)
        arm_asked = all(s.asked for s in known.values() if isinstance(s, ScoringFailure))
        failure = next((s.reason for s in known.values() if isinstance(s, ScoringFailure)), "")
        if not failure:
            return _ranking(request_id, arm, [s for s in known.values() if isinstance(s, ModelScores)])
    if default_model not in known:
        known |= await _score_all(scorer, (default_model,), page, left_ms(1.0), user)
    stand_in = known[default_model]
    if isinstance(stand_in, ModelScores):
        ranking = _ranking(request_id, Arm(arm.name, default_model), [stand_in], failure)
        return replace(ranking, arm_asked=arm_asked)
    return PageRanking(list(range(page.documents)), [], INCOMING, failure, arm_asked=arm_asked)


async def _score_all(
    scorer: GuardedScorer, models: Sequence[str], page: PageTensors, deadline_ms: float, user: str
) -> dict[str, ModelScores | ScoringFailure]:
    async def one(model: str) -> ModelScores | ScoringFailure:
        try:
            return await scorer.score(model, page, deadline_ms, user)
        except ScoringFailure as problem:
            if problem.callers_fault:
                raise PageRefused(f"{model}: {problem}") from problem
            return problem

    if len(models) == 1:  # the usual case needs no further task
        return {models[0]: await one(models[0])}
    return dict(zip(models, await asyncio.gather(*map(one, models))))


def _ranking(request_id: str, arm: Arm, scored: list[ModelScores], fallback: str = "") -> PageRanking:
    """The arm's ranking of a page that all its models have scored."""
    if not arm.interleave:
        order = descending(scored[0].values).tolist()
        return PageRanking(
            order,
            scored[0].values[order].tolist(),
            arm.model,
            fallback,
            scored[0].version,
            probabilities=_probabilities(scored, order, [0] * len(order)),
        )
    orders = [descending(scores.values).tolist() for scores in scored]
    order, teams = team_draft(orders[0], orders[1], request_id)
    return PageRanking(
        order,
        [float(scored[max(team, 0)].values[i]) for i, team in zip(order, teams)],
        INTERLEAVED,
        fallback,
        ",".join(f"{model}:{s.version}" for model, s in zip(arm.models, scored)),
        ["" if team == AGREED else arm.models[team] for team in teams],
        probabilities=_probabilities(scored, order, teams),
    )


def _probabilities(scored: list[ModelScores], order: list[int], teams: list[int]) -> list[float]:
    """Each document's probability by its own team's model, the first one's where both agreed.

    Empty unless all of these models give one.
    """
    given = [scores.probabilities for scores in scored]
    known = [values for values in given if values is not None]
    if len(known) < len(given):
        return []
    return [float(known[max(team, 0)][document]) for document, team in zip(order, teams)]
