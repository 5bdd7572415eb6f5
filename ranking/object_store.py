"""Paths of programs that lie in an object store: s3://, gs://, abfs:// and hdfs:// wherever a program takes a path.

A program works on local files: what a setting names is fetched before it starts, and what it changed is published,
while it runs and at its end. pyarrow's file systems speak to the stores, and take credentials and endpoints as they
always do.

A store cannot rename, so a publication is whole once its record is there: `_published.json`, an object that is written
last and names every file with its size and SHA-256. A reader takes the files that the record names and checks each. A
record that says `complete: false` is written first, so that a publication that was broken off is never taken for a
folder that somebody else put there. Such folders have no record and get none: what others add to them later counts as
well. So do objects that others put beside the files of a record; a program that writes a single object into a published
folder puts it into the record.

A file that replaces a published one is first put aside, below `_replacing/`. The record then says for how long the new
file is to be read there, and only after that does it take its own name. Of files that come or go, the record says
before that nobody is to take them. So the old state is there until the record changes and the new one from then on,
wherever a writer is killed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from ranking.errors import InputError

RECORD_NAME = "_published.json"
ASIDE_FOLDER = "_replacing"
INTERVAL_VARIABLE = "DISRANKER_PUBLISH_SECONDS"  # how long what a program finished may stay on this machine alone: 60

logger = logging.getLogger("object_store")

_SCHEMES = "s3|gs|gcs|abfs|abfss|hdfs"
# pathlib makes one slash of two
_ADDRESS = re.compile(rf"^({_SCHEMES}):/{{1,2}}(?=[^/])")
_KIND_OF_ADDRESS = re.compile(rf"^(?:[^/:=]+=)?([a-z]+):(?:{_SCHEMES})://")  # checkpoint:s3://..., ours=table:s3://...
_WILD = re.compile(r"[*\[]")  # a question mark begins an address's options
_PIECE = 1 << 22
_WAITS = (0.5, 2.0)  # seconds between the tries of a store that refuses

Facts = tuple[int, str]  # size and SHA-256 of a file
Stamp = tuple[int, int, int]  # what changes with a local file's content
T = TypeVar("T")


def address(value: object) -> str | None:
    """The URL of an object store that a setting holds, as text or as a path; None for anything else."""
    if not isinstance(value, str | Path):
        return None
    text, matches = _ADDRESS.subn(r"\1://", str(value))
    return text.rstrip("/") if matches else None


@dataclass(frozen=True)
class _Record:
    """What `_published.json` says of a folder.

    files: what a reader takes; aside: those of them that lie below `_replacing/` under their digest; moving: objects
    that are half written or about to be removed, which nobody takes.
    """

    complete: bool = False
    files: dict[str, Facts] = field(default_factory=dict)
    aside: frozenset[str] = frozenset()
    moving: frozenset[str] = frozenset()


@dataclass
class Remote:
    """A file or folder of a store, and its copy here. pattern: takes only what it matches of the folder."""

    url: str
    local: Path
    pattern: str = ""
    known: dict[str, Facts] = field(default_factory=dict)  # what was there when it was last asked
    _stamps: dict[str, Stamp] = field(default_factory=dict)  # of the local files when they were copied
    _publishing: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        try:
            self._store, self._root = pafs.FileSystem.from_uri(self.url)
        except (pa.ArrowException, OSError, ValueError) as problem:
            raise InputError(f"{self.url}: {_line(problem)}") from problem

    def fetch(self) -> None:
        """Copy what is there and is not here yet. InputError: it cannot be read, or a file is not the published one.

        Of a folder these are the files of its record, and what others put beside them.
        """
        with self._asking():
            if not self.pattern and self._store.get_file_info(self._root).type == pafs.FileType.File:
                self.known[""] = self._download(self._root, self.local)
                self._stamps[""] = _stamp(self.local)
                return
            there = self._listed()  # before the record: what a publication adds after this look, the record knows
            record = self._read_record(self._root) or _Record(complete=True)
        if not record.complete:
            logger.warning("%s: its publication was broken off; nothing of it is taken", self.url)
            return
        published = {name: facts for name, facts in record.files.items() if self._wants(name)}
        of_others = {name for name in there - record.files.keys() - record.moving if self._wants(name)}
        for name in self.known.keys() - published.keys() - of_others:  # gone since the last time
            self._inside(name).unlink(missing_ok=True)
            self.known.pop(name), self._stamps.pop(name, None)
        for name, facts in published.items():
            if self.known.get(name) == facts and self._stamps.get(name) == _stamp(self._inside(name)):
                continue
            with self._asking():
                source = f"{ASIDE_FOLDER}/{facts[1]}" if name in record.aside else name
                found = self._download(f"{self._root}/{source}", self._inside(name))
            if found != facts:
                raise InputError(
                    f"{self.url}/{name}: not the file that was published; it is being replaced, damaged, or another "
                    f"program wrote over it: if it shall be taken as it is, remove {self.url}/{RECORD_NAME}"
                )
            self.known[name], self._stamps[name] = found, _stamp(self.local / name)
        for name in sorted(of_others):
            with self._asking():
                self.known[name] = self._download(f"{self._root}/{name}", self._inside(name))
            self._stamps[name] = _stamp(self.local / name)

    def publish(self) -> int:
        """Copy every file that is new or changed, then the record. Returns how many files were copied.

        A file that the program replaces or removes meanwhile goes with the next publication.
        """
        with self._publishing:
            return self._publish()

    def _publish(self) -> int:
        with self._asking():  # a folder that goes while it is listed, as an old checkpoint does, ends no publishing
            files = {"": self.local} if self.local.is_file() else dict(_visible_files(self.local))
        changed = {name: path for name, path in files.items() if self._stamps.get(name) != _stamp(path)}
        gone = set(self.known) - set(files)
        if not changed and not gone:
            return 0
        with self._asking():
            if "" in files or "" in gone:
                sent = self._publish_object(changed, gone)
            else:
                record = self._read_record(self._root)
                if record is None and not self.known and not self._listed():
                    record = _Record()  # this program makes the folder; one that others fill keeps being theirs
                left = record.moving - files.keys() if record else set()  # of a writer that was killed
                sent = self._send(self._root, record, changed, gone | left)
        for name in gone:
            self.known.pop(name), self._stamps.pop(name, None)
        for name, (facts, stamp) in sent.items():
            self.known[name], self._stamps[name] = facts, stamp
        return len(sent)

    def _publish_object(self, changed: dict[str, Path], gone: set[str]) -> dict[str, tuple[Facts, Stamp]]:
        """A single object appears whole by itself; if it lies in a published folder, it is a file of its record."""
        folder, _, name = self._root.rpartition("/")
        record = self._read_record(folder)
        if record is not None and not record.complete:
            record = None
        sent = self._send(folder, record, {name: self.local} if changed else {}, {name} if gone else set())
        return {"": sent[name]} if name in sent else {}

    def _send(
        self, root: str, record: _Record | None, changed: dict[str, Path], gone: set[str]
    ) -> dict[str, tuple[Facts, Stamp]]:
        """Put files into a folder and take others out, in one step for the readers of its record.

        record: the folder's; None if it has none: every file then changes by itself. Returns what was sent, and the
        stamps of the files before.
        """
        coming = changed.keys() - (record.files.keys() if record else set())
        if record and coming:
            record = replace(record, moving=record.moving | coming)
            self._write_record(root, record)
        sent: dict[str, tuple[Facts, Stamp]] = {}
        for name, path in changed.items():
            stamp = _stamp(path)
            try:
                # facts of the bytes that were sent: the program may replace the file meanwhile
                aside = record is not None and name not in coming
                sent[name] = self._upload_aside(root, path) if aside else self._upload(path, f"{root}/{name}"), stamp
            except FileNotFoundError:
                continue
        if record is None:
            self._delete(root, gone)
            return sent
        now = self._read_record(
            root
        )  # the upload took its time, and others may have put files of theirs into the folder
        record = now if now is not None and now.complete else record
        files = {name: facts for name, facts in record.files.items() if name not in gone}
        files |= {name: facts for name, (facts, _) in sent.items()}
        waiting = (record.aside & files.keys()) | (sent.keys() - coming)
        others = record.moving - coming - gone  # of a writer of the whole folder
        self._write_record(root, _Record(True, files, waiting, others | gone))
        for name in waiting:
            self._copy(f"{root}/{ASIDE_FOLDER}/{files[name][1]}", f"{root}/{name}")
        self._delete(root, gone)
        if waiting or gone:
            self._write_record(root, _Record(True, files, moving=others))
        self._delete(root, {f"{ASIDE_FOLDER}/{files[name][1]}" for name in waiting})
        return sent

    def _upload_aside(self, root: str, path: Path) -> Facts:
        """Put a file under the name of its digest; another try if the program replaces it between the two looks."""
        while True:
            with path.open("rb") as source:
                digest = hashlib.file_digest(source, "sha256").hexdigest()
            found = self._upload(path, f"{root}/{ASIDE_FOLDER}/{digest}")
            if found[1] == digest:
                return found

    def _delete(self, root: str, names: set[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                self._store.delete_file(f"{root}/{name}")

    def _copy(self, source: str, target: str) -> None:
        if self._store.type_name != "hdfs":
            self._store.copy_file(source, target)
            return
        with self._store.open_input_stream(source) as old, self._store.open_output_stream(target) as new:
            while piece := old.read(_PIECE):
                new.write(piece)

    def beside(self) -> Iterator[Remote]:
        """Files that the program wrote beside this one, such as its report: they go beside it in the store."""
        base, mark, query = self.url.partition("?")
        for path in sorted(self.local.parent.iterdir()):
            if path.is_file() and path != self.local and not path.name.startswith("."):
                yield Remote(f"{base.rpartition('/')[0]}/{path.name}{mark}{query}", path)

    def _listed(self) -> set[str]:
        """The folder's objects by their names inside, less hidden ones and what belongs to a publication itself."""
        deep = not self.pattern or "/" in self.pattern or "**" in self.pattern
        found = self._store.get_file_info(pafs.FileSelector(self._root, allow_not_found=True, recursive=deep))
        start = len(self._root.rstrip("/")) + 1
        names = {info.path[start:] for info in found if info.type == pafs.FileType.File}
        return {name for name in names if _visible(name)}

    def _wants(self, name: str) -> bool:
        """Whether a pattern may match a file; what reads the copies decides, so that more is no harm."""
        return not self.pattern or fnmatchcase(name, self.pattern.replace("**/", "*"))

    def _inside(self, name: str) -> Path:
        path = self.local / name
        if not path.resolve().is_relative_to(self.local.resolve()):
            raise InputError(f"{self.url}: its record names {name!r}, which is outside of it")
        return path

    def _download(self, source: str, path: Path) -> Facts:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with self._store.open_input_stream(source) as stream, path.open("wb") as target:
            while piece := stream.read(_PIECE):
                digest.update(piece)
                size += len(piece)
                target.write(piece)
        return size, digest.hexdigest()

    def _upload(self, path: Path, target: str) -> Facts:
        if self._store.type_name == "hdfs":
            self._store.create_dir(str(Path(target).parent), recursive=True)
        digest, size = hashlib.sha256(), 0
        try:
            with path.open("rb") as source, self._store.open_output_stream(target) as stream:
                while piece := source.read(_PIECE):
                    digest.update(piece)
                    size += len(piece)
                    stream.write(piece)
        except KeyboardInterrupt:  # the stream has been closed, which makes an object of the part that it had
            self._store.delete_file(target)
            raise
        return size, digest.hexdigest()

    def _read_record(self, root: str) -> _Record | None:
        path = f"{root}/{RECORD_NAME}"
        if self._store.get_file_info(path).type != pafs.FileType.File:
            return None
        with self._store.open_input_stream(path) as stream:
            content = stream.read()
        try:
            record = json.loads(content)
            files = {str(name): (int(size), str(digest)) for name, (size, digest) in record["files"].items()}
            aside, moving = (frozenset(map(str, record.get(key, []))) for key in ("aside", "moving"))
            return _Record(record["complete"] is True, files, aside, moving)
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise InputError(f"{self.url}: {path} is no record of published files: {problem!r}") from problem

    def _write_record(self, root: str, record: _Record) -> None:
        content: dict[str, Any] = {"complete": record.complete, "files": record.files}
        content |= {key: sorted(names) for key in ("aside", "moving") if (names := getattr(record, key))}
        text = json.dumps(content, indent=1).encode()  # before: an interrupted stream leaves what it has as the object
        with self._store.open_output_stream(f"{root}/{RECORD_NAME}") as stream:
            stream.write(text)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as problem:
            raise InputError(f"{self.url}: {_line(problem)}") from problem


@contextmanager
def staged(config: Any, seconds: float | None = None) -> Iterator[list[Remote]]:
    """Put local copies in the place of a configuration's URLs while the block lasts, and publish what changes.

    config: a dataclass, its lists and dataclasses in it too. seconds: between two publications while the block lasts;
    without it the variable DISRANKER_PUBLISH_SECONDS says so, or 60. What is there after an exception is published too,
    so that the next run goes on there. InputError: a store cannot be read or written.

    Of the processes of one training (torchrun sets RANK) each has copies of its own, and the first one publishes. If
    the last publication fails, the copies stay, and the error says where.
    """
    folder = tempfile.mkdtemp(prefix="disranker-store-")
    remotes: dict[str, Remote] = {}

    def local(url: str) -> Path:
        place, pattern = _place_and_pattern(url)
        if url not in remotes:
            path = Path(folder) / str(len(remotes)) / place.partition("?")[0].rsplit("/", 1)[-1]
            path.parent.mkdir()
            remotes[url] = Remote(place, path, pattern)
        return remotes[url].local / pattern

    try:
        _replace(config, local)
        found = list(remotes.values())
        for remote in found:
            _patiently(remote.fetch)
        writes = bool(found) and int(os.environ.get("RANK", "0")) == 0
        seconds = _interval() if seconds is None else seconds
        with _known(found), _publishing(found, seconds) if writes else nullcontext():
            yield found
    except _NotPublished as problem:
        kept, folder = folder, ""
        raise InputError(f"{problem}; what is not there yet is kept in {kept}") from problem
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _interval() -> float:
    """What DISRANKER_PUBLISH_SECONDS says. InputError: no time that one can wait."""
    given = os.environ.get(INTERVAL_VARIABLE, "60")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise InputError(f"{INTERVAL_VARIABLE} is {given!r}: a number of seconds above 0 is needed")
    return seconds


class _NotPublished(InputError):
    pass


@contextmanager
def _publishing(remotes: list[Remote], seconds: float) -> Iterator[None]:
    """Publish while the block lasts, and at its end."""
    ended = threading.Event()
    publisher = threading.Thread(target=_keep_publishing, args=(remotes, ended, seconds), daemon=True)
    publisher.start()
    try:
        yield
    finally:
        ended.set()
        publisher.join()
        for remote in [each for one in remotes for each in (one, *one.beside())]:
            try:
                count = _patiently(remote.publish)
            except InputError as problem:
                raise _NotPublished(str(problem)) from problem
            if count:
                logger.info("%s: %d files published", remote.url, count)


def _patiently(ask: Callable[[], T]) -> T:
    """Ask a store up to three times: it may be busy, or a file may be replaced just then."""
    for wait in _WAITS:
        try:
            return ask()
        except InputError as problem:
            logger.warning("%s; asking again in %g s", problem, wait)
            time.sleep(wait)
    return ask()


_STAGED: list[Remote] = []  # the copies that this process works on


@contextmanager
def _known(remotes: Iterable[Remote]) -> Iterator[None]:
    _STAGED.extend(remotes)
    try:
        yield
    finally:
        _STAGED.clear()


def addressed(text: str) -> str:
    """A text with the stores' addresses in the place of the paths of this process's copies."""
    return as_addressed(text, _STAGED)


def hand_over(path: Path, first: bool, wait: Callable[[], None]) -> None:
    """Let all processes of a training have what its first one wrote at `path`, or below it.

    On a disk that all of them see there is only the waiting. Where `path` is a copy of an object store's, each process
    has its own: the first publishes it, the others fetch it. first: whether this is the first process; wait: returns
    once all processes have called it.
    """
    remotes = [remote for remote in _STAGED if path.is_relative_to(remote.local)]
    if first:
        for remote in remotes:
            _patiently(remote.publish)
    wait()
    if not first:
        for remote in remotes:
            _patiently(remote.fetch)
    if remotes:
        wait()  # the first one must not replace anything while others fetch


def as_addressed(message: str, remotes: list[Remote]) -> str:
    """A message with the stores' addresses in the place of their copies' paths."""
    for remote in remotes:
        message = message.replace(str(remote.local), remote.url)
    return message


def _keep_publishing(remotes: list[Remote], ended: threading.Event, seconds: float) -> None:
    while not ended.wait(seconds):
        for remote in remotes:
            try:
                remote.publish()
            except InputError as problem:  # the end of the program tries again, and says so if that fails
                logger.warning("%s; what is finished stays here for now", problem)


def _replace(config: Any, local) -> None:
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            _replace(value, local)
        elif isinstance(value, str | Path):
            object.__setattr__(config, each.name, _replaced(value, local))
        elif isinstance(value, list):
            object.__setattr__(config, each.name, [_replaced(one, local) for one in value])


def _replaced(value: Any, local: Callable[[str], Path]) -> Any:
    if isinstance(value, str) and (kind := _KIND_OF_ADDRESS.match(value)):
        raise InputError(f"{value}: after {kind[1]}: a path of this machine is needed; copy what is there to it first")
    url = address(value)
    return value if url is None else type(value)(local(url))


def _place_and_pattern(url: str) -> tuple[str, str]:
    """A URL with wildcards as the folder above the first of them, and the rest; any other as it is."""
    path, mark, options = url.partition("?")
    wild = _WILD.search(path)
    if wild is None:
        return url, ""
    folder, _, _ = path[: wild.start()].rpartition("/")
    if folder.endswith("/"):
        raise InputError(f"{url}: a pattern may not stand for buckets")
    return f"{folder}{mark}{options}", path[len(folder) + 1 :]


def _visible_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files by their path inside, less what is hidden: programs write under a hidden name and rename at the end."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and _visible(name):
            yield name, path


def _visible(name: str) -> bool:
    return not any(part.startswith(".") or part in (RECORD_NAME, ASIDE_FOLDER) for part in name.split("/"))


def _stamp(path: Path) -> Stamp:
    """What changes with a file's content: a file that is renamed into place is another one."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return (0, 0, 0)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _line(problem: BaseException) -> str:
    return " ".join(str(problem).split())
