"""The settings that the programs of build/ share: the Triton model repository and the names of models in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class RepositorySettings:
    """Which Triton model repository a program works on.

    Args:
        repository: Triton model repository; made if absent
    """

    repository: Path = Path("model_repository")


@dataclass(kw_only=True)
class PublicationSettings(RepositorySettings):
    """Where a new version goes and whether it serves.

    Args:
        promote: serve the new version at the next start or load; --no-promote only adds it (build/releases.py)
    """

    promote: bool = True


def check_model_name(name: str) -> None:
    """ValueError unless an arm or a teacher may have this name: letters, digits, - and _, not that of a network."""
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"name {name!r}: letters, digits, - and _ only")
    if name.endswith(("_encoder", "_first")):  # student_first's network would be that of the cascade student
        raise ValueError(f"name {name!r}: it ends in _encoder or _first, as names of arms' networks do: choose another")
