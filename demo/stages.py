"""Running stages one after the other: each once, timed, and not again after an interruption."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ranking.errors import InputError
from ranking.schema import replacing

ROOT = Path(__file__).parents[1]


@dataclass
class Stages:
    """The record of a demo run in `folder`/stages.json: what is finished, with which settings, and how long it took.

    A stage whose settings changed runs again, and so does every stage after it: their input is another one.
    """

    folder: Path
    total: int
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    stale: bool = False
    number: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._path.is_file():
            self.done = json.loads(self._path.read_text(encoding="utf-8"))

    @property
    def _path(self) -> Path:
        return self.folder / "stages.json"

    def run(
        self, name: str, title: str, work: Callable[[], dict[str, Any] | None], settings: Any = None
    ) -> dict[str, Any]:
        """Run work() unless it is recorded with the same settings; returns what it returned, now or then."""
        self.number += 1
        header = f"[{self.number:>2}/{self.total}] {title}"
        settings = json.loads(json.dumps(settings, default=str))
        known = self.done.get(name)
        if known is not None and known["settings"] == settings and not self.stale:
            print(f"{header}: done before ({known['seconds']:.0f} s)", flush=True)
            return known["found"]
        self.stale = True
        for later in list(self.done):
            if self.done[later]["number"] >= self.number:
                del self.done[later]
        self._save()
        print(header, flush=True)
        began = time.perf_counter()
        found = work() or {}
        seconds = time.perf_counter() - began
        self.done[name] = {"number": self.number, "seconds": round(seconds, 2), "settings": settings, "found": found}
        self._save()
        print(f"        {seconds:.0f} s", flush=True)
        return found

    def program(self, name: str, title: str, *command: str | Path) -> None:
        """A stage that is one command of the product."""
        self.run(name, title, lambda: run_program(*command), [str(word) for word in command])

    def _save(self) -> None:
        with replacing(self._path) as aside:
            aside.write_text(json.dumps(self.done, indent=2), encoding="utf-8")


def run_program(*command: str | Path) -> None:
    """Run `python COMMAND...` from the repository's root, its progress on this terminal. InputError if it fails."""
    words = [str(word) for word in command]
    print(f"        python {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise InputError(
            f"stopped at: python {shlex.join(words)} (exit code {done.returncode}); run again to go on from here"
        )


@contextmanager
def step(words: str) -> Iterator[None]:
    """A part of a stage that takes a while, named on the terminal."""
    print(f"        {words} ...", flush=True)
    yield
