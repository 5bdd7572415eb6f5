"""The pages for people: lines that fit an editor, an index that leads to every part, words as the glossary has them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "model_repository" / "README.md"]
WIDTH = 120
NOT_USED = re.compile(r"judgement|\bworld[_ -]size\b|\bglobal rank\b", flags=re.I)


def prose(page: Path) -> list[tuple[int, str]]:
    """The page's lines with numbers, without tables; the README's commands are copied line by line, so they stay."""
    lines = []
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= line.startswith("```")
        if not line.lstrip().startswith("|") and not (fenced and page.name == "README.md"):
            lines.append((number, line))
    return lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_line_of_a_page_has_at_most_120_columns(page):
    assert [(number, len(line)) for number, line in prose(page) if len(line) > WIDTH] == []


def anchor(heading: str) -> str:
    """The link target that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_index_of_the_decisions_leads_to_every_part():
    page = (DOCS / "decisions.md").read_text(encoding="utf-8")
    index, _, _ = page.partition("\n## ")
    parts = {anchor(heading) for heading in re.findall(r"^## (.+)$", page, flags=re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", index)) == parts
    folders = re.findall(r"`([\w./]+)`", "".join(line.split("|")[1] for line in index.splitlines() if "|" in line))
    assert folders and [folder for folder in folders if not (ROOT / folder).exists()] == []


def test_the_glossary_defines_no_term_twice():
    terms = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", (DOCS / "glossary.md").read_text(encoding="utf-8"), flags=re.M)
    counted = Counter(term for line in terms for term in re.split(r", | \(", line.rstrip(")")) if term.strip("-"))
    assert len(counted) > 80
    assert [term for term, times in counted.items() if times > 1 and term != "term"] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_uses_no_word_that_the_glossary_replaces(page):
    text = "\n".join(line for _, line in prose(page))
    assert page.name == "glossary.md" or NOT_USED.findall(text) == []
