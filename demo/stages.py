"""Running stages one after the other, or one beside another: each once, timed, and not again after an interruption."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.preflight import cores
from ranking.errors import InputError
from ranking.files import only_holder, replacing
from serving.temporary_server import end_with_parent

ROOT = Path(__file__).parents[1]
TAIL_BYTES = 16_384  # of a program's output, kept to show its progress and the end of a failure
FAILURE_LINES = 25

_log: ContextVar[Path] = ContextVar("log", default=Path(os.devnull))  # where the running stage's programs write
# in a stage that runs beside another one: once this is set, its programs end
_stopping: ContextVar[threading.Event | None] = ContextVar("stopping", default=None)


class ProgramFailed(InputError):
    """A command of the product ended with another exit code than may be. code: the exit code, below 0 for a signal."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@dataclass
class Stages:
    """The record of a demo run in `folder`/stages.json: what is finished, with which settings, and how long it took.

    A stage whose settings changed, or whose folder somebody removed, runs again, and so does every stage after it:
    their input is another one. What they had made is removed first. A stage that was interrupted keeps what it had
    made, and goes on from there.
    """

    folder: Path
    total: int
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    number: int = 0
    writing: threading.Lock = field(default_factory=threading.Lock)  # of `known` and its file

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._path.is_file():
            try:
                self.known = json.loads(self._path.read_text(encoding="utf-8"))
            except ValueError as problem:
                raise InputError(f"{self._path}: cannot be read ({problem}); without it every stage runs") from problem

    @property
    def _path(self) -> Path:
        return self.folder / "stages.json"

    def run(
        self,
        name: str,
        title: str,
        work: Callable[[], dict[str, Any] | None],
        settings: Any = None,
        made: Path | None = None,
    ) -> dict[str, Any]:
        """Run work() unless it is recorded with the same settings; returns what it returned, now or then.

        made: folder that work() fills, which goes away when it has to start afresh.
        """
        number, found = self._begin(name, title, settings, made)
        return self._work(name, number, work) if found is None else found

    def _begin(self, name: str, title: str, settings: Any, made: Path | None) -> tuple[int, dict[str, Any] | None]:
        """Number the stage, print its title and put it on record; what it returned if it need not run, else None."""
        self.number += 1
        header = f"[{self.number:>2}/{self.total}] {title}"
        settings = json.loads(json.dumps(settings, default=str))
        before = self.known.get(name)
        if before is not None and _is_gone(before):
            note(f"{before['made']} is gone: this stage and all after it run again")
            before["outdated"] = True
        if before is not None and (before["outdated"] or before["settings"] != settings):
            self._start_afresh(before)
            before = None
        if before is not None and before["seconds"] is not None:
            print(f"{header}: done before ({before['seconds']:.0f} s)", flush=True)
            return self.number, before["found"]
        record = {"number": self.number, "settings": settings, "made": made, "outdated": False, "seconds": None}
        self._record(name, record)
        print(header, flush=True)
        return self.number, None

    def _work(self, name: str, number: int, work: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """Do a stage's work, its output in its log, and put on record how long it took."""
        log = self.folder / "logs" / f"{number:02}-{name}.log"
        log.parent.mkdir(exist_ok=True)
        began, before_it = time.perf_counter(), _log.set(log)
        try:
            found = work() or {}
        finally:
            _log.reset(before_it)
        seconds = time.perf_counter() - began
        self._record(name, self.known[name] | {"seconds": round(seconds, 2), "found": found})
        note(f"{seconds:.0f} s" if _stopping.get() is None else f"{name}: {seconds:.0f} s")
        return found

    @contextmanager
    def beside(self, name: str, title: str, *command: str | Path, made: Path | None = None) -> Iterator[None]:
        """A stage as program() has it, beside the stages of the block and on half of the cores; the block's end waits.

        Its failure is raised there. A failure or an interruption of the block stops it, and the next run goes on with
        it. Nothing in the block may need what it makes.
        """
        settings, work = self._program(command, made)
        number, found = self._begin(name, title, settings, made)
        if found is not None:
            yield
            return
        stop = threading.Event()

        def run_beside() -> None:
            _stopping.set(stop)
            self._work(name, number, work)

        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(run_beside)
            try:
                yield
                running.result()
            except BaseException:
                stop.set()
                raise

    def _start_afresh(self, before: dict[str, Any]) -> None:
        """Remove what the stage had made. All from it on are marked first, so that a stop in between forgets none."""
        with self.writing:
            for stage in self.known.values():
                if stage["number"] >= self.number:
                    stage["outdated"] = True
            self._save()
        if before["made"] is not None:
            shutil.rmtree(before["made"], ignore_errors=True)

    def program(self, name: str, title: str, *command: str | Path, made: Path | None = None) -> None:
        """A stage that is one command of the product; the text of a configuration file counts as settings too.

        made: the checkpoint folder of a training, which an interrupted one continues in.
        """
        settings, work = self._program(command, made)
        self.run(name, title, work, settings, made)

    def _program(self, command: tuple[str | Path, ...], made: Path | None) -> tuple[list[str], Callable[[], None]]:
        """A command's settings, and the work that runs it."""
        words = [str(word) for word in command]
        texts = [(ROOT / word).read_text(encoding="utf-8") for word in words if word.endswith(".yaml")]

        def work() -> None:
            # before its first checkpoint a run has nothing to go on from, and what made it fail may have been mended
            begun = made is not None and any((made / "training").rglob("checkpoint-*/trainer_state.json"))
            run_program(*command, *(["--resume"] if begun else []))

        return [*words, *texts], work

    def _record(self, name: str, record: dict[str, Any]) -> None:
        with self.writing:
            self.known[name] = record
            self._save()

    def _save(self) -> None:
        with replacing(self._path) as aside:
            aside.write_text(json.dumps(self.known, indent=2, default=str), encoding="utf-8")


def one_run(folder: Path) -> AbstractContextManager[None]:
    """Hold a run's folder. InputError if another run has it."""
    return only_holder(folder / ".lock", f"{folder}: another run works in it: end that one, or give another OUT=")


def _is_gone(stage: dict[str, Any]) -> bool:
    """Whether a finished stage had made a folder that is no longer there."""
    return stage["seconds"] is not None and stage["made"] is not None and not Path(stage["made"]).exists()


def run_program(*command: str | Path, accept: tuple[int, ...] = (0,)) -> None:
    """Run `python COMMAND...` from the repository's root: its output goes to the stage's log, one line of it here.

    accept: exit codes after which the stage goes on. ProgramFailed after any other, and the end of its output.
    """
    words = [str(word) for word in command]
    note(f"python {shlex.join(words)}")
    stopping = _stopping.get()
    environment = {"TQDM_MININTERVAL": "1", **os.environ}  # a log needs no ten states of a progress bar a second
    if stopping is not None:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // 2)))
    began, tail, latest = time.perf_counter(), b"", ""
    with _log.get().open("ab") as output, _log.get().open("rb") as reader:
        reader.seek(0, os.SEEK_END)
        child = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,  # a training that went on alone would meet the next run's in its folder
        )
        try:
            while child.poll() is None:
                time.sleep(0.2)
                tail = (tail + reader.read())[-TAIL_BYTES:]
                if stopping is None:
                    latest = last_words(tail) or latest
                    _progress(f"{time.perf_counter() - began:4.0f} s  {latest}")
                elif stopping.is_set():
                    raise InputError("stopped, because the stage that it ran beside was")
        finally:
            if stopping is None:
                _progress("")
            if child.poll() is None:  # this program was stopped: the stage goes on where it was the next time
                child.terminate()
                child.wait()
        tail += reader.read()
    if child.returncode not in accept:
        print("\n".join(_lines(tail)[-FAILURE_LINES:]), file=sys.stderr)
        raise ProgramFailed(
            f"stopped at: python {shlex.join(words)} (exit code {child.returncode}); its whole output is in "
            f"{_log.get()}; run again to go on from here",
            child.returncode,
        )


def _lines(output: bytes) -> list[str]:
    """What stood on the terminal's lines one after the other; a progress bar's states are lines too."""
    return [line.rstrip() for line in output.decode(errors="replace").replace("\r", "\n").split("\n") if line.strip()]


def last_words(output: bytes) -> str:
    """The last line of a program's output that tells a person something: no JSON. "" if there is none."""
    told = [line.strip() for line in _lines(output) if not line.strip().startswith(("{", "}", '"', "["))]
    return told[-1] if told else ""


def _progress(words: str) -> None:
    """Replace the progress line; on a terminal alone, since a file would collect all of them."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print("\r" + f"        {words}"[:width].ljust(width) + ("" if words else "\r"), end="", flush=True)


def note(words: str) -> None:
    """Print a line below the running stage's title."""
    print(f"        {words}", flush=True)
