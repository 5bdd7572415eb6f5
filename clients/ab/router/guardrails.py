"""Guardrails: an experiment whose arm fails or is slow loses coverage by itself, and says so.

Only arms other than the control are judged. Coverage shrinks for all arms alike, so shares stay balanced and nobody
changes arm. A ramp-down outlives a restart (ramp.json beside the log) and ends when the experiment's definition is
edited. It belongs to that definition, so that it is back in force with it: a file that for a moment lacked the
experiment must not restore full traffic. Several routers may share the folder: each judges its own pages, the file
holds what all of them found.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from clients.ab.experiment.definition import Experiment, ramped
from clients.ab.experiment.split import Split
from ranking.errors import InputError
from ranking.files import write_json

logger = logging.getLogger("ab_guardrails")

STATE = "ramp.json"
LOCK = ".ramp.lock"  # beside it: held while one router reads, merges and replaces it
KEPT_SECONDS = 7 * 86_400.0  # a ramp-down whose definition was out of force for longer is forgotten
RENEWED_SECONDS = 86_400.0  # so often the file is told what is still in force, or another router would forget it


@dataclass(frozen=True)
class Ramp:
    """One ramp-down. fingerprint: the definition it belongs to; in_force: seconds since 1970 when it last was."""

    experiment: str
    arm: str
    reason: str
    before: float
    after: float
    fingerprint: str
    in_force: float = 0.0


def covering_value(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, int(-(-share * len(ordered) // 1)) - 1))]


class GuardrailWatch:
    """Watches pages as they are served and keeps the ramped-down splits.

    ramps: experiment name -> its ramp-down in force; splits: the same name -> split at lowered coverage, for
    Experiments.assign; folder: where ramp.json lives; clock: monotonic seconds; calendar: seconds since 1970.
    InputError if ramp.json is there but cannot be read: full traffic must not come back by accident.
    """

    def __init__(
        self, folder: Path, clock: Callable[[], float] = time.monotonic, calendar: Callable[[], float] = time.time
    ):
        self._path, self._clock, self._calendar = folder / STATE, clock, calendar
        self._saved, self._unsaved = calendar(), ""  # when; what keeps the file from being written
        self._pages: dict[tuple[str, str], deque[tuple[float, float, bool]]] = {}
        self.ramps: dict[str, Ramp] = {}
        self.splits: dict[str, Split] = {}
        self._kept = self._read()  # by fingerprint, in force or not

    def adopt(self, experiments: tuple[Experiment, ...]) -> None:
        """Apply what is known to the experiments in force; ramps of edited definitions end.

        They are kept for KEPT_SECONDS, in case that the definition comes back.
        """
        now, before = self._calendar(), self.ramps
        in_force = {e.name: self._kept[e.fingerprint] for e in experiments if e.fingerprint in self._kept}
        for name in before.keys() - in_force.keys():
            logger.info("%s was edited or is gone: its ramp-down ends", name)
            for key in [key for key in self._pages if key[0] == name]:
                del self._pages[key]
        for ramp in (*before.values(), *in_force.values()):
            self._kept[ramp.fingerprint] = replace(ramp, in_force=now)
        self._kept = _not_forgotten(self._kept, now)
        self.ramps = {name: self._kept[ramp.fingerprint] for name, ramp in in_force.items()}
        if before.keys() != self.ramps.keys():
            self._save()
        self.splits = {e.name: ramped(e, self.ramps[e.name].after) for e in experiments if e.name in self.ramps}

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
        if fresh or self._unsaved or (self.ramps and self._calendar() - self._saved > RENEWED_SECONDS):
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
            experiment.name,
            arm,
            reason,
            before,
            after if after >= rails.min_coverage else 0.0,
            experiment.fingerprint,
            self._calendar(),
        )
        logger.error("%s/%s: %s; coverage goes from %g to %g", ramp.experiment, arm, reason, before, ramp.after)
        self.ramps[experiment.name] = self._kept[ramp.fingerprint] = ramp
        self.splits[experiment.name] = ramped(experiment, ramp.after)
        for other in experiment.arms:  # the next decision rests on pages served after this one
            self._pages.pop((experiment.name, other.name), None)
        return ramp

    def _save(self) -> None:
        """Put the ramp-downs known here into the file, beside those of other routers. Tried again if it fails."""
        now = self._calendar()
        for name, ramp in self.ramps.items():
            self.ramps[name] = self._kept[ramp.fingerprint] = replace(ramp, in_force=now)
        try:
            with _locked(self._path.with_name(LOCK)):
                merged = _merged(_not_forgotten(self._read(), now), self._kept)
                write_json(self._path, {fingerprint: asdict(ramp) for fingerprint, ramp in merged.items()})
        except (OSError, InputError) as problem:  # the ramp holds in this process; only a restart would forget it
            if str(problem) != self._unsaved:
                logger.error("%s: cannot be written: %s", self._path, problem)
            self._unsaved = str(problem) or type(problem).__name__
        else:
            self._saved, self._unsaved = now, ""

    def _read(self) -> dict[str, Ramp]:
        """The file's ramp-downs by fingerprint, none if there is no file. InputError if it cannot be read."""
        try:
            ramps = [Ramp(**r) for r in json.loads(self._path.read_text(encoding="utf-8")).values()]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as problem:
            raise InputError(
                f"{self._path}: cannot be read ({problem}); repair it, or remove it to go back to full coverage"
            ) from problem
        return {ramp.fingerprint: ramp for ramp in ramps}


def _merged(found: dict[str, Ramp], own: dict[str, Ramp]) -> dict[str, Ramp]:
    """All ramp-downs of two routers; of one definition's the one that leaves less coverage."""
    merged = dict(found)
    for fingerprint, ramp in own.items():
        other = found.get(fingerprint, ramp)
        lower = other if other.after < ramp.after else ramp
        merged[fingerprint] = replace(lower, in_force=max(other.in_force, ramp.in_force))
    return merged


def _not_forgotten(ramps: dict[str, Ramp], now: float) -> dict[str, Ramp]:
    return {f: ramp for f, ramp in ramps.items() if now - ramp.in_force <= KEPT_SECONDS}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file's lock. OSError if another process has it: waiting for it would hold up the answers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o640)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            raise OSError(f"another router holds {path.name}; tried again at the next look") from problem
        yield
    finally:
        os.close(descriptor)
