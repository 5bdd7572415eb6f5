"""The `tritonserver` command of this venv: the real Triton Inference Server, wherever it is installed.

In an official container (or beside any other real tritonserver on PATH) that binary is executed as it is. Elsewhere the
binary that the `nvidia-pytriton` wheel carries is executed, with the libraries, the Python backend and the folders of
`serving/backends/` put where it looks for them. Every flag passes through, and the process is replaced (execve), so the
process id, the log and the signals are the server's own.

The wheel's server is an old one with known holes (docs/security.md), so it listens on 127.0.0.1 alone unless flags give
it other addresses. The official one listens where Triton itself would.

    tritonserver --model-repository model_repository
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ranking.errors import InputError

CONTAINER_BINARY = Path("/opt/tritonserver/bin/tritonserver")
OWN_BACKENDS = Path(__file__).parent / "backends"
REPOSITORIES = ("--model-repository", "--model-store")
ADDRESSES = ("--http-address", "--grpc-address", "--metrics-address")


def main() -> None:
    """Replace this process by the real server. One line on stderr and exit 1 if there is none to run."""
    try:
        path, arguments, environment = command(sys.argv[1:], os.environ)
        os.execve(path, arguments, environment)
    except (InputError, OSError) as problem:
        print(f"error: tritonserver: {problem}", file=sys.stderr)
        sys.exit(1)


def command(flags: Sequence[str], environment: Mapping[str, str]) -> tuple[Path, list[str], dict[str, str]]:
    """What to execute for these flags: the binary, its argument list (program name first) and its environment."""
    installed = installed_binary(environment.get("PATH", ""))
    if installed is not None:
        return installed, [str(installed), *flags], dict(environment)
    wheel = wheel_folder()
    folders = {
        "--backend-directory": lambda: backend_folder(wheel, environment),
        "--cache-directory": lambda: wheel / "caches",
    }
    flags = without_spaces(flags)
    given = {flag.partition("=")[0] for flag in flags}
    own = [f"{flag}={folder()}" for flag, folder in folders.items() if flag not in given]
    own += [f"{flag}=127.0.0.1" for flag in ADDRESSES if flag not in given]
    binary = wheel / "bin" / "tritonserver"
    return binary, [str(binary), *own, *flags], pip_environment(wheel, environment)


def without_spaces(flags: Sequence[str]) -> list[str]:
    """The flags, with a repository whose path has white space in it named from the working directory.

    The wheel's Python backend starts its processes through a shell and does not quote the path: they die, and the
    server waits for them for ever. InputError if the path from here has white space too.
    """
    found = list(flags)
    for place, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if place and flags[place - 1] in REPOSITORIES:
            name, equals, value = "", "", flag
        elif not (name in REPOSITORIES and equals):
            continue
        if has_space(value):
            value = os.path.relpath(value)
            if has_space(value):
                raise InputError(f"{value}: this server takes no model repository with white space in its path")
            found[place] = f"{name}{equals}{value}"
    return found


def has_space(path: str | Path) -> bool:
    """Whether a path has white space in it."""
    return any(character.isspace() for character in str(path))


def installed_binary(search_path: str) -> Path | None:
    """The official container's server, or another one on PATH; None if there is only this command itself.

    Only ELF files count: a script of this name is this command, in this venv or in another one, and would call itself.
    """
    for candidate in (CONTAINER_BINARY, *(Path(folder) / "tritonserver" for folder in search_path.split(os.pathsep))):
        if candidate.is_file() and os.access(candidate, os.X_OK):
            with candidate.open("rb") as stream:
                if stream.read(4) == b"\x7fELF":
                    return candidate
    return None


def wheel_folder() -> Path:
    """The `pytriton/tritonserver` folder of the nvidia-pytriton wheel. InputError if the wheel is not installed."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("no tritonserver on this machine, and nvidia-pytriton is not installed; run `make install`")
    return Path(spec.submodule_search_locations[0]) / "tritonserver"


def pip_environment(wheel: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which the wheel's binary finds its libraries, and its Python stub finds this venv.

    The stub starts its interpreter isolated, so PYTHONPATH is not read; but it looks up `python3` on PATH to learn
    where it is installed. With the venv's bin folder first, it has the venv's packages, editable ones included, and
    sys.executable is the venv's interpreter, from which vLLM starts its engine process.
    """
    libraries = [wheel.parents[1] / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR") or sys.base_prefix)]
    return {
        **environment,
        "LD_LIBRARY_PATH": _joined(libraries, environment.get("LD_LIBRARY_PATH")),
        "PATH": _joined([Path(sys.prefix) / "bin"], environment.get("PATH")),
    }


def _joined(first: Iterable[Path], rest: str | None) -> str:
    return os.pathsep.join([*map(str, first), *([rest] if rest else [])])


def backend_folder(wheel: Path, environment: Mapping[str, str]) -> Path:
    """A folder with the wheel's Python backend, the stub for this Python and every folder of serving/backends/.

    The wheel's files are copied, because Triton refuses a library that a link leads out of the folder; our backends are
    links, so that an edit counts at the next start. The folder is named for what is in it: a venv moved or upgraded
    gets another one. It is made aside and renamed into place, so that servers started at once never see half of it.
    """
    copies, links = _python_backend_files(wheel), _own_backends()
    states = [f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in copies]
    key = hashlib.sha256("\n".join([*states, *map(str, links)]).encode()).hexdigest()[:16]
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "disranker"
    if has_space(cache):
        raise InputError(f"{cache}: this server takes no white space there; set XDG_CACHE_HOME to a folder without any")
    folder = cache / f"backends-{key}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix="backends-", dir=cache))
    except OSError as problem:
        raise InputError(
            f"{cache}: cannot be written ({problem}); set XDG_CACHE_HOME to a folder that can"
        ) from problem
    (aside / "python").mkdir()
    for file in copies:
        shutil.copy2(file, aside / "python" / file.name)
    for link in links:
        (aside / link.name).symlink_to(link)
    aside.chmod(0o755)
    try:
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside)
        if not folder.is_dir():  # not a lost race but a real failure
            raise
    return folder


def _python_backend_files(wheel: Path) -> list[Path]:
    """The Python backend's library and utilities, and its stub for this Python. InputError if there is no such stub."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = wheel / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        offered = ", ".join(sorted(p.name for p in stub.parents[1].glob("*")))
        raise InputError(f"nvidia-pytriton has no Python backend for Python {version} (it has {offered})")
    return [stub, *sorted(file for file in (wheel / "backends" / "python").iterdir() if file.is_file())]


def _own_backends() -> list[Path]:
    return sorted(folder for folder in OWN_BACKENDS.resolve().iterdir() if (folder / "model.py").is_file())


if __name__ == "__main__":
    main()
