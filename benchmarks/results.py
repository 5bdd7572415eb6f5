"""Every page of docs/results made again by the commands that it names: `make results`, `make results ONLY=clicklog`.

A page holds one mark for each command that measures something:

    <!-- made by
    run: python -m benchmarks.serving.gpu
    needs: [gpu]
    -->
    (what the command printed last, and on which machine)
    <!-- end of what it made -->

`make results` runs the commands one after the other and puts what they print between the marks. A command whose needs
this machine lacks is not run: what stands between its marks stays, or "Not run here" does where nothing stands. A
command that fails is reported at the end, and the others run all the same. Datasets and demo runs that a command reads
are made first. At the end the README gets the pages' figures (benchmarks/readme_figures.py).
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from benchmarks import readme_figures
from ranking.errors import InputError
from ranking.files import write_text
from ranking.program import run

LOGGER = logging.getLogger(__name__)
ROOT = Path(__file__).parents[1]
MARK = re.compile(r"<!-- made by\n(.*?)-->\n(.*?)<!-- end of what it made -->\n", flags=re.S)
WIDTH = 120
NOT_RUN = "*Not run here: "

# what commands read: folder -> the command that makes it
PREPARED = {
    "data/world": "python -m training.prepare_data --source world --out data/world",
    "data/msrd": 'python -m training.prepare_data --source beir:$MSRD --out data/msrd --licence "CC BY-SA 4.0"',
    "runs/demo": "python -m demo.run --out runs/demo",
    "runs/demo-data": "python -m demo.run --data $MSRD --limit 400 --out runs/demo-data",
    "runs/msrd_students": "python -m benchmarks.students.msrd --source beir:$MSRD --out runs/msrd_students",
}


@dataclass(frozen=True)
class Made:
    """A command and the page that shows what it prints.

    run: the command; $MSRD, $OBD, $INFINITY and $OPTIMUM stand for paths of this machine. before: commands to run
    first. needs: `gpu`; `server HOST:PORT`, which must answer.
    """

    page: Path
    run: str
    before: list[str] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, page: Path, mark: str) -> Made:
        """From the text of a mark. InputError if it is none."""
        try:
            made = cls(page, **yaml.safe_load(mark))
        except (TypeError, yaml.YAMLError) as error:
            raise InputError(f"{page}: a mark has run, before and needs: {error}") from error
        unknown = [need for need in made.needs if need != "gpu" and not need.startswith("server ")]
        if unknown:
            raise InputError(f"{page}: needs {unknown}: gpu and `server HOST:PORT` are known")
        return made

    def commands(self) -> list[str]:
        """What has to be run, in order, without what is prepared for all."""
        return [*self.before, self.run]

    def reads(self) -> list[str]:
        """The prepared folders that the commands name."""
        words = " ".join(self.commands())
        return [folder for folder in PREPARED if re.search(rf"{re.escape(folder)}(?![\w-])", words)]


@dataclass
class Config:
    """Make the pages of docs/results again.

    Args:
        only: pages without .md, e.g. clicklog; none for all
        pages: their folder
        msrd: MSRD in BEIR's form; its commands are not run where it is missing
        obd: the Open Bandit Dataset, the same
        infinity: Python of an environment with benchmarks/serving/infinity_requirements.txt, the same
        optimum: Python of an environment with benchmarks/serving/optimum_requirements.txt, the same
        logs: folder for what the commands print
        limit_minutes: a command that takes longer is ended and counts as failed
        show: print which commands would be run, and why others would not, and end
    """

    only: list[str] = field(default_factory=list)
    pages: Path = ROOT / "docs" / "results"
    msrd: Path = Path("../shared/data/msrd")
    obd: Path = Path("../shared/data/obd")
    infinity: Path = Path("runs/infinity/bin/python")
    optimum: Path = Path("runs/optimum/bin/python")
    logs: Path = Path("runs/results")
    limit_minutes: float = 180.0
    show: bool = False


def main(config: Config) -> int:
    """Run the commands of the pages that were asked for. Returns 1 if one failed."""
    outcomes: list[tuple[Made, str, str]] = []
    for made in commands_of(config.pages, config.only):
        reason = lacking(made, config)
        if config.show:
            print(f"{made.page.stem}: {made.run}" + (f"   (not run here: {reason})" if reason else ""))
            continue
        state, detail = attempt(made, reason, config)
        outcomes.append((made, state, detail))
        LOGGER.info("%s: %s: %s", state, made.page.stem, made.run)
    if config.show:
        return 0
    for made, state, detail in outcomes:
        print(f"{state:8} {made.page.stem}: {made.run}" + (f"   ({detail})" if detail else ""))
    readme_figures.main(readme_figures.Config(root=config.pages.parents[1], write=True))
    return int(any(state == "failed" for _, state, _ in outcomes))


def commands_of(pages: Path, only: list[str]) -> Iterator[Made]:
    """The marks of the pages, in their order. InputError for a page that is not there."""
    known = {page.stem: page for page in sorted(pages.glob("*.md"))}
    unknown = sorted(set(only) - set(known))
    if unknown:
        raise InputError(f"{', '.join(unknown)}: no such page; {pages} has {', '.join(known)}")
    for name, page in known.items():
        if not only or name in only:
            for mark in MARK.finditer(page.read_text(encoding="utf-8")):
                yield Made.read(page, mark[1])


def lacking(made: Made, config: Config) -> str:
    """Why this machine cannot run the command; empty if it can."""
    paths = paths_of(config)
    words = " ".join([*made.commands(), *(PREPARED[folder] for folder in made.reads() if not Path(folder).exists())])
    for name, path in paths.items():
        if f"${name}" in words and not path.exists():
            return f"no {name} at {path}"
    for need in made.needs:
        if need == "gpu" and not gpu():
            return "no CUDA device"
        if need.startswith("server ") and not listens(need.removeprefix("server ")):
            return f"no server answers at {need.removeprefix('server ')}"
    return ""


def paths_of(config: Config) -> dict[str, Path]:
    """The paths that commands name by a variable."""
    return {"MSRD": config.msrd, "OBD": config.obd, "INFINITY": config.infinity, "OPTIMUM": config.optimum}


def gpu() -> str:
    """The CUDA device as the driver names it; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip().replace("\n", ", ")


def listens(address: str) -> bool:
    """Whether something accepts connections there."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=2):
            return True
    except OSError:
        return False


def attempt(made: Made, reason: str, config: Config) -> tuple[str, str]:
    """Run one command with what it reads and put its output on its page; returns what became of it, and why."""
    if reason:
        fill(made, lambda old: old if old.strip() else f"\n{NOT_RUN}{reason}.*\n\n")
        return "not run", reason
    started = time.monotonic()
    try:
        for folder in made.reads():
            if not Path(folder).exists():
                call(PREPARED[folder], made, config)
        for command in made.before:
            call(command, made, config)
        printed = call(made.run, made, config)
    except InputError as error:
        return "failed", str(error)
    about = f"*{machine()}; {time.monotonic() - started:.0f} s.*"
    content = f"\n{as_markdown(printed)}\n\n{about}\n\n"
    return "made", "" if fill(made, lambda _: content) else "the command writes the page itself"


def call(command: str, made: Made, config: Config) -> str:
    """Run a command in the repository's root; returns its stdout. InputError if it fails or takes too long."""
    config.logs.mkdir(parents=True, exist_ok=True)
    log = config.logs / f"{made.page.stem}.log"
    environment = {**os.environ, **{name: str(path) for name, path in paths_of(config).items()}}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with log.open("a", encoding="utf-8") as errors:
        errors.write(f"\n$ {command}\n")
        errors.flush()
        started = subprocess.Popen(
            ["/bin/bash", "-c", command], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            printed, _ = started.communicate(timeout=config.limit_minutes * 60)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGTERM)  # with the servers that it started
            started.wait()
            raise InputError(f"not done after {config.limit_minutes:g} minutes; {log} has its end") from None
        errors.write(printed)
    if started.returncode:
        raise InputError(f"exit code {started.returncode}; {log} has its end")
    return printed


def fill(made: Made, content: Callable[[str], str]) -> bool:
    """Put content(what stands there) between the marks of a command; False for a command that writes its page."""
    if "docs/results" in made.run:
        return False
    text = made.page.read_text(encoding="utf-8")

    def filled(mark: re.Match[str]) -> str:
        if Made.read(made.page, mark[1]) != made:
            return mark[0]
        return f"<!-- made by\n{mark[1]}-->\n{content(mark[2])}<!-- end of what it made -->\n"

    write_text(made.page, MARK.sub(filled, text))
    return True


def machine() -> str:
    """Date, processors, GPU and load."""
    devices = f"{os.cpu_count()} {platform.machine()} cores, {gpu() or 'no GPU'}"
    return f"{datetime.now(UTC):%Y-%m-%d}, {devices}, load average {os.getloadavg()[1]:.1f} at the end"


def as_markdown(printed: str) -> str:
    """What a command printed as part of a page: tables as they are, JSON as tables, other text as it was.

    A title of a whole page is left out, since the page has its own.
    """
    lines = [line.rstrip() for line in printed.strip().splitlines()]
    if any(re.match(r"\|[ :-]+\|", line) for line in lines):
        kept = [line for line in lines if not line.startswith("# ")]
        wrapped = [line if line.startswith("|") else textwrap.fill(line, WIDTH) for line in kept]
        return "\n".join(wrapped).strip()
    records = json_records(printed)
    if records:
        return "\n\n".join(tables_of(records))
    return "```\n" + "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="    ") for line in lines) + "\n```"


def json_records(printed: str) -> list[dict[str, Any]]:
    """The JSON objects that make up the text, one after the other; none if it is something else."""
    decoder, records, rest = json.JSONDecoder(), [], printed.strip()
    while rest:
        try:
            record, end = decoder.raw_decode(rest)
        except ValueError:
            return []
        if not isinstance(record, dict):
            return []
        records.append(record)
        rest = rest[end:].lstrip()
    return records


def tables_of(records: list[dict[str, Any]]) -> Iterator[str]:
    """Records with the same keys, next to each other, as one table; a record alone as one row for each of its keys."""
    while records:
        keys = list(records[0])
        alike = [r for r in records if list(r) == keys]
        records = [r for r in records if list(r) != keys]
        if len(alike) == 1:
            rows = [["figure", "value"], ["---", "---"], *([key, value] for key, value in alike[0].items())]
        else:
            rows = [keys, ["---"] * len(keys), *(list(r.values()) for r in alike)]
        yield "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows)


def cell(value: Any) -> str:
    """A value as a table's cell; a list or an object without quotes and braces."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {cell(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|")


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.results --only clicklog")
