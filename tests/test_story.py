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
INTERVAL = re.compile(r"95% interval ([-+][\d.]+)% to ([-+][\d.]+)%")
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def alike(shown: str, printed: str) -> bool:
    """The same words, and numbers that are near: training ends a little apart on another processor. Of a measured
    effect: the same side of 0, no further apart than its interval is wide (which knows of users, not of training)."""

    def words(text: str) -> list[str]:
        return re.sub(r"[-+]?" + NUMBER.pattern, "N", re.sub(r"[-=:| ]+", " ", text)).split()

    if words(shown) == words(printed) and INTERVAL.search(shown):
        (low, high), (new_low, new_high) = (
            [float(end) for end in INTERVAL.findall(text)[0]] for text in (shown, printed)
        )
        return low * new_low > 0 < high * new_high and max(abs(new_low - low), abs(new_high - high)) <= high - low
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


@pytest.mark.parametrize(
    "ends, same", [("-11.5% to -6.6%", True), ("-3.5% to +0.6%", False), ("-9.0% to -4.2%", False)]
)
def test_an_effect_keeps_its_side_and_its_size(ends, same):
    assert alike("lift -12.6%, 95% interval -15.0% to -10.2%", f"lift -9.0%, 95% interval {ends}") is same
