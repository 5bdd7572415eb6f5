"""Whether a program's packages are installed, read from its source before it is started.

A program that was started without one would end in a stack trace of its imports.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

OURS = {"ranking", "training", "build", "serving", "clients", "loadtest", "demo", "benchmarks", "disranker"}


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def missing_package(module: str, is_installed: Callable[[str], bool] = _is_installed) -> str | None:
    """The first package that a program imports when it starts, directly or through our modules, and that is not there.

    None if all are. is_installed: whether a package is there, by its name.
    """
    pending, seen = [module], {module}
    while pending:
        for name in _imports(pending.pop()):
            top = name.partition(".")[0]
            if top in OURS:
                if name not in seen:
                    seen.add(name)
                    pending.append(name)
            elif top not in sys.stdlib_module_names and not is_installed(top):
                return top
    return None


@functools.cache
def _imports(module: str) -> list[str]:
    """What a module of ours imports when it is imported; of `from a import b` both a and a.b, which may be a module."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a.b was no module
        return []
    if spec is None or not spec.origin:
        return []
    found: list[str] = []
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append(node.module)
            if node.module.partition(".")[0] in OURS:
                found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found
