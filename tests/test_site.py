"""The documentation as a site: it builds without a warning, and its reference knows every program and flag."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from disranker.programs import read_programs
from tests.helpers.readme import commands_of
from tests.helpers.site import site_hooks

ROOT = Path(__file__).parents[1]
OF_EVERY_PROGRAM = {"--config", "--help", "--print-config"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_in_the_site_with_its_links_whole(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert pages - {path.relative_to(site) for path in site.rglob("*.html")} == set()


def test_a_page_fetches_nothing_from_elsewhere(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://[^"]+"', page) == []


def test_the_keyboard_reaches_every_block_that_may_scroll(site):
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    blocks = [block for page in pages.values() for block in re.findall(r"<(?:pre|table)\b[^>]*>", page)]
    assert len(blocks) > 200 and {block for block in blocks if 'tabindex="0"' not in block} == set()


def test_the_reference_has_every_program():
    """All that end in `run(main, Config, ...)` at the top of a folder of programs, and those further in that the map of
    the code calls programs."""
    documented = [near for near, *_ in site_hooks().programs()]
    ended_by_run = {
        str(path.relative_to(ROOT))
        for folder in ("training", "build", "clients", "demo", "loadtest")
        for path in (ROOT / folder).glob("*.py")
        if re.search(
            r"^    run\($|^    run\(main|^    run\(\w+, \w*Config", path.read_text(encoding="utf-8"), flags=re.M
        )
    }
    mapped = {program.module.replace(".", "/") + ".py" for program in read_programs()}
    assert ended_by_run <= set(documented) == mapped
    assert len(documented) == len(set(documented)) > 30


def test_the_reference_has_every_flag_that_a_page_shows():
    hooks = site_hooks()
    documented = {
        command: {flag for flag, *_ in hooks.flags(*settings)} for _, command, settings, _ in hooks.programs()
    }
    shown = [command for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] for command in commands_of(page)]
    missing = []
    for command in shown:
        program = re.match(r"(?:\.venv/bin/)?(python (?:-m )?[\w./]+)", command)
        assert program is not None and program[1] in documented, command
        for word in shlex.split(command.removesuffix(" &")):
            flag = re.sub(r"^--no-", "--", word.partition("=")[0].rstrip("+"))
            if flag.startswith("--") and flag not in documented[program[1]] | OF_EVERY_PROGRAM:
                missing.append((program[1], flag))
    assert missing == [] and len(shown) > 75


@pytest.mark.parametrize("near", ["clients/ab_report.py", "build/releases.py", "clients/ab_router.py"])
def test_the_reference_has_the_flags_of_help(near):
    """Read from the source, not run: so it must agree with what the program itself says."""
    hooks = site_hooks()
    settings = next(settings for name, _, settings, _ in hooks.programs() if name == near)
    documented = {flag for flag, *_ in hooks.flags(*settings)}
    shown = subprocess.run([sys.executable, near, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert documented == set(re.findall(r"^  (--[a-z][a-z.-]+)", shown, flags=re.M)) - {
        "--config",
        "--help",
        "--print-config",
    }
