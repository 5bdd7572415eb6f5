"""Scores from Triton for the router: each model behind its own circuit breaker, each call timed and counted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from clients.ab.router.breaker import Breaker
from clients.triton.scoring import ModelScores, PageTensors, ScoringBackend, ScoringFailure

logger = logging.getLogger("ab_router")


_LEAST_MS = 1.0  # a call with less time is not made: no model answers in it


class GuardedScorer:
    """Asks models of one Triton server for scores.

    new_breaker: makes the breaker of a model that is asked for the first time; observe: called with (model, seconds,
    reason of the failure or "") after every call; `refused` where the page itself was wrong, `cancelled` at the end.
    """

    def __init__(
        self,
        client: ScoringBackend,
        new_breaker: Callable[[], Breaker],
        observe: Callable[[str, float, str], None],
    ):
        self._client, self._new_breaker, self._observe = client, new_breaker, observe
        self.breakers: dict[str, Breaker] = {}

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()

    async def score(self, model: str, page: PageTensors, deadline_ms: float, user: str | None) -> ModelScores:
        """Scores of a page by a model. ScoringFailure says why there are none; `breaker_open` is one of the reasons.

        user: whose page it is. The model's breaker is heeded and fed; not so with None: a shadow call is nobody's page.
        """
        if deadline_ms < _LEAST_MS:  # says nothing about the model, so its breaker does not hear of it
            raise ScoringFailure("timeout", "no time left", asked=False)
        breaker = self.breakers.get(model)
        if breaker is None:
            breaker = self.breakers[model] = self._new_breaker()
        probe = breaker.is_open  # whoever is admitted then is alone in being so
        if user is not None and not breaker.admits(user):
            raise ScoringFailure("breaker_open", f"{model} failed too often and is left alone for a moment")
        started, failure, tells = time.perf_counter(), "error", True
        try:
            scores = await self._client.score(model, page, deadline_ms)
            failure = ""
            return scores
        except ScoringFailure as problem:
            tells = not problem.callers_fault  # else the page is wrong
            failure = problem.reason if tells else "refused"
            raise
        except asyncio.CancelledError:
            tells, failure = False, "cancelled"
            raise
        finally:  # also when the task is cancelled: a probe must not stay out for ever
            if user is not None:
                was_open = breaker.is_open
                if tells:
                    breaker.report(user, not failure, probe)
                else:
                    breaker.withdraw(probe)
                if breaker.is_open != was_open:
                    logger.warning("breaker of %s %s", model, "opened" if breaker.is_open else "closed")
            self._observe(model, time.perf_counter() - started, failure)
