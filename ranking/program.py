"""One command line for every program: a dataclass of settings, an optional YAML file, flags that win over the file.

    @dataclass
    class Config:
        \"\"\"Train the baseline on judgements.

        Args:
            data: dataset folder, as prepare_data wrote it
            steps: optimiser steps; raise it for sets above 100k judgements
        \"\"\"
        data: Path
        steps: int = 1000

    if __name__ == "__main__":
        run(main, Config, example="python -m training.train_baseline --data data/world --out runs/baseline")

Flags are the field names with dashes. A bool needs no value (`--dry-run`, `--no-dry-run`), a list field may be repeated
or given as commas (`--url a --url b`, `--url a,b`; repeated only, where its metadata say REPEATED_ONLY); `--url+ c`
adds to what the list has without it. Unknown flags and unknown YAML keys are errors. A path may lie in an object store
(`s3://bucket/labels`, ranking/object_store.py).
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import re
import sys
import typing
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser

from ranking.errors import InputError
from ranking.extras import missing_module
from ranking.object_store import Remote, as_addressed, staged
from ranking.telemetry import hide_unread_bars

C = TypeVar("C")

EXIT_BAD_INPUT = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

# metadata of a list field whose values are taken as they are: in the ids of others a comma may be a part of one
REPEATED_ONLY = {"repeated_only": True}


class _Parser(ArgumentParser):
    """jsonargparse with dashes in flag names and one-line errors."""

    def format_help(self, *formatter: Any) -> str:
        return _as_typed(super().format_help(*formatter))

    def error(self, message: str, *_: Any, **__: Any) -> NoReturn:
        line = " ".join(str(message).split()) or "bad arguments"
        says, colon, names = line.partition("are required: ")
        if colon:
            line = says + colon + ", ".join(f"--{name}" for name in names.split(", "))
        line = _as_typed(line)
        print(f"{self.prog}: error: {line} (see --help)", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def _as_typed(text: str) -> str:
    """Flags in text with dashes, as people type them, and types by their names."""
    text = re.sub(r"<class\s+'(?:\w+\.)*(\w+)'>", r"\1", text)
    return re.sub(r"--[a-z][a-z0-9_.]*", lambda flag: flag[0].replace("_", "-"), text)


def _program_name() -> str:
    """The command as typed: `python -m training.evaluate` or `label_corpus.py`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec is not None else Path(sys.argv[0]).name


def _field_types(config_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    return {f.name: hints[f.name] for f in dataclasses.fields(config_class)}


def _repeated_only(config_class: type) -> set[str]:
    return {f.name for f in dataclasses.fields(config_class) if REPEATED_ONLY.items() <= f.metadata.items()}


def _is_list(kind: Any) -> bool:
    if typing.get_origin(kind) in (typing.Union, UnionType):
        return any(_is_list(part) for part in typing.get_args(kind))
    return kind is list or typing.get_origin(kind) is list


def _normalise(
    argv: Sequence[str], types: dict[str, Any], positional: Sequence[str], repeated_only: Set[str]
) -> list[str]:
    """Rewrite dashes, bare bools, repeated lists and bare words to jsonargparse's forms, --config first: flags win.

    repeated_only: list fields whose values are taken as they are.
    """
    configs: list[str] = []
    rest: list[str] = []
    lists: dict[str, list[str]] = {}
    pending, bare = list(argv), list(positional)
    while pending:
        word = pending.pop(0)
        if not word.startswith("--") or word == "--":
            rest.append(word if word.startswith("-") or not bare else f"--{bare.pop(0)}={word}")
            continue
        flag, equals, value = word[2:].partition("=")
        name, dot, tail = flag.partition(".")
        name, tail = name.replace("-", "_"), tail.replace("-", "_")
        if name == "config":
            configs += ["--config", value if equals else pending.pop(0) if pending else ""]
            continue
        if name.startswith("no_") and types.get(name[3:]) is bool and not equals:
            rest.append(f"--{name[3:]}=false")
            continue
        field_name = name.removesuffix("+")
        kind = types.get(field_name)
        if kind is bool and not equals:
            given = pending[0].lower() if pending else ""
            rest.append(f"--{name}={pending.pop(0)}" if given in ("true", "false") else f"--{name}=true")
        elif kind is not None and _is_list(kind):
            values = [value] if equals else []
            while not equals and pending and not pending[0].startswith("--"):
                values.append(pending.pop(0))
            if values and field_name in repeated_only:
                lists.setdefault(name, []).extend(values)
            elif len(values) == 1 and values[0].startswith("[") and (whole := _json_list(values[0])) is not None:
                lists[name] = [*lists.get(name, []), *whole] if name.endswith("+") else whole
            elif not values:
                rest.append(f"--{name}")  # the parser says that a value is missing
            else:
                lists.setdefault(name, []).extend(part for v in values for part in v.split(",") if part)
        elif kind is not None and not equals and pending:
            rest.append(f"--{name}{dot}{tail}={pending.pop(0)}")
        else:
            rest.append(f"--{name}{dot}{tail}{equals}{value}")
    for name in sorted(lists, key=lambda name: name.endswith("+")):  # whole lists first, then what is added to them
        rest.append(f"--{name}={json.dumps(lists[name])}")
    return configs + rest


def _json_list(text: str) -> list[str] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, list) else None


def parse(
    config_class: type[C],
    argv: Sequence[str] | None = None,
    *,
    example: str = "",
    prog: str | None = None,
    positional: Sequence[str] = (),
) -> C:
    """Parse argv (default: the command line) into a config_class. Exits with 2 and a line on a bad flag or key.

    positional: fields that may also be given as bare words, in this order.
    """
    argv = sys.argv[1:] if argv is None else argv
    prog = prog or _program_name()
    summary = (config_class.__doc__ or "").strip().split("\n\n")[0]
    parser = _Parser(prog=prog, description=summary, epilog=f"example: {example}" if example else None)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags win over it")
    # the types of an inherited group are names in its owner's module; jsonargparse would look for them in the program's
    config_class.__init__.__annotations__.update(_field_types(config_class))
    parser.add_class_arguments(config_class, None)
    for action in parser._actions:  # a field of a nested group has the group's default, but is called required
        action.required = action.required and action.default is None
    normal = _normalise(argv, _field_types(config_class), positional, _repeated_only(config_class))
    namespace = parser.parse_args(normal)
    try:
        values = parser.instantiate_classes(namespace).as_dict()
        return config_class(**{name: values[name] for name in _field_types(config_class)})
    except ValueError as problem:  # raised by __post_init__ checks: the message names the field and the fix
        parser.error(str(problem))


def run(
    main: Callable[[C], int | None],
    config_class: type[C],
    *,
    example: str,
    argv: Sequence[str] | None = None,
    positional: Sequence[str] = (),
) -> NoReturn:
    """Parse, run, and turn InputError into one line on stderr. Exits the process with main's code (None is 0)."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for every request
    config = parse(config_class, argv, example=example, positional=positional)
    hide_unread_bars()
    remotes: list[Remote] = []
    try:
        with staged(config) as remotes:
            code = main(config) or 0
    except InputError as problem:
        print(f"error: {as_addressed(str(problem), remotes)}", file=sys.stderr)
        code = problem.exit_code
    except ModuleNotFoundError as problem:
        if sys.modules.get(
            (problem.name or "").partition(".")[0]
        ):  # a part of a package that is there: a fault of ours
            raise
        print(f"error: {missing_module(problem)}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        code = EXIT_BAD_INPUT
    except OSError as problem:
        # a path that cannot be written, a full disk: the user's to mend, and no stack trace helps
        if problem.filename is None and problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{problem.filename}: " if problem.filename is not None else ""
        print(f"error: {where}{problem.strerror or problem}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    sys.exit(code)
