"""The commands of the README: every program exists and takes the flags that it is shown with."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import get_type_hints

import pytest

from ranking.program import parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, flags=re.M | re.S)
LINES = [line for block in BLOCKS for line in block.splitlines()]
PROGRAMS = [line for line in LINES if re.match(r"(\.venv/bin/)?python ", line)]
POSITIONAL = {"loadtest.compare": ("before", "after")}


def test_the_readme_shows_programs_of_every_stage():
    assert len(PROGRAMS) >= 12


@pytest.mark.parametrize("line", PROGRAMS)
def test_a_command_of_the_readme_parses(line):
    _, *words = shlex.split(line.removesuffix(" &"), comments=True)
    module, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0][:-3].replace("/", "."), words[1:])
    program = importlib.import_module(module)
    (settings,) = (kind for name, kind in get_type_hints(program.main).items() if name != "return")
    parse(settings, arguments, positional=POSITIONAL.get(module, ()))
    for path in (arguments[i + 1] for i, word in enumerate(arguments) if word in ("--config", "--experiment")):
        assert (ROOT / path).is_file(), path


def test_every_make_target_of_the_readme_exists():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    shown = [line.split()[1] for line in LINES if line.startswith("make ")]
    assert shown and set(shown) <= set(targets)


def test_every_link_of_the_readme_and_the_docs_leads_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
