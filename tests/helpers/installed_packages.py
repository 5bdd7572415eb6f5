"""Runs programs as an image would that installs some distributions only: all others are hidden."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def with_all_needs(requirements: Iterable[str]) -> set[str]:
    """Distributions that these requirements bring, with all that they need, as this interpreter has them."""
    wanted = [Requirement(text) for text in requirements]
    found: set[str] = set()
    while wanted:
        needed = wanted.pop()
        name = canonicalize_name(needed.name)
        extras = needed.extras or {""}
        if name in found and not needed.extras:
            continue
        found.add(name)
        for text in metadata.requires(name) or []:
            further = Requirement(text)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                wanted.append(further)
    return found


def hide_all_but(packages: set[str], folder: Path) -> None:
    """Write a sitecustomize.py into folder: with it on PYTHONPATH, of what is installed only `packages` are found."""
    owners = metadata.packages_distributions()
    known = {module for module, owned in owners.items() if packages & {canonicalize_name(name) for name in owned}}
    ours = {module for module, owned in owners.items() if "disranker" in owned}
    hidden = sorted(set(owners) - known - ours)
    (folder / "sitecustomize.py").write_text(
        f"import sys\nfrom importlib.machinery import PathFinder\nhidden = set({hidden!r})\n"
        "class Known:\n    find_distributions = staticmethod(PathFinder.find_distributions)\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        absent = name.partition('.')[0] in hidden\n"
        "        return None if absent else PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not PathFinder] + [Known()]\n"
    )
