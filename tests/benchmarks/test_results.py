"""`make results`: what a page's commands print gets between its marks; the pages' commands are ones that exist."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import get_type_hints

import pytest

from benchmarks import results
from benchmarks.results import Config, as_markdown, commands_of, lacking, main
from ranking.errors import InputError
from ranking.program import parse

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "results"
MADE = list(commands_of(PAGES, []))
EVERY_COMMAND = sorted({command for made in MADE for command in made.commands()} | set(results.PREPARED.values()))


def test_every_page_names_the_commands_that_make_it():
    without = set(PAGES.glob("*.md")) - {made.page for made in MADE}
    assert without == set(), "each page of results marks the commands that make it: benchmarks/results.py says how"
    marks = sum(page.read_text(encoding="utf-8").count("<!-- made by") for page in PAGES.glob("*.md"))
    assert len(MADE) == marks, "a mark without its end"


@pytest.mark.parametrize("command", [command for command in EVERY_COMMAND if "python -m" in command])
def test_a_command_of_a_page_parses(command):
    words = shlex.split(command)
    module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    (settings,) = (
        kind for name, kind in get_type_hints(importlib.import_module(module).main).items() if name != "return"
    )
    parse(settings, arguments)


@pytest.fixture
def pages(tmp_path, monkeypatch) -> Path:
    """README and docs in a folder of its own, with two pages: a.md has three commands, b.md one that needs a GPU."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("[!.]*.svg", "*.png"))
    shutil.copy(ROOT / "README.md", tmp_path)
    folder = tmp_path / "docs" / "results"
    records = [{"step": "add", "rows": 10, "peak": {"gib": 0.25}}, {"step": "read", "rows": 9, "peak": {"gib": 1}}]
    printed = " ".join(json.dumps(record) for record in records)
    (folder / "a.md").write_text(
        "# A page\n\nWritten by hand.\n\n"
        + mark("printf '# A page\\n\\n| n | seconds |\\n|---|--:|\\n| 1 | 2.5 |\\n'", "old table")
        + "\nBetween.\n\n"
        + mark("echo began >&2; exit 3", "what the last run had")
        + mark(f"echo '{printed}'", "")
        + "\nThe end.\n"
    )
    (folder / "b.md").write_text(
        "# B\n\n" + mark("echo one", "", "needs: [gpu]\n") + mark("echo two", "from another machine", "needs: [gpu]\n")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "gpu", lambda: "")
    return folder


def mark(command: str, content: str, more: str = "") -> str:
    return f"<!-- made by\nrun: {json.dumps(command)}\n{more}-->\n{content}\n<!-- end of what it made -->\n"


def test_what_commands_print_gets_between_their_marks_and_a_failed_one_keeps_what_it_had(pages, capsys):
    assert main(Config(only=["a"], pages=pages)) == 1
    page = (pages / "a.md").read_text(encoding="utf-8")
    assert "| n | seconds |\n|---|--:|\n| 1 | 2.5 |\n\n*20" in page and "old table" not in page
    assert "what the last run had" in page
    assert "| step | rows | peak |\n| --- | --- | --- |\n| add | 10 | gib: 0.25 |\n| read | 9 | gib: 1 |" in page
    assert page.startswith("# A page\n\nWritten by hand.\n") and page.endswith("\nThe end.\n")
    assert page.count("\n# A page\n") == 0 and "\nBetween.\n" in page
    outcomes = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " a: " in line]
    assert outcomes == ["made", "failed", "made"]
    assert "$ echo began >&2; exit 3\nbegan" in Path("runs/results/a.log").read_text(encoding="utf-8")


def test_a_second_run_changes_nothing_but_the_line_on_the_machine(pages):
    main(Config(only=["a"], pages=pages))
    before = (pages / "a.md").read_text(encoding="utf-8")
    main(Config(only=["a"], pages=pages))
    after = (pages / "a.md").read_text(encoding="utf-8")
    assert re.sub(r"\*20.*\*", "", before) == re.sub(r"\*20.*\*", "", after)


def test_a_command_that_needs_a_gpu_is_not_run_without_one(pages, capsys):
    assert main(Config(only=["b"], pages=pages)) == 0
    page = (pages / "b.md").read_text(encoding="utf-8")
    assert "*Not run here: no CUDA device.*" in page and "from another machine" in page
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if " b: " in line] == [["not", "run"]] * 2


def test_a_command_over_its_time_is_ended_with_its_children(pages, capsys):
    (pages / "a.md").write_text("# A\n\n" + mark("sleep 60 & sleep 60", "kept"))
    assert main(Config(only=["a"], pages=pages, limit_minutes=0.01)) == 1
    assert "not done after 0.01 minutes" in capsys.readouterr().out
    assert "kept" in (pages / "a.md").read_text(encoding="utf-8")


def test_what_a_command_reads_is_made_first(pages, monkeypatch):
    monkeypatch.setattr(results, "PREPARED", {"data/small": "mkdir -p data/small && echo 7 > data/small/rows"})
    (pages / "a.md").write_text("# A\n\n" + mark("cat data/small/rows", ""))
    assert main(Config(only=["a"], pages=pages)) == 0
    assert "```\n7\n```" in (pages / "a.md").read_text(encoding="utf-8")


def test_data_that_is_missing_is_a_reason_not_to_run(pages):
    (pages / "a.md").write_text("# A\n\n" + mark("python -m x --data data/msrd", ""))
    (made,) = commands_of(pages, ["a"])
    assert lacking(made, Config(msrd=Path("nowhere"))) == "no MSRD at nowhere"
    assert lacking(made, Config(msrd=pages)) == ""


def test_a_page_that_is_not_there_is_named(pages):
    with pytest.raises(InputError, match=r"clicklgo: no such page; .* has a, ab_calibration"):
        main(Config(only=["clicklgo"], pages=pages))


def test_a_mark_with_an_unknown_need_is_refused(pages):
    (pages / "a.md").write_text("# A\n\n" + mark("true", "", "needs: [luck]\n"))
    with pytest.raises(InputError, match=r"a.md: needs \['luck'\]: gpu and"):
        main(Config(only=["a"], pages=pages))


def test_long_lines_are_wrapped_and_tables_are_not():
    row = "| " + "x" * 200 + " |"
    lines = as_markdown("word " * 60 + f"\n\n| a |\n|---|\n{row}\n").splitlines()
    assert row in lines and max(len(line) for line in lines if line != row) <= 120
