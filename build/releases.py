"""List, promote and roll back the versions of a student, and tell a running server to load them.

    python build/releases.py --action list --name student
    python build/releases.py --action promote --name student --version 4 --url localhost:8001
    python build/releases.py --action rollback --name student --url localhost:8001

Which version serves is written in config.pbtxt (version_policy), so a restarted server serves the same one. With --url
a running server in explicit control mode (`tritonserver --model-control-mode=explicit --load-model=student
--load-model=student_encoder ...`) changes without a gap: the encoder loads the new version beside the old one, the
front changes over, the old encoder goes. If the new version does not load, or the program is interrupted, the old one
goes on serving, and the files are put back to say so. After a kill, a rollback goes to the version promoted last.

A server that is not to be changed by everybody who reaches it is started with
`--grpc-restricted-protocol=model-repository,shared-memory,logging,trace:admin-key=KEY` and the same words after
`--http-restricted-api=`; --admin-key-file names the file with that key (docs/security.md).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tritonclient.utils import InferenceServerException

from build.publication_settings import RepositorySettings
from build.running_server import RunningServer, read_admin_key, reason
from build.triton_config import CONFIG_NAME, as_text, encoder_name, first_encoder_name, read_config, serve_versions
from ranking.card import fingerprint
from ranking.errors import InputError
from ranking.files import write_json, write_text
from ranking.object_store import addressed
from ranking.program import run

MANIFEST_NAME = "manifest.json"
HISTORY_NAME = "promoted.json"

LOGGER = logging.getLogger(__name__)


@dataclass
class Config(RepositorySettings):
    """List, promote or roll back the published versions of a student.

    Args:
        name: Triton model name, as given to build_student.py
        action: "list" prints the versions; "promote" serves --version; "rollback" serves the one promoted before;
            "reload" starts the models of a server anew, for one whose processes died
        version: version to promote; 0 for the newest
        url: gRPC addresses of running servers in explicit control mode, changed one after another; without any, only
            the files change. Servers that share a repository must be named in the same call
        admin_key_file: file with the key that these servers ask for before they load or unload a model
        load_timeout_seconds: how long to wait for a load
    """

    name: str
    action: Literal["list", "promote", "rollback", "reload"] = "list"
    version: int = 0
    url: list[str] = field(default_factory=list)
    admin_key_file: Path | None = None
    load_timeout_seconds: float = 300.0

    def __post_init__(self) -> None:
        if not self.load_timeout_seconds > 0:
            raise ValueError(f"load_timeout_seconds is {self.load_timeout_seconds}: a time above 0 is needed")


def main(config: Config) -> None:
    """Do what --action asks and print the outcome. InputError if it cannot be done; the old version then serves on."""
    known = versions(config.repository, config.name)
    if not known:
        raise InputError(f"{config.repository / config.name}: no published version; build one with build_student.py")
    if config.action == "list":
        print(table(config.repository, config.name))
        return
    key = read_admin_key(config.admin_key_file)
    servers = [RunningServer(url, config.load_timeout_seconds, key) for url in dict.fromkeys(config.url)]
    if config.action == "reload":
        reload(config.repository, config.name, servers)
        print(f"{config.name} is loaded anew on {', '.join(config.url)}")
        return
    store = addressed(str(config.repository))
    if servers and store != str(config.repository):
        raise InputError(
            f"--url: what changes in {store} is there when this program has ended, and its servers would load what is "
            "there now: leave --url out, and start the servers anew afterwards"
        )
    if config.action == "rollback":
        version = rollback(config.repository, config.name, servers)
    else:
        version = config.version or known[-1]
        promote(config.repository, config.name, version, servers)
    print(f"{config.name} serves version {version}" + ("" if config.url else " from the next start or load on"))


def table(repository: str | Path, name: str) -> str:
    """One line per version: the serving one is marked, with precision, gate figures and time of publication."""
    serving = serving_versions(repository, name)
    lines = [
        f"{'':1} {'version':>7}  {'published':25} {'engine':9} {'precision':9} {'tau':>7} {'NDCG@5':>16}  checkpoint"
    ]
    for version in versions(repository, name):
        facts = manifest(repository, name, version)
        gate = facts["gate"]
        ndcg = f"{gate['ndcg5_reference']:.4f}->{gate['ndcg5']:.4f}"
        lines.append(
            f"{'*' if version in serving else ' '} {version:>7}  {facts['published']:25} {facts['target']:9} "
            f"{facts['precision']:9} {gate['tau']:7.4f} {ndcg:>16}  {facts['checkpoint']['fingerprint']}"
        )
    return "\n".join(lines)


def versions(repository: str | Path, name: str) -> list[int]:
    """Published version numbers of a student, ascending: those whose front folder is in place."""
    return sorted(numbers(Path(repository) / name))


def numbers(home: Path) -> list[int]:
    """The numbered folders of a Triton model, in no order."""
    return [int(folder.name) for folder in home.glob("[0-9]*") if folder.name.isdecimal() and folder.is_dir()]


def manifest(repository: str | Path, name: str, version: int) -> dict[str, Any]:
    """manifest.json of a published version (docs/build.md says what it holds). InputError if it cannot be read."""
    path = Path(repository) / name / str(version) / MANIFEST_NAME
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(f"{path}: cannot be read: {problem}") from problem


def serving_versions(repository: str | Path, name: str) -> list[int]:
    """The versions that config.pbtxt asks for; empty before the first promotion."""
    path = Path(repository) / name / CONFIG_NAME
    return list(read_config(path).version_policy.specific.versions) if path.is_file() else []


def read_history(repository: str | Path, name: str) -> list[int]:
    """Versions in the order of their promotion. A rollback removes the last entry."""
    path = Path(repository) / name / HISTORY_NAME
    try:
        history = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except ValueError as problem:
        raise InputError(f"{path}: cannot be read: {problem}") from problem
    if not isinstance(history, list) or not all(isinstance(version, int) for version in history):
        raise InputError(f"{path}: not a list of versions, such as [1, 2]")
    return history


@contextmanager
def one_change(repository: Path) -> Iterator[None]:
    """Keep two publications, promotions or rollbacks of a repository apart; waits for another one, and says so.

    The folder itself is locked: a lock file would belong to whoever came first, and be closed to others.
    """
    descriptor = os.open(repository, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            LOGGER.warning("%s: waiting for another build or release to end", repository)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as problem:  # some network file systems lock no folders
            LOGGER.info("%s: cannot be locked (%s), so nothing keeps others from changing it", repository, problem)
        yield
    finally:
        os.close(descriptor)


def check_holds_no_arm(home: Path) -> None:
    """InputError if a folder of the repository holds what build_student.py published: a teacher would replace it."""
    if (home / HISTORY_NAME).is_file() or any((home / str(n) / MANIFEST_NAME).is_file() for n in numbers(home)):
        raise InputError(f"{home}: holds the published versions of an arm, which would be removed: give another --name")


def check_holds_no_teacher(home: Path) -> None:
    """InputError if a folder of the repository holds a version that build_student.py did not publish."""
    for number in sorted(numbers(home)):
        if not (home / str(number) / MANIFEST_NAME).is_file():
            raise InputError(
                f"{home}: version {number} lacks {MANIFEST_NAME}, so it is no arm's: give the build another --name"
            )


def promote(repository: str | Path, name: str, version: int, servers: Sequence[RunningServer] = ()) -> None:
    """Serve this version: in the files and on the running servers. After an InputError everything is as it was."""
    with one_change(Path(repository)):
        history = read_history(repository, name)
        _serve(Path(repository), name, version, servers)
        if history[-1:] != [version]:  # last: a rollback then leaves a version whose promotion was killed before this
            write_json(Path(repository) / name / HISTORY_NAME, [*history, version], indent=None)


def rollback(repository: str | Path, name: str, servers: Sequence[RunningServer] = ()) -> int:
    """Serve the version that was promoted before the current one; returns its number. InputError if there is none.

    Where a promotion or a rollback was killed half-way, that is the last version of promoted.json.
    """
    with one_change(Path(repository)):
        return _rollback(Path(repository), name, servers)


def _rollback(repository: Path, name: str, servers: Sequence[RunningServer]) -> int:
    home = repository / name
    history = read_history(repository, name)
    kept = history[:-1] if history and _serves(repository, name, history[-1]) else history
    if not kept:
        raise InputError(
            f"{home}: nothing to roll back to: promote a version by number, or take the arm's pages away in the "
            "experiment file (docs/operations.md)"
        )
    write_json(home / HISTORY_NAME, kept, indent=None)  # first: a rollback that is killed is not undone by the next one
    try:
        _serve(repository, name, kept[-1], servers)
    except BaseException:
        write_json(home / HISTORY_NAME, history, indent=None)
        raise
    return kept[-1]


def _serves(repository: Path, name: str, version: int) -> bool:
    """Whether the files of all models of an arm ask for this version alone; not so in the middle of a change."""
    homes = (*encoder_homes(repository, name, version), repository / name)
    return all(serving_versions(repository, home.name) == [version] for home in homes)


def reload(repository: Path, name: str, servers: Sequence[RunningServer]) -> None:
    """Unload and load all models of an arm, because server 24.10 does not restart a Python process that was killed.

    The model does not serve meanwhile; a reload that was stopped is finished by the next one. InputError if it does not
    load.
    """
    if not servers:
        raise InputError("reload needs --url, the server whose models are to be loaded anew")
    for server in servers:
        try:
            served = server.versions(name, "READY") or serving_versions(repository, name)
            encoders = {home.name for number in served for home in encoder_homes(repository, name, number)}
            first = first_encoder_name(name)  # of a version that was removed here and is still served there
            encoders |= {encoder_name(name), *([first] if server.versions(first, "READY") else [])}
            for model in (name, *encoders):
                server.unload(model)
                # what is unloading already is not waited for: a model whose process died does so for ever
                server.wait_until_gone(model, set(server.versions(model, "READY")))
            for model in (*encoders, name):
                server.load(model)
        except InferenceServerException as problem:
            raise InputError(f"{name} does not load anew on {server.url}: {reason(problem)}") from problem


def _serve(repository: Path, name: str, version: int, servers: Sequence[RunningServer]) -> None:
    """Change the files and then each server. Whatever stops that, an interrupt too: all go back."""
    homes = (*encoder_homes(repository, name, version), repository / name)
    for home in homes:
        if not (home / str(version) / CONFIG_NAME).is_file():
            known = ", ".join(map(str, versions(repository, name)))
            raise InputError(f"{home / str(version)}: no such version; published are {known}")
        check_files(home, version)
    configs = [home / CONFIG_NAME for home in homes]
    before = {path: path.read_text(encoding="utf-8") if path.is_file() else None for path in configs}
    served = [(server, _versions_served(server, name)) for server in servers]  # before any of them is changed
    asked: list[tuple[RunningServer, list[int]]] = []
    try:
        for server, had in served:
            asked.append((server, had))
            _change_over(server, repository, name, version, had)
            LOGGER.info("%s: version %d replaces %s on %s", name, version, had or "none", server.url)
        for home in homes:
            _write_policy(home, version, [version])
    except BaseException as problem:
        LOGGER.warning("%s: putting back what served before version %d was asked for", name, version)
        for done, had in reversed(asked):
            try:
                _put_back(done, repository, name, version, had)
            except (InferenceServerException, InputError) as second:  # other servers and the files go back all the same
                said = reason(second) if isinstance(second, InferenceServerException) else second
                LOGGER.error("%s: not put back to %s of %s: %s", done.url, had or "no version", name, said)
        for path, text in before.items():
            if text is None:
                path.unlink(missing_ok=True)
            else:
                write_text(path, text)
        # a cascade's small network may be asked for in the files and serve nowhere, since a single model followed
        old = {
            home.name
            for number in serving_versions(repository, name)
            for home in (*encoder_homes(repository, name, number), repository / name)
        }
        state = _restore(server, [home.name for home in homes if home.name in old]) if servers else ""
        if isinstance(problem, InferenceServerException):
            raise InputError(
                f"{name} version {version} does not load on {server.url}: {reason(problem)}; {state}"
            ) from problem
        raise


def _versions_served(server: RunningServer, name: str) -> list[int]:
    """The versions of an arm that a server serves. InputError if it does not say."""
    try:
        return server.versions(name, "READY")
    except InferenceServerException as problem:
        raise InputError(
            f"{server.url}: {reason(problem)}; no server was changed. One that is down may be left out of --url: it "
            "starts with what the files say"
        ) from problem


def _put_back(server: RunningServer, repository: Path, name: str, version: int, had: Sequence[int]) -> None:
    """Have a server serve again what it had before it was asked for `version`, whose front it may have or not."""
    kept = [repository / name, *encoder_homes(repository, name, had[-1])] if had else []
    if had and version in server.versions(name, "READY"):
        _change_over(server, repository, name, had[-1], [version])
    for home in (repository / name, *encoder_homes(repository, name, version)):
        if home not in kept and server.is_ready(home.name):
            server.unload(home.name)


def encoder_homes(repository: Path, name: str, version: int) -> list[Path]:
    """The folders of the encoders that a version of `name` calls: one, or two where it is a cascade."""
    first = repository / first_encoder_name(name)
    return [*([first] if (first / str(version)).is_dir() else []), repository / encoder_name(name)]


def _change_over(server: RunningServer, repository: Path, name: str, version: int, old: Sequence[int]) -> None:
    """Load the new encoder beside the old, replace the front, and unload the old encoder, in this order.

    The old encoder stays until the old front has answered its requests.
    """
    front, encoders = repository / name, encoder_homes(repository, name, version)
    gone = [home for number in old for home in encoder_homes(repository, name, number) if home not in encoders]
    steps = [(home, {number for number in old if (home / str(number)).is_dir()} | {version}) for home in encoders]
    for home, wanted in (*steps, (front, {version}), *((home, {version}) for home in encoders)):
        _write_policy(home, version, sorted(wanted))
        server.load(home.name)
        if home is front:
            server.wait_until_gone(name, set(old) - {version})
    for home in gone:  # a cascade's small encoder, when a single model follows
        server.unload(home.name)


def check_files(home: Path, version: int) -> None:
    """InputError if a file of a published version changed since: a copy cut short, a bad disk, an edit.

    A link is refused too: what it leads to can change after this look.
    """
    for name, digest in manifest(home.parent, home.name, version)["files"].items():
        path = home / str(version) / name
        if path.is_symlink() or not path.is_file() or fingerprint(path) != digest:
            raise InputError(f"{path}: missing or changed since it was published; this version is not served")


def _restore(server: RunningServer, models: list[str]) -> str:
    """Ask the server to load what the restored files say of these models, and say how it stands.

    It does not load anew what it has loaded.
    """
    if not models:
        return "as before, no version of it serves"
    for model in models:
        with suppress(InferenceServerException):  # whether it serves is asked below
            server.load(model)
    try:
        down = [model for model in models if not server.is_ready(model)]
    except InferenceServerException as problem:
        return f"what it serves now it does not say: {reason(problem)}"
    return f"and {', '.join(down)} do not serve: see the server's log" if down else "the old version goes on serving"


def _write_policy(home: Path, version: int, wanted: list[int]) -> None:
    config = read_config(home / str(version) / CONFIG_NAME)
    write_text(home / CONFIG_NAME, as_text(serve_versions(config, wanted)))


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python build/releases.py --name student --action promote --version 4 --url localhost:8001",
    )
