"""Takes a person out of the A/B log: the raw files, the Parquet days made from them, and the small files beside."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clients.ab.log.compaction import FILE_MODE, read_small_file
from clients.ab.log.days_lock import days_lock
from clients.ab.log.lines import decode, encode
from clients.ab.log.privacy import Privacy
from clients.ab.log.quarantine import REJECTS
from clients.ab.log.reader import log_files, still_there
from ranking.errors import DataError, InputError
from ranking.files import replacing, write_json
from ranking.schema import TABLES, iter_table, reading, write_table

logger = logging.getLogger("ab_log")

TABLES_OF_DAYS = ("exposures", "events", "shadows")
# clicks and shadow scores are a person's by their page alone: without this note, those in a file that could not be
# changed in the run that erased the page would be nobody's in the next one
PENDING = ".erasure-pending.json"


@dataclass
class Erased:
    """What was erased.

    pages: exposures; lines: of raw files; rows: of Parquet days; in_use: raw files left alone; not_found: user ids of
    whom no page was there.
    """

    pages: int = 0
    lines: int = 0
    rows: int = 0
    in_use: list[str] = field(default_factory=list)
    not_found: list[str] = field(default_factory=list)


class Erasure:
    """Removes everything stored under any of a person's names.

    user_ids: as the caller of the router knows them; salts: every salt that was ever in use, since each gives a person
    another stored name. What is stored under the raw id is removed too.
    """

    def __init__(self, user_ids: Iterable[str], salts: Iterable[bytes] = ()):
        users = list(user_ids)
        self._user_of = {user: user for user in users}
        self._user_of |= {Privacy(salt).user(user): user for salt in salts for user in users}
        self.names = self._user_of.keys()
        self._found: set[str] = set()
        self._requests: set[str] = set()
        self.erased = Erased()

    def run(self, raw: Path | None, data: Path | None) -> Erased:
        """Erase from the raw log folder and from the compacted folder, each if given. InputError: no such folder.

        Waits for a compaction, which has read what is erased here and would write it again.
        """
        if data is None:
            return self._run(raw, None)
        if not data.is_dir():
            raise InputError(f"{data}: no such folder of compacted days")
        with days_lock(data):
            return self._run(raw, data)

    def _run(self, raw: Path | None, data: Path | None) -> Erased:
        files = log_files(raw) if raw is not None else []
        if raw is not None:
            remove_half_written(raw)
        folders = [folder for folder in (raw, data) if folder is not None]
        # clicks and shadow scores are known by the page's id alone: the pages come first
        for path in files:
            for line in _lines(path):
                self._note(decode(line) or {})
        days = [path for table in TABLES_OF_DAYS for path in sorted((data / table).glob("*.parquet"))] if data else []
        for path in days:
            if path.parent.name == "exposures":
                for rows in _columns(path, "user_id", "request_id"):
                    mine = rows.filter(self._by_name(rows))
                    self._requests.update(mine.column("request_id").to_pylist())
                    self._found.update(self._user_of[name] for name in mine.column("user_id").unique().to_pylist())
        marks = {_mark(name): user for name, user in self._user_of.items()}
        of_found = {mark for mark, user in marks.items() if user in self._found}
        begun: dict[str, set[str]] = {"requests": set(self._requests), "users": of_found}
        for folder in folders:  # a person's pages may be gone already while their clicks are left
            for kind, values in _pending(folder / PENDING).items():
                begun[kind].update(values)
        self._requests = begun["requests"]
        self._found.update(marks[mark] for mark in begun["users"] & marks.keys())
        self.erased.pages = len(self._requests)
        self.erased.not_found = [user for user in dict.fromkeys(self._user_of.values()) if user not in self._found]
        for folder in folders if self._requests else ():
            write_json(folder / PENDING, {kind: sorted(values) for kind, values in begun.items()})
            (folder / PENDING).chmod(FILE_MODE)
        for path in files:
            self._raw_file(path)
        for path in days:
            self._day(path)
        if data is not None:
            self._small_files(data)
        if not self.erased.in_use:
            for folder in folders:
                (folder / PENDING).unlink(missing_ok=True)
        return self.erased

    def _note(self, record: dict[str, Any]) -> None:
        name, request = record.get("user_id"), record.get("request_id")
        if isinstance(name, str) and name in self.names and isinstance(request, str):
            self._requests.add(request)
            self._found.add(self._user_of[name])

    def _is_theirs(self, record: dict[str, Any]) -> bool:
        return _hashable(record.get("user_id")) in self.names or _hashable(record.get("request_id")) in self._requests

    def _without_them(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """The record without the person: None if it is theirs, else without their entry among the forced users."""
        if self._is_theirs(record):
            return None
        definition = record.get("definition")
        forced = definition.get("forced") if isinstance(definition, dict) else None
        if isinstance(definition, dict) and isinstance(forced, dict) and self.names & forced.keys():
            kept = {user: arm for user, arm in forced.items() if user not in self.names}
            return {**record, "definition": {**definition, "forced": kept}}
        return record

    def _raw_line(self, line: bytes) -> bytes:
        record = decode(line)
        if record is None:  # torn or damaged: nobody reads it, but a name may stand in it
            return b"" if any(name.encode("utf-8", "surrogatepass") in line for name in self.names) else line
        kept = self._without_them(record)
        return b"" if kept is None else line if kept is record else encode(kept)[:-1]

    def _raw_file(self, path: Path) -> None:
        with still_there(path):
            stream = path.open("rb")
        with stream:
            changed = sum(self._raw_line(line) != line for line in _lines(path))
            if not changed:
                return
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.erased.in_use.append(str(path))
                return
            with replacing(path) as aside, aside.open("wb") as out:
                aside.chmod(FILE_MODE)
                out.writelines(kept + b"\n" for line in _lines(path) if (kept := self._raw_line(line)))
        self.erased.lines += changed

    def _day(self, path: Path) -> None:
        table = path.parent.name
        named = [name for name in ("request_id", "user_id") if name in TABLES[table].schema.names]
        theirs = sum(pc.sum(self._of_them(rows)).as_py() or 0 for rows in _columns(path, *named))
        if theirs:
            # piece by piece: a day of pages with their text may be larger than the memory
            write_table(path, table, (rows.filter(pc.invert(self._of_them(rows))) for rows in iter_table(path, table)))
            path.chmod(FILE_MODE)
            self.erased.rows += theirs

    def _of_them(self, rows: pa.Table | pa.RecordBatch) -> pa.Array:
        theirs = pc.is_in(rows.column("request_id"), pa.array(sorted(self._requests), pa.string()))
        return pc.or_(theirs, self._by_name(rows)) if "user_id" in rows.schema.names else theirs

    def _by_name(self, rows: pa.Table | pa.RecordBatch) -> pa.Array:
        return pc.is_in(rows.column("user_id"), pa.array(sorted(self.names), pa.string()))

    def _small_files(self, data: Path) -> None:
        definitions = data / "experiments.json"
        if definitions.is_file():
            known = read_small_file(definitions)
            kept = {fingerprint: self._without_them(entry) for fingerprint, entry in known.items()}
            if kept != known:
                write_json(definitions, kept)
                definitions.chmod(FILE_MODE)
        rejects = data / REJECTS
        if rejects.is_file():
            lines = rejects.read_text(encoding="utf-8").splitlines()
            try:
                others = [line for line in lines if not self._is_theirs(json.loads(line)["record"])]
            except (ValueError, KeyError, TypeError) as problem:
                raise InputError(f"{rejects}: cannot be read; remove it, ab_compact.py writes it anew") from problem
            if len(others) < len(lines):
                with replacing(rejects) as aside:
                    aside.write_text("".join(line + "\n" for line in others), encoding="utf-8")
                    aside.chmod(FILE_MODE)


def remove_half_written(raw: Path) -> None:
    """Remove what a killed erasure left beside raw files: they may hold the pages of whoever is erased now.

    Not so of a file whose lock somebody holds: another erasure may be writing it.
    """
    for part in sorted(raw.glob(".*.ablog.*.part")):
        with ExitStack() as held:
            try:
                of = held.enter_context((raw / part.name[1:].rsplit(".", 2)[0]).open("rb"))
                fcntl.flock(of, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:  # retention has removed it since
                pass
            except BlockingIOError:
                continue
            part.unlink(missing_ok=True)
            logger.warning("%s: removed; an erasure that was killed had left it", part)


def _mark(name: str) -> str:
    """Of a name, by which it is known again without being written down."""
    return hashlib.sha256(name.encode()).hexdigest()


def _pending(path: Path) -> dict[str, list[str]]:
    """`requests` that an erasure had found and did not erase everywhere, since it was killed or a file was in use, and
    marks of the `users` whose they are."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {kind: list(map(str, found[kind])) for kind in ("requests", "users") if found}
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise InputError(f"{path}: cannot be read ({problem}), so nobody knows what is left to erase") from problem


def _lines(path: Path) -> Iterator[bytes]:
    with still_there(path):
        stream = path.open("rb")
    with stream:
        for line in stream:
            yield line.rstrip(b"\n")


def _columns(path: Path, *names: str) -> Iterator[pa.RecordBatch]:
    """Some columns of a day, piece by piece. DataError if it cannot be read or lacks one."""
    with reading(path):
        file = pq.ParquetFile(path)
        if missing := set(names) - set(file.schema_arrow.names):
            raise DataError(path, f"has no column {', '.join(sorted(missing))}")
        yield from file.iter_batches(columns=list(names))


def _hashable(value: Any) -> str | None:
    return value if isinstance(value, str) else None
