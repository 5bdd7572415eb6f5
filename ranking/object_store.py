"""Paths of programs that lie in an object store: s3://, gs://, abfs:// and hdfs:// wherever a program takes a path.

A program works on local files: what a setting names is fetched before it starts, and what it changed is published,
while it runs and at its end. pyarrow's file systems speak to the stores, and take credentials and endpoints as they
always do.

A store cannot rename, so a publication is whole once its record is there: `_published.json`, an object that is written
last and names every file with its size and SHA-256. A reader takes the files that the record names and checks each. A
record that says `complete: false` is written first, so that a publication that was broken off is never taken for a
folder that somebody else put there; such folders have no record, and are taken as they are.

A file that replaces a published one is first put aside, below `_replacing/`. The record then says for how long the new
file is to be read there, and only after that does it take its own name. So the old state is there until the record
changes and the new one from then on, wherever a writer is killed.
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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
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
_PIECE = 1 << 22
_WAITS = (0.5, 2.0)  # seconds between the tries of a store that refuses

T = TypeVar("T")


def address(value: object) -> str | None:
    """The URL of an object store that a setting holds, as text or as a path; None for anything else."""
    if not isinstance(value, str | Path):
        return None
    text, matches = _ADDRESS.subn(r"\1://", str(value))
    return text.rstrip("/") if matches else None


@dataclass
class Remote:
    """A file or folder of a store, and its copy here."""

    url: str
    local: Path
    known: dict[str, tuple[int, str]] = field(default_factory=dict)  # file -> size and SHA-256, as it is published
    _stamps: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # of the local files when they were copied
    _unfinished: bool = False  # a writer was killed before the files that it had put aside took their names
    _publishing: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        try:
            self._store, self._root = pafs.FileSystem.from_uri(self.url)
        except (pa.ArrowException, OSError, ValueError) as problem:
            raise InputError(f"{self.url}: {_line(problem)}") from problem

    def fetch(self) -> None:
        """Copy what is there and is not here yet. InputError: it cannot be read, or a file is not the published one."""
        with self._asking():
            kind = self._store.get_file_info(self._root).type
            if kind == pafs.FileType.File:
                self.known[""] = self._download(self._root, self.local)
                self._stamps[""] = _stamp(self.local)
                return
            record = self._read_record()
            self._unfinished = bool(record and record["aside"])
        if record is None:
            self._fetch_listed()
            return
        if not record["complete"]:
            logger.warning("%s: its publication was broken off; nothing of it is taken", self.url)
            return
        for name in self.known.keys() - record["files"].keys():  # gone since the last time
            self._inside(name).unlink(missing_ok=True)
            self.known.pop(name), self._stamps.pop(name, None)
        for name, (size, digest) in record["files"].items():
            if self.known.get(name) == (size, digest) and self._stamps.get(name) == _stamp(self._inside(name)):
                continue
            source = f"{ASIDE_FOLDER}/{digest}" if name in record["aside"] else name
            with self._asking():
                found = self._download(f"{self._root}/{source}", self._inside(name))
            if found != (size, digest):
                raise InputError(
                    f"{self.url}/{name}: not the file that was published; it is being replaced, or damaged"
                )
            self.known[name] = found
            self._stamps[name] = _stamp(self.local / name)

    def publish(self) -> int:
        """Copy every file that is new or changed, then the record. Returns how many files were copied.

        A file that the program replaces or removes meanwhile goes with the next publication.
        """
        with self._publishing:
            return self._publish()

    def _publish(self) -> int:
        files = {"": self.local} if self.local.is_file() else dict(_visible_files(self.local))
        changed = {name: path for name, path in files.items() if self._stamps.get(name) != _stamp(path)}
        gone = set(self.known) - set(files)
        if not changed and not gone and not self._unfinished:
            return 0
        with self._asking():
            if "" in files:  # a single object appears whole by itself
                stamp = _stamp(self.local)
                self.known, self._stamps[""] = {"": self._upload(self.local, self._root)}, stamp
                return 1
            if "" in gone:
                self._store.delete_file(self._root)
                self.known = {}
                return 0
            record = self._read_record()
            if record is None:
                self._write_record({}, complete=False)
            published = {name: facts for name, facts in self.known.items() if name not in gone}
            # of a writer that was killed while they were aside
            aside = {name for name in (record or {"aside": ()})["aside"] if name in published and name not in changed}
            for name, path in changed.items():
                stamp = _stamp(path)
                try:
                    if record is None or name not in record["files"]:
                        # facts of the bytes that were sent: the program may replace the file meanwhile
                        published[name] = self._upload(path, f"{self._root}/{name}")
                    else:
                        published[name] = self._upload_aside(path)
                        aside.add(name)
                except FileNotFoundError:
                    continue
                self._stamps[name] = stamp
            self._write_record(published, complete=True, aside=aside)
            for name in aside:
                self._copy(f"{self._root}/{ASIDE_FOLDER}/{published[name][1]}", f"{self._root}/{name}")
            if aside:
                self._write_record(published, complete=True)
            for name in gone:
                self._store.delete_file(f"{self._root}/{name}")
            if aside or (record and record["aside"]):
                self._store.delete_dir(f"{self._root}/{ASIDE_FOLDER}")
        self.known, self._unfinished = published, False
        return len(changed)

    def _upload_aside(self, path: Path) -> tuple[int, str]:
        """Put a file under the name of its digest; another try if the program replaces it between the two looks."""
        while True:
            with path.open("rb") as source:
                digest = hashlib.file_digest(source, "sha256").hexdigest()
            found = self._upload(path, f"{self._root}/{ASIDE_FOLDER}/{digest}")
            if found[1] == digest:
                return found

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

    def _fetch_listed(self) -> None:
        """A folder that another program put there: all of it, as it is now."""
        with self._asking():
            selector = pafs.FileSelector(self._root, allow_not_found=True, recursive=True)
            for info in self._store.get_file_info(selector):
                if info.type == pafs.FileType.File:
                    name = info.path[len(self._root.rstrip("/")) + 1 :]
                    self.known[name] = self._download(info.path, self._inside(name))
                    self._stamps[name] = _stamp(self.local / name)

    def _inside(self, name: str) -> Path:
        path = self.local / name
        if not path.resolve().is_relative_to(self.local.resolve()):
            raise InputError(f"{self.url}: its record names {name!r}, which is outside of it")
        return path

    def _download(self, source: str, path: Path) -> tuple[int, str]:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with self._store.open_input_stream(source) as stream, path.open("wb") as target:
            while piece := stream.read(_PIECE):
                digest.update(piece)
                size += len(piece)
                target.write(piece)
        return size, digest.hexdigest()

    def _upload(self, path: Path, target: str) -> tuple[int, str]:
        if self._store.type_name == "hdfs":
            self._store.create_dir(str(Path(target).parent), recursive=True)
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as source, self._store.open_output_stream(target) as stream:
            while piece := source.read(_PIECE):
                digest.update(piece)
                size += len(piece)
                stream.write(piece)
        return size, digest.hexdigest()

    def _read_record(self) -> dict[str, Any] | None:
        path = f"{self._root}/{RECORD_NAME}"
        if self._store.get_file_info(path).type != pafs.FileType.File:
            return None
        with self._store.open_input_stream(path) as stream:
            content = stream.read()
        try:
            record = json.loads(content)
            files = {str(name): (int(size), str(digest)) for name, (size, digest) in record["files"].items()}
            aside = {str(name) for name in record.get("aside", [])}
            return {"complete": record["complete"] is True, "files": files, "aside": aside}
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise InputError(f"{self.url}/{RECORD_NAME}: not a record of published files: {problem!r}") from problem

    def _write_record(self, files: dict[str, tuple[int, str]], complete: bool, aside: set[str] | None = None) -> None:
        record = {"complete": complete, "files": files} | ({"aside": sorted(aside)} if aside else {})
        content = json.dumps(record, indent=1).encode()
        with self._store.open_output_stream(f"{self._root}/{RECORD_NAME}") as stream:
            stream.write(content)

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
        if url not in remotes:
            path = Path(folder) / str(len(remotes)) / url.partition("?")[0].rsplit("/", 1)[-1]
            path.parent.mkdir()
            remotes[url] = Remote(url, path)
        return remotes[url].local

    try:
        _replace(config, local)
        found = list(remotes.values())
        for remote in found:
            _patiently(remote.fetch)
        writes = bool(found) and int(os.environ.get("RANK", "0")) == 0
        seconds = float(os.environ.get(INTERVAL_VARIABLE, "60")) if seconds is None else seconds
        with _known(found), _publishing(found, seconds) if writes else nullcontext():
            yield found
    except _NotPublished as problem:
        kept, folder = folder, ""
        raise InputError(f"{problem}; what is not there yet is kept in {kept}") from problem
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


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
        elif (url := address(value)) is not None:
            object.__setattr__(config, each.name, type(value)(local(url)) if isinstance(value, str) else local(url))
        elif isinstance(value, list):
            changed = [value if (url := address(value)) is None else type(value)(local(url)) for value in value]
            object.__setattr__(config, each.name, changed)


def _visible_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files by their path inside, less what is hidden: programs write under a hidden name and rename at the end."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts) and name.name != RECORD_NAME:
            yield str(name), path


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes with a file's content: a file that is renamed into place is another one."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return (0, 0, 0)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _line(problem: BaseException) -> str:
    return " ".join(str(problem).split())
