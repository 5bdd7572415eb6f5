"""The experiment file: YAML, validated as a whole, taken up again when it changes. A bad edit keeps the old one.

ExperimentFile.reload is what the router calls every second; parse is what it rests on.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from clients.ab.experiment.definition import Arm, Experiment, Experiments, Guardrails
from clients.ab.experiment.split import Namespace
from ranking.errors import InputError
from ranking.files import stamp

logger = logging.getLogger("ab_experiment_file")


class ExperimentFile:
    """An experiment file that is taken up again when it changes.

    current: the experiments in force; error: why the last edit was refused, empty if it was not. InputError at
    construction if the file is bad: a router does not start on a file it cannot read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._seen = self._changing = stamp(self.path)
        self.current = parse(self._read(), self.path)
        self.error = ""

    def reload(self) -> bool:
        """Take up the file if it changed. True if the experiments in force are new ones.

        A change is taken up at the second look that finds it the same: the first may have met a half-written file.
        """
        found = stamp(self.path)
        if found == self._seen:
            return False
        if found != self._changing:
            self._changing = found
            return False
        self._seen = found
        try:
            new = parse(self._read(), self.path)
        except Exception as problem:  # an edit must never be lost without a word, whatever the parser makes of it
            known = isinstance(problem, InputError)
            self.error = str(problem) if known else f"{self.path}: {type(problem).__name__}: {problem}"
            logger.error("%s; the experiments in force stay as they were", self.error)
            return False
        changed = new != self.current or [e.fingerprint for e in new.experiments] != [
            e.fingerprint for e in self.current.experiments
        ]
        self.current, self.error = new, ""
        if changed:
            logger.info("%s: taken up, %d experiments", self.path, len(new.experiments))
        return changed

    def _read(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise InputError(f"{self.path}: cannot be read: {problem}") from problem


def parse(text: str, source: str | Path) -> Experiments:
    """An experiment file's content. InputError names the experiment, the field and the reason."""
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:  # ValueError: an impossible date
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise InputError(f"{source}: not YAML: {reason}; put text that looks like a date in quotes") from problem
    top = _mapping(content, str(source), {"default_model", "kill_switch", "experiments"})
    default_model = _text(top.get("default_model"), f"{source}: default_model")
    listed = top.get("experiments") or []
    if not isinstance(listed, list):
        raise InputError(f"{source}: experiments is not a list")
    experiments = [_experiment(entry, f"{source}: experiments[{i}]") for i, entry in enumerate(listed)]
    _check_together(experiments, source)
    return Experiments(
        default_model, tuple(experiments), _flag(top.get("kill_switch", False), f"{source}: kill_switch")
    )


def _experiment(entry: Any, where: str) -> Experiment:
    if isinstance(entry, dict) and isinstance(entry.get("name"), str):
        where = f"{where} ({entry['name']})"
    known = {f.name for f in fields(Experiment)} - {"split", "fingerprint"}
    given = _mapping(entry, where, known)
    values: dict[str, Any] = {"name": _text(given.get("name"), f"{where}: name")}
    arms = given.get("arms")
    if not isinstance(arms, list) or not arms:
        raise InputError(f"{where}: arms is not a list of one or more arms")
    values["arms"] = tuple(_arm(arm, f"{where}: arms[{i}]") for i, arm in enumerate(arms))
    names = [arm.name for arm in values["arms"]]
    weights = [arm.weight for arm in values["arms"]]
    if any(w is None for w in weights) and any(w is not None for w in weights):
        raise InputError(f"{where}: some arms have a weight and some have none; give all or none")
    values["control"] = _text(given.get("control", names[0]), f"{where}: control")
    if values["control"] not in names:
        raise InputError(f"{where}: control {values['control']!r} is not one of the arms {', '.join(names)}")
    if "seed" in given:
        values["seed"] = _text(given["seed"], f"{where}: seed")
    for name in ("coverage", "shadow"):
        if name in given:
            values[name] = _number(given[name], f"{where}: {name}", 0, 1)
    if "enabled" in given:
        values["enabled"] = _flag(given["enabled"], f"{where}: enabled")
    if given.get("namespace") is not None:
        values["namespace"] = _namespace(given["namespace"], f"{where}: namespace")
    if given.get("forced"):
        forced = given["forced"]
        if not isinstance(forced, dict):
            raise InputError(f"{where}: forced is not a mapping of user id to arm")
        values["forced"] = {
            _text(user, f"{where}: forced, user id"): _text(arm, f"{where}: forced[{user}]")
            for user, arm in forced.items()
        }
    if given.get("guardrails") is not None:
        values["guardrails"] = _guardrails(given["guardrails"], f"{where}: guardrails")
    try:
        return Experiment(**values)
    except ValueError as problem:
        raise InputError(f"{where}: {problem}") from problem


def _arm(entry: Any, where: str) -> Arm:
    given = _mapping(entry, where, {f.name for f in fields(Arm)})
    name = _text(given.get("name"), f"{where}: name")
    if ("model" in given) == ("interleave" in given):
        raise InputError(f"{where} ({name}): give either model or interleave")
    models = given.get("interleave", [])
    if "interleave" in given and (not isinstance(models, list) or len(models) != 2 or len(set(map(str, models))) != 2):
        raise InputError(f"{where} ({name}): interleave needs two different models")
    return Arm(
        name,
        _text(given["model"], f"{where}: model") if "model" in given else "",
        tuple(_text(model, f"{where}: interleave") for model in models),
        _number(given["weight"], f"{where}: weight", 0, 1) if given.get("weight") is not None else None,
        _flag(given.get("killed", False), f"{where}: killed"),
    )


def _namespace(entry: Any, where: str) -> Namespace:
    given = _mapping(entry, where, {"name", "range"})
    ends = given.get("range")
    if not isinstance(ends, list) or len(ends) != 2:
        raise InputError(f"{where}: range is not a list of two numbers")
    low, high = (_number(end, f"{where}: range", 0, 1) for end in ends)
    try:
        return Namespace(_text(given.get("name"), f"{where}: name"), low, high)
    except ValueError as problem:
        raise InputError(f"{where}: {problem}") from problem


_GUARDRAIL_RANGES = {
    "max_error_share": (0.0, 1.0),
    "max_p99_ms": (0.0, 1e9),
    "window_seconds": (0.1, 86400.0),
    "min_pages": (1, 1 << 30),
    "ramp_factor": (0.0, 0.99),
    "min_coverage": (0.0, 1.0),
}


def _guardrails(entry: Any, where: str) -> Guardrails:
    given = _mapping(entry, where, set(_GUARDRAIL_RANGES))
    return Guardrails(**{k: _number(v, f"{where}: {k}", *_GUARDRAIL_RANGES[k]) for k, v in given.items()})  # type: ignore[arg-type]


def _check_together(experiments: list[Experiment], source: str | Path) -> None:
    """What only shows across experiments: names, seeds, and overlaps within one namespace."""
    for i, one in enumerate(experiments):
        for other in experiments[:i]:
            if one.name == other.name:
                raise InputError(f"{source}: two experiments are called {one.name}")
            if (one.seed or one.name) == (other.seed or other.name):
                raise InputError(
                    f"{source}: {other.name} and {one.name} have the same seed: they would divide users the same way"
                )
            a, b = one.namespace, other.namespace
            if a is None or b is None or a.name != b.name or not (one.enabled and other.enabled):
                continue
            if a.start < b.end and b.start < a.end:
                ranges = f"{other.name} [{b.start}, {b.end}) and {one.name} [{a.start}, {a.end})"
                raise InputError(f"{source}: {ranges} overlap in namespace {a.name}")


def _mapping(value: Any, where: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: a mapping is expected, not {type(value).__name__}")
    unknown = sorted(str(key) for key in value if key not in known)
    if unknown:
        raise InputError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return value


def _text(value: Any, where: str) -> str:
    # YAML reads 007 or yes as something else than text; an id must not change on the way
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: text is expected, not {value!r}; put it in quotes if it looks like a number")
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{where}: true or false is expected, not {value!r}")
    return value


def _number(value: Any, where: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(f"{where}: a number from {low:g} to {high:g} is expected, not {value!r}")
    return value
