"""What an experiment is: arms with their models, shares, coverage, guardrails.

clients/ab/experiment/file.py reads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace

from clients.ab.experiment.split import OUTSIDE, Assignment, Namespace, Split


@dataclass(frozen=True)
class Arm:
    """One arm: either `model` ranks, or the rankings of the two models in `interleave` share the page.

    Args:
        name: as it is logged
        model: Triton model that ranks
        interleave: two models whose rankings are interleaved by team draft
        weight: share of the experiment's users; equal shares if no arm names one
        killed: true sends the arm's pages to the default model; users keep the arm, pages are logged as `killed`
    """

    name: str
    model: str = ""
    interleave: tuple[str, ...] = ()
    weight: float | None = None
    killed: bool = False

    @property
    def models(self) -> tuple[str, ...]:
        """The models that rank for this arm: one, or the two that are interleaved."""
        return self.interleave or (self.model,)


@dataclass(frozen=True)
class Guardrails:
    """When an experiment is ramped down by itself. The pages of the user who met most failures are left out.

    Args:
        max_error_share: fallbacks per page of an arm
        max_p99_ms: 99th percentile of an arm's page latency
        window_seconds: pages of this long are looked at
        min_pages: no decision on fewer pages
        ramp_factor: what coverage is multiplied with at each breach
        min_coverage: below this, coverage becomes 0
    """

    max_error_share: float = 0.05
    max_p99_ms: float = 1000.0
    window_seconds: float = 60.0
    min_pages: int = 200
    ramp_factor: float = 0.5
    min_coverage: float = 0.01


@dataclass(frozen=True)
class Experiment:
    """One experiment. `fingerprint` names its definition in the log; a ramp-down belongs to one fingerprint."""

    name: str
    arms: tuple[Arm, ...]
    seed: str = ""
    coverage: float = 1.0
    control: str = ""
    enabled: bool = True
    namespace: Namespace | None = None
    forced: Mapping[str, str] = field(default_factory=dict)
    shadow: float = 0.0
    guardrails: Guardrails | None = None
    split: Split = field(init=False, repr=False, compare=False)
    fingerprint: str = field(init=False, compare=False)

    def __post_init__(self):
        named = [arm.weight for arm in self.arms]
        weights = None if all(w is None for w in named) else [0.0 if w is None else w for w in named]
        split = Split(
            self.name, [a.name for a in self.arms], weights, self.seed, self.coverage, self.namespace, self.forced
        )
        object.__setattr__(self, "split", split)
        object.__setattr__(self, "fingerprint", hashlib.sha256(self.definition().encode()).hexdigest()[:12])

    def definition(self) -> str:
        """The definition as JSON, as it stands in the log."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("split", "fingerprint")}
        content["arms"] = [asdict(arm) for arm in self.arms]
        content["namespace"] = asdict(self.namespace) if self.namespace else None
        content["guardrails"] = asdict(self.guardrails) if self.guardrails else None
        return json.dumps(content, ensure_ascii=False, sort_keys=True)

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True)
class Experiments:
    """A whole file: the default model and the experiments in order."""

    default_model: str
    experiments: tuple[Experiment, ...] = ()
    kill_switch: bool = False

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that may be asked, the default model first."""
        named = [model for e in self.experiments if e.enabled for arm in e.arms for model in arm.models]
        return tuple(dict.fromkeys([self.default_model, *named]))

    def assign(
        self, user_id: str, coverage: Mapping[str, Split] | None = None
    ) -> tuple[Assignment, Experiment | None, Arm | None]:
        """The user's assignment with its experiment and arm. coverage: ramped-down splits, by experiment name."""
        if not self.kill_switch:
            for experiment in self.experiments:
                if not experiment.enabled:
                    continue
                split = (coverage or {}).get(experiment.name, experiment.split)
                name = split.assign(user_id)
                if name is not None:
                    return (
                        Assignment(experiment.name, name, user_id in split.forced),
                        experiment,
                        experiment.arm(name),
                    )
        return OUTSIDE, None, None


def ramped(experiment: Experiment, coverage: float) -> Split:
    """The experiment's split at a lower coverage: the same users keep the same arms, some are sent out."""
    return replace(experiment.split, coverage=coverage)
