"""Compares docs/architecture.md with the code: which folders and files there are, and which folder imports which.

python -m tests.helpers.code_map        # the rows of the page's table as the code has them
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

Arrows = dict[str, set[str]]  # a folder -> the folders that its files import; paths from the repository's root

ROOT = Path(__file__).parents[2]
SERVED = ("ranking", "training", "build", "serving", "clients", "loadtest")
TOP_FOLDERS = (*SERVED, "demo", "benchmarks", "disranker")
ROW = re.compile(r"^\| `([\w/]+)` \| (.*?) \|", flags=re.M)
TREE_LINE = re.compile(r"( *)(\S+)(?:\s{2,}\S.*)?$")


def allowed_arrows(page: str, title: str) -> Arrows:
    """The table of the page's section `title`: one row a folder, the folders it may import in backquotes beside it."""
    return {folder: set(re.findall(r"`([\w/]+)`", imported)) for folder, imported in ROW.findall(section(page, title))}


def tree_paths(page: str, title: str) -> list[str]:
    """Paths of the indented tree in the section `title`; those of folders end in a slash. ValueError on a bad line."""
    block = section(page, title).split("```")[1].strip("\n")
    folders: list[tuple[int, str]] = []  # indentation and path of the folders that the current line is in
    found = []
    for line in filter(None, block.splitlines()):
        match = TREE_LINE.match(line)
        if match is None:
            raise ValueError(f"not a line of a tree: {line!r}")
        depth = len(match[1])
        folders = [(indentation, folder) for indentation, folder in folders if indentation < depth]
        path = (folders[-1][1] if folders else "") + match[2]
        if path.endswith("/"):
            folders.append((depth, path))
        found.append(path)
    return found


def section(page: str, title: str) -> str:
    """The text between the heading `## title` and the next heading of that level."""
    return re.split(r"^## ", page.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def sources(root: Path, folder: str) -> list[Path]:
    return sorted(path for path in (root / folder).rglob("*.py") if not path.parent.name.startswith((".", "_")))


def modules(root: Path, folders: tuple[str, ...]) -> dict[str, Path]:
    """Dotted name -> file, for every Python file under the folders; a package's name leads to its __init__.py."""
    found = {}
    for path in (p for folder in folders for p in sources(root, folder)):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that the file imports; for `from a import b` that is a.b, which may be a module or a name in a."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}: a relative import; write the whole name, as everywhere here")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_files(root: Path, folders: tuple[str, ...]) -> dict[Path, set[Path]]:
    """Every Python file under the folders -> those of these files that it imports, anywhere in its code."""
    known = modules(root, folders)
    return {
        path: {known[name] for name in (longest_known(n, known) for n in imports(path)) if name}
        for path in known.values()
    }


def longest_known(name: str, known: Mapping[str, Path]) -> str:
    """The module that `from a.b import c` reads: a.b.c if there is such a file, else a.b; "" if it is none of ours."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def code_arrows(root: Path, folders: tuple[str, ...]) -> Arrows:
    """Every folder with Python files -> the other folders that its files import."""
    arrows: Arrows = {}
    for path, targets in imported_files(root, folders).items():
        folder = path.parent.relative_to(root).as_posix()
        arrows.setdefault(folder, set()).update(
            {target.parent.relative_to(root).as_posix() for target in targets} - {folder}
        )
    return arrows


def differences(allowed: Arrows, found: Arrows) -> list[str]:
    """What the table and the code do not agree on, one sentence each."""
    said = [f"{folder} has no row in the table" for folder in sorted(found.keys() - allowed.keys())]
    said += [f"{folder} has a row, but no Python file" for folder in sorted(allowed.keys() - found.keys())]
    for folder in sorted(allowed.keys() & found.keys()):
        said += [f"{folder} imports {other}, which its row lacks" for other in sorted(found[folder] - allowed[folder])]
        said += [f"{folder} imports {other} no more" for other in sorted(allowed[folder] - found[folder])]
    return said


def circles(arrows: Arrows) -> list[str]:
    """Folders from which arrows lead back to themselves: what is left after folders that nothing holds are taken."""
    left = {folder: set(targets) for folder, targets in arrows.items()}
    while free := [folder for folder, targets in left.items() if not targets & left.keys()]:
        for folder in free:
            del left[folder]
    while free := [folder for folder in left if not any(folder in targets for targets in left.values())]:
        for folder in free:
            del left[folder]
    return sorted(left)


def entry_arrows(root: Path, folder: str) -> set[tuple[str, str]]:
    """Arrows between the entries at the top of a folder, which are its programs and its sub-folders."""

    def entry(path: Path) -> str:
        return path.relative_to(root / folder).parts[0]

    files = imported_files(root, (folder,))
    return {(entry(a), entry(b)) for a, targets in files.items() for b in targets if entry(a) != entry(b)}


def missing_from_tree(root: Path, folders: tuple[str, ...], named: list[str]) -> list[str]:
    """Folders and Python files under the folders that the tree does not name; __init__.py files need no line."""
    files = [path for folder in folders for path in sources(root, folder)]
    inside = {parent for path in files for parent in path.parents if root in parent.parents}
    needed = {f"{folder.relative_to(root).as_posix()}/" for folder in inside}
    needed |= {path.relative_to(root).as_posix() for path in files if path.name != "__init__.py"}
    # a folder that holds one file may stand with it in one line: backends/openvino/model.py
    inner = {f"{parent.as_posix()}/" for name in named for parent in Path(name).parents}
    return sorted(needed - set(named) - inner)


def table(arrows: Arrows, folders: tuple[str, ...]) -> str:
    """The table's rows as the code has them, in the order of the top folders."""

    def place(path: str) -> tuple[int, str]:
        return folders.index(path.split("/")[0]), path

    def row(folder: str) -> str:
        imported = ", ".join(f"`{other}`" for other in sorted(arrows[folder], key=place))
        return f"| `{folder}` | {imported or 'nothing'} |"

    return "\n".join(row(folder) for folder in sorted(arrows, key=place))


if __name__ == "__main__":
    print(table(code_arrows(ROOT, TOP_FOLDERS), TOP_FOLDERS))
