"""Which programs there are: those that the tree of docs/architecture.md calls programs, in its words and its order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[1]
# a checkout has the page itself, an installed package the copy that its build put beside this file
PAGES = (_ROOT / "docs" / "architecture.md", Path(__file__).with_name("architecture.md"))
_LINE = re.compile(r"( *)(\S+?)(/?)(?:\s{2,}(\S.*))?$")
_PROGRAM = re.compile(r"program(?:, (stage \d+))?: ")
# programs whose own name says too little without the folder's
_NAMED_WITH_FOLDER = ("demo", "loadtest")


@dataclass(frozen=True)
class Program:
    """name: as it is typed; module: as `python -m` takes it; stage: its folder and what that is for."""

    name: str
    module: str
    stage: str
    purpose: str


def read_programs(page: Path | None = None) -> list[Program]:
    """All programs in the page's order. FileNotFoundError without the page.

    page: docs/architecture.md; its place is found if it is not given.
    """
    path = page or next((path for path in PAGES if path.is_file()), PAGES[0])
    tree = path.read_text(encoding="utf-8").split("\n## The tree\n", 1)[1].split("```")[1]
    found: list[Program] = []
    folders: list[tuple[int, str, str]] = []  # indentation, path and purpose of the folders around the current line
    for line in filter(None, tree.splitlines()):
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        depth, name, purpose = len(match[1]), match[2], match[4] or ""
        folders = [folder for folder in folders if folder[0] < depth]
        inside = f"{folders[-1][1]}/" if folders else ""
        if match[3]:
            folders.append((depth, inside + name, purpose))
        elif (called := _PROGRAM.match(purpose)) and folders:
            folder = folders[0][1]
            stem = name.removesuffix(".py").replace("_", "-")
            named = f"{folder}-{stem}" if folder in _NAMED_WITH_FOLDER else stem
            told = (f"{called[1]}: " if called[1] else "") + purpose[called.end() :]
            module = f"{inside}{name}".removesuffix(".py").replace("/", ".")
            found.append(Program(named, module, f"{folder}/: {folders[0][2]}", told))
    return found
