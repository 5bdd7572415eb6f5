"""What the served models take: limits from their own configuration, so that a page too large is refused at the door."""

from __future__ import annotations

import time
from collections.abc import Iterable

from clients.ab.router.api import RankRequest
from clients.ab.router.page_ranking import PageRefused
from clients.triton.scoring import ScoringBackend, ScoringFailure
from ranking.limits import MAX_FIELD_BYTES, field_bytes

_FRESH_SECONDS = 30.0  # a model that was reloaded with other limits is noticed within this
_ASK_MS = 500.0


class ServedLimits:
    """The limits of each model that the server told of. A model that it told nothing of refuses pages itself."""

    def __init__(self, client: ScoringBackend):
        self._client = client
        self._known: dict[str, dict[str, int]] = {}
        self._asked: dict[str, float] = {}

    async def refresh(self, models: Iterable[str]) -> None:
        """Ask for the limits of models that are new or were asked for a while ago."""
        for model in models:
            if time.monotonic() - self._asked.get(model, float("-inf")) < _FRESH_SECONDS:
                continue
            try:
                self._known[model] = await self._client.served_limits(model, _ASK_MS)
                self._asked[model] = time.monotonic()
            except ScoringFailure:  # down or not loaded: its last known limits hold, and it is asked again soon
                continue

    def check(self, page: RankRequest, models: Iterable[str]) -> None:
        """PageRefused if the page is larger than one of the models serves."""
        for model in models:
            limits = self._known.get(model, {})
            most = limits.get("max_documents")
            if most is not None and len(page.documents) > most:
                raise PageRefused(f"documents: {len(page.documents)} are given, {model} serves {most}")
            longest = limits.get("max_field_bytes", MAX_FIELD_BYTES)
            if longest < MAX_FIELD_BYTES:
                self._check_fields(page, model, longest)

    @staticmethod
    def _check_fields(page: RankRequest, model: str, longest: int) -> None:
        fields = [("query", page.query)]
        for number, document in enumerate(page.documents):
            fields += [(f"documents[{number}].{name}", getattr(document, name)) for name in ("title", "summary")]
        for name, text in fields:
            if field_bytes(text) > longest:
                raise PageRefused(f"{name}: longer than {longest} bytes, which is what {model} reads")
