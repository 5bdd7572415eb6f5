"""Lists every program of DisRanker, and runs the one that is named.

    python -m disranker --help
    python -m disranker prepare-data --help
    source <(python -m disranker --completion bash)

A program runs in this command's place, exactly as `python -m FOLDER.NAME` would run it.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from disranker.completion import SHELLS, candidates, script
from disranker.needs import missing_package
from disranker.programs import Program, read_programs
from ranking.extras import remedy

_ROOT = Path(__file__).resolve().parents[1]
_USAGE = """usage: disranker PROGRAM [flags of the program]
       disranker PROGRAM --help
       disranker --completion {shells}     a script for your shell to source

DisRanker distils a large language model ranker into a BERT, serves it and tests it against what ranks today.
"""


def listing(programs: Sequence[Program]) -> str:
    """Every program with one line, by stage."""
    width = max(len(program.name) for program in programs) + 2
    lines = []
    for stage in dict.fromkeys(program.stage for program in programs):
        lines += ["", stage]
        lines += [f"  {p.name:{width}}{p.purpose}" for p in programs if p.stage == stage]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the list or a completion script, or become the program that is named. Exit code 2 for an unknown name.

    1 if a package that the program needs is not installed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    programs = read_programs()
    by_name = {program.name: program for program in programs}
    if not words or words[0] in ("--help", "-h", "help"):
        print(_USAGE.format(shells="|".join(SHELLS)) + listing(programs))
        return 0
    if words[0] == "--completion":
        if words[1:] not in [[shell] for shell in SHELLS]:
            print(f"disranker: error: --completion needs one of {', '.join(SHELLS)}", file=sys.stderr)
            return 2
        print(script(words[1]))
        return 0
    if words[0] == "--complete":  # what the completion scripts ask: the words typed so far, the last one unfinished
        print("\n".join(candidates(by_name, words[1:])))
        return 0
    program = by_name.get(words[0].replace("_", "-"))
    if program is None:
        near = difflib.get_close_matches(words[0], by_name, 1)
        hint = f"; did you mean {near[0]}?" if near else " (see --help)"
        print(f"disranker: error: no program is called {words[0]!r}{hint}", file=sys.stderr)
        return 2
    missing = missing_package(program.module)
    if missing is not None:
        print(f"disranker: error: {program.name} needs {missing}: {remedy(missing)}", file=sys.stderr)
        return 1
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *_not_from_here(), "-m", program.module, *words[1:]])


def _not_from_here() -> list[str]:
    """The interpreter's flag by which a folder `training` or `build` where the user stands is not taken for ours.

    None in a checkout that is not installed: there our folders are found only because one stands there.
    """
    installed = any(Path(entry).resolve() == _ROOT for entry in sys.path[1:] if entry)
    return ["-P"] if installed else []


if __name__ == "__main__":
    sys.exit(main())
