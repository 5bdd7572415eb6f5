"""Guardrails: an experiment whose arm fails or is slow loses coverage by itself, and says so.

Only arms other than the control are judged, and no one user's pages bring a ramp-down about: an arm is in breach if it
is so without the user who met most of it, by the share of pages or by the mean over users. Coverage shrinks for all
arms alike, so shares stay balanced and nobody changes arm. A ramp-down outlives a restart (ramp.json beside the log)
and ends when the experiment's definition is edited. It belongs to that definition, so that it is back in force with it:
a file that for a moment lacked the experiment must not restore full traffic. Several routers may share the folder: each
judges its own pages, the file holds what all of them found, and each takes the others' ramp-downs over.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from clients.ab.experiment.definition import Experiment, Guardrails, ramped
from clients.ab.experiment.split import Split
from ranking.errors import InputError
from ranking.files import write_json

logger = logging.getLogger("ab_guardrails")

STATE = "ramp.json"
LOCK = ".ramp.lock"  # beside it: held while one router reads, merges and replaces it
KEPT_SECONDS = 7 * 86_400.0  # a ramp-down whose definition was out of force for longer is forgotten
RENEWED_SECONDS = 86_400.0  # so often the file is told what is still in force, or another router would forget it
_SLOW_SHARE = 0.01  # of the pages may be slower than the limit of the 99th percentile


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


class _Window:
    """The pages of one arm within the last seconds, counted by user while they come and go: judging reads counts."""

    def __init__(self, rails: Guardrails):
        self._rails = rails
        self._pages: deque[tuple[float, str, float, bool]] = deque()  # when, user, milliseconds, whether it fell back
        self._of_user: Counter[str] = Counter()
        self._fell_back: Counter[str] = Counter()
        self._slow: Counter[str] = Counter()

    def add(self, when: float, user: str, ms: float, fell_back: bool) -> None:
        """A page that was answered just now."""
        self._pages.append((when, user, ms, fell_back))
        self._count(user, ms, fell_back, 1)

    def breach(self, now: float) -> str:
        """Why the arm is to be ramped down; empty if it is not."""
        rails = self._rails
        while self._pages and self._pages[0][0] < now - rails.window_seconds:
            _, user, ms, fell_back = self._pages.popleft()
            self._count(user, ms, fell_back, -1)
        allowed = rails.max_error_share
        by_page, by_user, left_out = self._shares(self._fell_back, allowed)
        if by_page > allowed:
            pages = len(self._pages) - self._of_user[left_out]
            return f"{by_page:.1%} of {pages} pages fell back, {allowed:.1%} are allowed"
        if by_user > allowed:
            users = len(self._of_user) - 1
            return f"of {users} users' pages {by_user:.1%} fell back on average, {allowed:.1%} are allowed"
        by_page, by_user, left_out = self._shares(self._slow, _SLOW_SHARE)
        if by_page > _SLOW_SHARE:
            latencies = [ms for _, user, ms, _ in self._pages if user != left_out]
            p99 = covering_value(latencies, 1 - _SLOW_SHARE)
            return f"p99 of {len(latencies)} pages is {p99:.0f} ms, {rails.max_p99_ms:.0f} ms are allowed"
        if by_user > _SLOW_SHARE:
            users = len(self._of_user) - 1
            slow = f"{by_user:.1%} took over {rails.max_p99_ms:.0f} ms on average"
            return f"of {users} users' pages {slow}, {_SLOW_SHARE:.1%} are allowed"
        return ""

    def _shares(self, met: Counter[str], allowed: float) -> tuple[float, float, str]:
        """(share of pages that met something, the mean of each user's share, the user who is left out of both).

        By pages, many users with a page each do not hide what the others meet; by users, one with thousands of pages
        does not. met: pages that met it by user. The user who met most is left out; a share is 0 where too few pages,
        or too few users to tell one from `allowed`, are left.
        """
        if not met:
            return 0.0, 0.0, ""
        worst = max(met, key=met.__getitem__)
        pages, users = len(self._pages) - self._of_user[worst], len(self._of_user) - 1
        if pages < max(1, self._rails.min_pages):
            return 0.0, 0.0, worst
        by_page = (met.total() - met[worst]) / pages
        if users < max(self._rails.min_pages / 10, 1 / allowed if allowed else 1):
            return by_page, 0.0, worst
        return by_page, sum(n / self._of_user[user] for user, n in met.items() if user != worst) / users, worst

    def _count(self, user: str, ms: float, fell_back: bool, change: int) -> None:
        for counts, counted in (
            (self._of_user, True), (self._fell_back, fell_back), (self._slow, ms > self._rails.max_p99_ms)
        ):  # fmt: skip
            if counted:
                counts[user] += change
                if not counts[user]:
                    del counts[user]


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
        self._stamp: tuple[int, int, int] | None = None  # of the file as it was last read
        self._windows: dict[tuple[str, str], _Window] = {}  # by the definition's fingerprint and the arm
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
        for ramp in (*before.values(), *in_force.values()):
            self._kept[ramp.fingerprint] = replace(ramp, in_force=now)
        self._kept = _not_forgotten(self._kept, now)
        self.ramps = {name: self._kept[ramp.fingerprint] for name, ramp in in_force.items()}
        judged = {e.fingerprint for e in experiments}
        self._windows = {key: window for key, window in self._windows.items() if key[0] in judged}
        if before.keys() != self.ramps.keys():
            self._save()
        self.splits = {e.name: ramped(e, self.ramps[e.name].after) for e in experiments if e.name in self.ramps}

    def observe(self, experiment: Experiment, arm: str, user: str, seconds: float, fell_back: bool) -> None:
        """One page of an experiment. Cheap: called for every answer."""
        if experiment.guardrails is None or arm == experiment.control:
            return
        window = self._windows.get((experiment.fingerprint, arm))
        if window is None:
            window = self._windows[experiment.fingerprint, arm] = _Window(experiment.guardrails)
        window.add(self._clock(), user, seconds * 1000, fell_back)

    def judge(self, experiments: tuple[Experiment, ...]) -> list[Ramp]:
        """Look at every window; lower the coverage of experiments in breach. Returns the new ramp-downs of this router.

        Those that other routers put into the file meanwhile are in force afterwards too.
        """
        self._take_over(experiments)
        fresh = []
        for experiment in experiments:
            for arm in experiment.arms:
                window = self._windows.get((experiment.fingerprint, arm.name))
                reason = window.breach(self._clock()) if window else ""
                if reason:
                    fresh.append(self._ramp_down(experiment, arm.name, reason))
        if fresh or self._unsaved or (self.ramps and self._calendar() - self._saved > RENEWED_SECONDS):
            self._save()
        return fresh

    def _take_over(self, experiments: tuple[Experiment, ...]) -> None:
        """Apply what other routers put into the file since it was last read."""
        try:
            state = self._path.stat()
            stamp = (state.st_ino, state.st_mtime_ns, state.st_size)
            if stamp == self._stamp:
                return
            self._stamp = stamp  # first: what cannot be read is told once
            self._kept = _merged(_not_forgotten(self._read(), self._calendar()), self._kept)
        except FileNotFoundError:
            return
        except (OSError, InputError) as problem:
            logger.error("ramp-downs of other routers are not taken over: %s", problem)
            return
        for experiment in experiments:
            known, own = self._kept.get(experiment.fingerprint), self.ramps.get(experiment.name)
            if known is not None and known.after < (own.after if own else experiment.coverage):
                logger.error("%s: another router found: %s; coverage is %g", experiment.name, known.reason, known.after)
                self._put_in_force(experiment, known)

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
        self._put_in_force(experiment, ramp)
        return ramp

    def _put_in_force(self, experiment: Experiment, ramp: Ramp) -> None:
        self.ramps[experiment.name] = self._kept[ramp.fingerprint] = ramp
        self.splits[experiment.name] = ramped(experiment, ramp.after)
        for arm in experiment.arms:  # the next decision rests on pages served after this one
            self._windows.pop((experiment.fingerprint, arm.name), None)

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
            for ramp in ramps:
                if not isinstance(ramp.fingerprint, str) or not 0 <= ramp.after <= 1 or not ramp.in_force >= 0:
                    raise ValueError(f"the ramp-down of {ramp.experiment!r} makes no sense")
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
