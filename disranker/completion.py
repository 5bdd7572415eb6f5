"""Shell completion: scripts for bash, zsh and fish, and the words that may follow what was typed.

The flags of a program are read from the source of its settings, since importing a training program takes seconds and a
shell asks at every press of the key.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from disranker.programs import Program

_ROOT = Path(__file__).parents[1]
SHELLS = ("bash", "zsh", "fish")

# an empty answer leaves file names to the shell
_SCRIPTS = {
    "bash": """_disranker() {
    mapfile -t COMPREPLY < <(disranker --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o default -o bashdefault -F _disranker disranker""",
    "zsh": """_disranker() {
    local -a found
    found=("${(@f)$(disranker --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -a found; else _files; fi
}
compdef _disranker disranker""",
    "fish": """function __disranker
    set -l typed (commandline -opc) (commandline -ct)
    disranker --complete $typed[2..-1] 2>/dev/null
end
complete -c disranker -a '(__disranker)'""",
}


def script(shell: str) -> str:
    """What the shell sources; `disranker` must be on its PATH, as `pip install` puts it there."""
    return _SCRIPTS[shell]


def candidates(programs: Mapping[str, Program], words: list[str]) -> list[str]:
    """What the last word, which is unfinished, may become. words: all after the command; no words: every program."""
    typed = words[-1] if words else ""
    if len(words) <= 1:
        return [name for name in (*programs, "--completion", "--help") if name.startswith(typed)]
    program = programs.get(words[0])
    if program is None:
        return [shell for shell in SHELLS if words[0] == "--completion" and shell.startswith(typed)]
    if not typed.startswith("-"):
        return []
    return [flag for flag in flags(program.module) if flag.startswith(typed)]


def flags(module: str) -> list[str]:
    """Every flag of a program, sorted: the fields of its dataclass `Config` and of the classes that this one extends.

    module: dotted name. A field that is itself a dataclass of settings gives a flag per field of that class.
    """
    return sorted({"--config", "--help", *(f"--{name.replace('_', '-')}" for name in _fields(module, "Config"))})


def _fields(module: str, class_name: str) -> Iterator[str]:
    found = _class(module, class_name)
    if found is None:
        return
    node, owner = found
    for base in node.bases:
        if isinstance(base, ast.Name):
            yield from _fields(owner, base.id)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and not line.target.id.startswith("_"):
            nested = list(_fields(owner, line.annotation.id)) if isinstance(line.annotation, ast.Name) else []
            yield from (f"{line.target.id}.{name}" for name in nested) if nested else [line.target.id]


def _class(module: str, name: str) -> tuple[ast.ClassDef, str] | None:
    """The class of that name in a module, or where the module imports it from, and the module that defines it."""
    path = _ROOT / Path(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        return None
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, module
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _class(node.module, alias.name)
    return None
