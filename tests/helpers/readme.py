"""The README's commands, and a folder in which they mean the repository's programs with settings of a test's size."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from ranking.program import parse

ROOT = Path(__file__).parents[2]
BLOCKS: list[str] = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M | re.S)
PROGRAM = re.compile(r"(?:\.venv/bin/)?python (?:-m )?[\w./]+")
POSITIONAL = {"loadtest.compare": ("before", "after")}
SMALL_LIMITS = {"max_query_tokens": 8, "max_title_tokens": 8, "max_summary_tokens": 16}


def block_with(text: str) -> list[str]:
    """The lines of the README's only block of commands that has this text, without comments."""
    (block,) = [block for block in BLOCKS if text in block]
    return [line.partition("   #")[0] for line in block.splitlines()]


def commands_of(page: Path) -> list[str]:
    """The commands of the page that start a program of this repository: one line each, without what is said of them.

    A program followed by `...` has the flags of the page's first command of that program, and then its own; a shell
    variable stands for 1.
    """
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    indented = re.findall(r"(?:^    .*\n)+", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    found: list[str] = []
    first: dict[str, str] = {}
    for block in fenced + indented:
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if program := PROGRAM.match(line.strip()):
                flags = re.split(r" {3,}| # |; done", line.strip()[program.end() :])[0]
                flags = re.sub(r"\$\w+", "1", flags.replace(" ...", first.get(program[0], "")))
                first.setdefault(program[0], flags)
                found.append(program[0] + flags)
    return found


def settings_of(command: str) -> tuple[Any, Any]:
    """(the program's module, its settings) of a command as printed. SystemExit for a flag that it does not take."""
    words = shlex.split(command.removesuffix(" &"), comments=True)
    start = next(i for i, word in enumerate(words) if word.endswith("python")) + 1
    if words[start] == "-m":
        name, arguments = words[start + 1], words[start + 2 :]
    else:
        name, arguments = words[start].removesuffix(".py").replace("/", "."), words[start + 1 :]
    program = importlib.import_module(name)
    (kind,) = (kind for key, kind in get_type_hints(program.main).items() if key != "return")
    return program, parse(kind, arguments, positional=POSITIONAL.get(name, ()))


def run_in_process(command: str) -> None:
    """Run a program's command as printed, in this process. AssertionError with its exit code unless that is 0."""
    program, settings = settings_of(command)
    code = program.main(settings)
    assert not isinstance(code, int) or code == 0, f"exit code {code}: {command}"


def write_small_configs(folder: Path, names: str, changes: dict[str, Any]) -> None:
    """training/configs of that pattern in the folder, with settings changed and, where the value is None, left out."""
    configs = folder / "training" / "configs"
    configs.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "training" / "configs").glob(names)):
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) | changes
        kept = {key: value for key, value in settings.items() if value is not None}
        (configs / path.name).write_text(yaml.safe_dump(kept), encoding="utf-8")
