"""docs/story.py runs from its first cell to its last, and prints what it says that it prints."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from pathlib import Path

import pytest

from tests.helpers.readme import ROOT
from tests.helpers.site import site_hooks

STORY = ROOT / "docs" / "story.py"
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def alike(shown: str, printed: str) -> bool:
    """The same words, and numbers that are near: training ends a little apart on another processor."""

    def words(text: str) -> list[str]:
        return re.sub(r"[-+]?" + NUMBER.pattern, "N", re.sub(r"[-=:| ]+", " ", text)).split()

    ours, theirs = ([float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (shown, printed))
    return words(shown) == words(printed) and all(abs(a - b) <= max(0.15, 0.3 * a) for a, b in zip(ours, theirs))


@pytest.mark.timeout(600)
def test_the_story_prints_what_it_shows(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(logging, "disable", lambda level: None)  # it would hold for all tests after this one
    cells = site_hooks().story_cells(STORY)
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        if cell.kind == "code":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(cell.text, f"{STORY.name}, cell {number}", "exec"), names)
            shown = [line.rstrip() for line in printed.getvalue().splitlines()]
            assert len(shown) == len(cell.output), f"cell {number} printed:\n{printed.getvalue()}"
            wrong = [(a, b) for a, b in zip(cell.output, shown) if not alike(a, b)]
            assert wrong == [], f"cell {number}: (story, printed now)"
    assert len([cell for cell in cells if cell.kind == "markdown"]) == 11


def test_the_site_has_the_story_with_its_outputs():
    page = site_hooks().story_page(STORY)
    assert page.startswith("# The story in ten cells\n") and page.count("\n## ") == 10
    assert "```python\n" in page and "\n# >" not in page and "\n# %%" not in page
    assert all(Path(ROOT, "docs", link).is_file() for link in re.findall(r"\]\(([^)#]+\.md)\)", page))


@pytest.mark.parametrize(
    "printed, same", [("tau 0.98 of 20", True), ("tau 0.50 of 20", False), ("rho 0.98 of 20", False)]
)
def test_near_numbers_pass_and_other_words_do_not(printed, same):
    assert alike("tau 0.99 of 20", printed) is same
