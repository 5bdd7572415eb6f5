"""The commands of the README and of the pages for people: every program exists and takes the flags it is shown with.

That they also do what they are shown for: tests/e2e/test_readme_recipe.py, test_readme_data_forms.py, test_pages.py.
"""

from __future__ import annotations

import re

import pytest

from tests.helpers.readme import BLOCKS, ROOT, commands_of, settings_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = [line for block in BLOCKS for line in block.splitlines()]
SHOWN = [(page, command) for page in PAGES for command in commands_of(page)]


def test_the_pages_show_programs_of_every_stage():
    assert len([page for page, _ in SHOWN if page.name == "README.md"]) >= 12
    assert len(SHOWN) >= 75 and len({page for page, _ in SHOWN}) >= 20


@pytest.mark.parametrize("page, command", SHOWN, ids=[f"{page.name}: {command}" for page, command in SHOWN])
def test_a_command_of_a_page_parses(page, command):
    settings_of(command)
    for path in re.findall(r"--(?:config|experiment) (\S+)", command):
        assert (ROOT / path).is_file(), path


def test_every_make_target_of_the_readme_exists():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    shown = [line.split()[1] for line in LINES if line.startswith("make ")]
    assert shown and set(shown) <= set(targets)


def test_every_link_of_the_readme_and_the_docs_leads_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
