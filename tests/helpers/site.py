"""docs/site_hooks.py, which the documentation's builder loads by its path."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from tests.helpers.readme import ROOT


def site_hooks() -> ModuleType:
    """The module, loaded anew."""
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["site_hooks"] = module
    spec.loader.exec_module(module)
    return module
