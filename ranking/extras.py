"""Which extra of the package brings a module that is missing: said in one line where a program cannot find it."""

from __future__ import annotations

import importlib.metadata
import re

# modules that do not have their package's name
_PACKAGES = {
    "grpc": "tritonclient", "sklearn": "scikit-learn", "yaml": "pyyaml", "opentelemetry": "opentelemetry-sdk",
}  # fmt: skip
_LAST = ("build", "serve-cpu", "bench", "dev")  # large ones, named only where no other extra has the package


def remedy(module: str) -> str:
    """What to type so that `import module` works: the smallest extra that has it, else the whole installation."""
    package = _normal(_PACKAGES.get(module, module))
    extras: list[str] = []
    try:
        needs = importlib.metadata.requires("disranker") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that nothing was installed from
        needs = []
    for need in needs:
        name, extra = re.match(r"[\w.-]+", need), re.search(r"extra == ['\"]([\w-]+)", need)
        if name and extra and _normal(name[0]) == package:
            extras.append(extra[1])
    extras.sort(key=lambda extra: extra in _LAST)
    return f"pip install 'disranker[{extras[0]}]'" if extras else "`make install` brings everything"


def missing_module(problem: ModuleNotFoundError) -> str:
    """The line for a person whose installation lacks a module."""
    module = (problem.name or "").partition(".")[0]
    return f"{module} is not installed here: {remedy(module)}"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
