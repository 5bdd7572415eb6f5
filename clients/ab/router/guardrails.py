"""Guardrails: an experiment whose arm fails or is slow loses coverage by itself, and says so.

Only arms other than the control are judged. Coverage shrinks for all arms alike, so shares stay balanced and nobody
changes arm. A ramp-down outlives a restart (ramp.json beside the log) and ends when the experiment's definition is
edited.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from clients.ab.experiment.definition import Experiment, ramped
from clients.ab.experiment.split import Split
from ranking.errors import InputError
from ranking.files import write_json

logger = logging.getLogger("ab_guardrails")

STATE = "ramp.json"


@dataclass(frozen=True)
class Ramp:
    """One ramp-down. fingerprint: the definition it belongs to."""

    experiment: str
    arm: str
    reason: str
    before: float
    after: float
    fingerprint: str


def covering_value(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, int(-(-share * len(ordered) // 1)) - 1))]


class GuardrailWatch:
    """Watches pages as they are served and keeps the ramped-down splits.

    splits: experiment name -> split at lowered coverage, for Experiments.assign; folder: where ramp.json lives.
    InputError if ramp.json is there but cannot be read: full traffic must not come back by accident.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic):
        self._path, self._clock = folder / STATE, clock
        self._pages: dict[tuple[str, str], deque[tuple[float, float, bool]]] = {}
        self.ramps: dict[str, Ramp] = {}
        self.splits: dict[str, Split] = {}
        if self._path.is_file():
            try:
                self.ramps = {name: Ramp(**r) for name, r in json.loads(self._path.read_text(encoding="utf-8")).items()}
            except (OSError, ValueError, TypeError, AttributeError) as problem:
                raise InputError(
                    f"{self._path}: cannot be read ({problem}); repair it, or remove it to go back to full coverage"
                ) from problem

    def adopt(self, experiments: tuple[Experiment, ...]) -> None:
        """Apply what is known to the experiments in force; ramps of edited definitions end."""
        by_name = {e.name: e for e in experiments}
        kept = {n: r for n, r in self.ramps.items() if n in by_name and by_name[n].fingerprint == r.fingerprint}
        for name in self.ramps.keys() - kept.keys():
            logger.info("%s was edited: its ramp-down ends", name)
            for key in [key for key in self._pages if key[0] == name]:
                del self._pages[key]
        if kept != self.ramps:
            self.ramps = kept
            self._save()
        self.splits = {name: ramped(by_name[name], r.after) for name, r in self.ramps.items()}

    def observe(self, experiment: Experiment, arm: str, seconds: float, fell_back: bool) -> None:
        """One page of an experiment. Cheap: called for every answer."""
        if experiment.guardrails and arm != experiment.control:
            pages = self._pages.setdefault((experiment.name, arm), deque())
            pages.append((self._clock(), seconds * 1000, fell_back))

    def judge(self, experiments: tuple[Experiment, ...]) -> list[Ramp]:
        """Look at every window; lower the coverage of experiments in breach. Returns the new ramp-downs."""
        fresh = []
        for experiment in experiments:
            for arm in experiment.arms:
                reason = self._breach(experiment, arm.name)
                if reason:
                    fresh.append(self._ramp_down(experiment, arm.name, reason))
        if fresh:
            self._save()
        return fresh

    def _breach(self, experiment: Experiment, arm: str) -> str:
        rails, pages = experiment.guardrails, self._pages.get((experiment.name, arm))
        if rails is None or pages is None:
            return ""
        horizon = self._clock() - rails.window_seconds
        while pages and pages[0][0] < horizon:
            pages.popleft()
        if len(pages) < rails.min_pages:
            return ""
        share = sum(fell_back for _, _, fell_back in pages) / len(pages)
        if share > rails.max_error_share:
            return f"{share:.1%} of {len(pages)} pages fell back, {rails.max_error_share:.1%} are allowed"
        p99 = covering_value([latency for _, latency, _ in pages], 0.99)
        if p99 > rails.max_p99_ms:
            return f"p99 of {len(pages)} pages is {p99:.0f} ms, {rails.max_p99_ms:.0f} ms are allowed"
        return ""

    def _ramp_down(self, experiment: Experiment, arm: str, reason: str) -> Ramp:
        rails = experiment.guardrails
        assert rails is not None
        known = self.ramps.get(experiment.name)
        before = known.after if known else experiment.coverage
        after = before * rails.ramp_factor
        ramp = Ramp(
            experiment.name, arm, reason, before, after if after >= rails.min_coverage else 0.0, experiment.fingerprint
        )
        logger.error("%s/%s: %s; coverage goes from %g to %g", ramp.experiment, arm, reason, before, ramp.after)
        self.ramps[experiment.name] = ramp
        self.splits[experiment.name] = ramped(experiment, ramp.after)
        for other in experiment.arms:  # the next decision rests on pages served after this one
            self._pages.pop((experiment.name, other.name), None)
        return ramp

    def _save(self) -> None:
        try:
            write_json(self._path, {n: asdict(r) for n, r in self.ramps.items()})
        except OSError as problem:  # the ramp holds in this process; only a restart would forget it
            logger.error("%s: cannot be written: %s", self._path, problem)
