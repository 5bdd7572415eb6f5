"""What the site adds to the pages: every program's flags, read from the code, the story, and the results' menu."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # mkdocs runs this file by itself

from disranker.programs import read_programs  # noqa: E402

FOLDERS = ("training", "build", "clients", "demo", "ranking", "serving", "loadtest", "benchmarks")
STAGES = {
    "training": "Data and training",
    "build": "Building",
    "clients": "Labelling, serving, A/B test",
    "loadtest": "Load testing",
    "demo": "Demo",
    "benchmarks": "Results and capacity",
}


@dataclass(frozen=True)
class Settings:
    """A class of settings as its source has it: summary, meaning by field, (field, type, default) in order, bases."""

    summary: str
    meanings: dict[str, str]
    fields: list[tuple[str, str, str]]
    bases: list[str]


@cache
def all_settings() -> dict[tuple[str, str], Settings]:
    """(file, class) -> its settings, of every class in the program folders."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    found[str(path.relative_to(ROOT)), node.name] = _settings(node)
    return found


def _settings(node: ast.ClassDef) -> Settings:
    summary, _, arguments = (ast.get_docstring(node) or "").partition("\nArgs:\n")
    # a meaning goes on in lines that are further in than its name
    entries = re.findall(r"^    (\w+): (.+(?:\n     +.+)*)", arguments, flags=re.M)
    fields = [
        (item.target.id, ast.unparse(item.annotation), "" if item.value is None else _default(item.value))
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    ]
    meanings = {name: " ".join(text.split()) for name, text in entries}
    return Settings(summary.strip(), meanings, fields, [ast.unparse(base) for base in node.bases])


def _default(value: ast.expr) -> str:
    if isinstance(value, ast.Call):  # field(default_factory=lambda: ["bm25"])
        given = {word.arg: word.value for word in value.keywords}
        factory = given.get("default_factory")
        return ast.unparse(factory.body) if isinstance(factory, ast.Lambda) else ""
    return ast.unparse(value)


@cache
def _imported(near: str) -> dict[str, str]:
    """Name -> file that a file takes it from, of this repository."""
    found = {}
    for node in ast.parse((ROOT / near).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            path = node.module.replace(".", "/") + ".py"
            if (ROOT / path).is_file():
                found |= {name.asname or name.name: path for name in node.names}
    return found


def settings_of(name: str, near: str) -> tuple[Settings, str] | None:
    """What a file means by the name of a class of settings, and the file that has it; None if it is none."""
    if found := all_settings().get((near, name)):
        return found, near
    return settings_of(name, _imported(near)[name]) if name in _imported(near) else None


def flags(settings: Settings, near: str, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(flag, default, meaning) of a class of the file `near` and the groups that it inherits or holds."""
    for base in settings.bases:
        if group := settings_of(base, near):
            yield from flags(*group, prefix)
    for name, kind, default in settings.fields:
        group = settings_of(kind, near)
        if group and group[0].fields:
            yield from flags(*group, f"{prefix}{name}.")
        elif not name.startswith("_") and kind != "ClassVar":
            flag = f"--{prefix}{name}".replace("_", "-")
            yield flag, default, settings.meanings.get(name, "")


def _last_word(found: Iterator[tuple[str, str, str]]) -> dict[str, tuple[str, str]]:
    """Flag -> (default, meaning): a class may give an inherited flag another default, with or without a meaning."""
    known: dict[str, tuple[str, str]] = {}
    for flag, default, meaning in found:
        known[flag] = (default, meaning or known.get(flag, ("", ""))[1])
    return known


def programs() -> Iterator[tuple[str, str, tuple[Settings, str], str]]:
    """(file, command, settings with their file, example) of every program that the map of the code names, by folder."""
    shown = [program.module for program in read_programs()]
    for folder in STAGES:
        for module in (module for module in shown if module.split(".")[0] == folder):
            near = module.replace(".", "/") + ".py"
            tree = ast.parse((ROOT / near).read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "run" and len(node.args) == 2:
                    known = settings_of(ast.unparse(node.args[1]), near)
                    example = next((w.value for w in node.keywords if w.arg == "example"), None)
                    if known is not None and example is not None:
                        as_file = folder in ("build", "clients", "loadtest") and near.count("/") == 1
                        command = f"python {near}" if as_file else f"python -m {module}"
                        yield near, command, known, _text(example, tree)


def _text(value: ast.expr, tree: ast.Module) -> str:
    """A text as the source writes it: a literal, a name that a literal is assigned to, or an f-string of both."""
    if isinstance(value, ast.JoinedStr):
        return "".join(_text(part, tree) for part in value.values)
    if isinstance(value, ast.FormattedValue):
        return _text(value.value, tree)
    if isinstance(value, ast.Name):
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and value.id in map(ast.unparse, node.targets):
                return _text(node.value, tree)
    if isinstance(value, ast.Constant):
        return str(value.value)
    raise ValueError(f"{ast.unparse(value)}: not a text that can be read without running it")


def reference() -> str:
    """The page of all programs, as Markdown."""
    lines = [
        "# Programs",
        "",
        "Every program takes its settings as flags, or as a YAML file with `--config` (flags win). Bad input ends in "
        "one line and exit code 1, a wrong flag in exit code 2.",
    ]
    folder = ""
    for near, command, settings, example in programs():
        if folder != (folder := near.split("/")[0]):
            lines += ["", f"## {STAGES[folder]}"]
        lines += ["", f"### {command}", "", settings[0].summary, "", f"```\n{example}\n```", ""]
        lines += ["| flag | default | meaning |", "|---|---|---|"]
        for flag, (default, meaning) in _last_word(flags(*settings)).items():
            cells = [f"`{flag}`", f"`{default}`" if default else "", meaning]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Cell:
    """A cell of docs/story.py: markdown or code, and of code the lines that it printed."""

    kind: str
    text: str
    output: list[str]


def story_cells(path: Path) -> list[Cell]:
    """The cells of a Python file in percent form, whose `# >` lines are what the cell before them printed."""
    cells = []
    for part in re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        lines = body.strip("\n").splitlines()
        if "[markdown]" in head:
            cells.append(Cell("markdown", "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines), []))
        else:
            code = [line for line in lines if not line.startswith("# >")]
            output = [line.removeprefix("# >").removeprefix(" ") for line in lines if line.startswith("# >")]
            cells.append(Cell("code", "\n".join(code).strip("\n"), output))
    return cells


def story_page(path: Path) -> str:
    """The story as Markdown: text, code, and what the code printed."""
    parts = []
    for cell in story_cells(path):
        parts.append(cell.text if cell.kind == "markdown" else f"```python\n{cell.text}\n```")
        if cell.output:
            parts.append("```\n" + "\n".join(cell.output) + "\n```")
    return "\n\n".join(parts) + "\n"


def on_config(config: Any) -> Any:
    """Add the results to the menu, each page by its own title."""
    pages = sorted((ROOT / "docs" / "results").glob("*.md"))
    config.nav.append({"Results": [f"results/{page.name}" for page in pages]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the reference of the programs, and the story."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "story.md", content=story_page(ROOT / "docs" / "story.py")))
    files.append(File.generated(config, "programs.md", content=reference()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files of the repository, which the site does not hold, become their paths; the story has a page."""
    markdown = markdown.replace("](story.py)", "](story.md)")
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+((?!results/)[^)]+\.(?:yaml|py|toml))\)", r"`\2`", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Code and tables may be wider than a telephone: the keyboard must be able to reach and scroll them (site.css)."""
    return re.sub(r"<(pre|table)\b(?![^>]*tabindex)", r'<\1 tabindex="0"', html)
