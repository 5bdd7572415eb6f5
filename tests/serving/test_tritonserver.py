"""What the `tritonserver` command would execute, without starting it."""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ranking.errors import InputError
from serving import tritonserver


@pytest.fixture
def environment(tmp_path):
    return {"PATH": str(tmp_path / "bin"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "LD_LIBRARY_PATH": "/lib/mine"}


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o755)
    return path


def test_a_real_server_on_path_is_executed_untouched(environment, tmp_path):
    real = put(tmp_path / "bin" / "tritonserver", Path(shutil.which("true")).read_bytes())
    path, arguments, out = tritonserver.command(["--model-repository", "m"], environment)
    assert (path, arguments, out) == (real, [str(real), "--model-repository", "m"], environment)


def test_the_containers_server_goes_before_path(environment, tmp_path, monkeypatch):
    put(tmp_path / "bin" / "tritonserver", b"\x7fELF")
    container = put(tmp_path / "opt" / "tritonserver", b"\x7fELF")
    monkeypatch.setattr(tritonserver, "CONTAINER_BINARY", container)
    assert tritonserver.command([], environment)[0] == container


def test_a_script_of_this_name_is_not_taken_for_the_server(environment, tmp_path):
    put(tmp_path / "bin" / "tritonserver", b"#!/usr/bin/env python\n")
    path, arguments, out = tritonserver.command(["--log-verbose=1"], environment)
    assert path.parts[-4:] == ("pytriton", "tritonserver", "bin", "tritonserver")
    assert arguments[-1] == "--log-verbose=1"
    assert out["PATH"].split(os.pathsep) == [f"{sys.prefix}/bin", environment["PATH"]]
    assert out["LD_LIBRARY_PATH"].endswith(":/lib/mine")


def test_every_folder_of_serving_backends_is_offered_under_its_name(environment, tmp_path, monkeypatch):
    put(tmp_path / "backends" / "openvino" / "model.py", b"")
    put(tmp_path / "backends" / "notes" / "README.md", b"")
    monkeypatch.setattr(tritonserver, "OWN_BACKENDS", tmp_path / "backends")
    folder = tritonserver.backend_folder(tritonserver.wheel_folder(), environment)
    assert sorted(p.name for p in folder.iterdir()) == ["openvino", "python"]
    assert {"libtriton_python.so", "triton_python_backend_stub"} <= {p.name for p in (folder / "python").iterdir()}
    assert all(p.exists() for p in folder.rglob("*"))


def test_a_backend_directory_of_the_users_is_kept(environment):
    arguments = tritonserver.command(["--backend-directory=/mine"], environment)[1]
    assert [a for a in arguments if a.startswith("--backend-directory")] == ["--backend-directory=/mine"]


def test_the_servers_own_addresses_are_those_of_this_machine_unless_others_are_given(environment):
    """Seen: the pip-installed server, an old one with known holes, listened on every address of the machine."""
    arguments = tritonserver.command(["--http-address=10.0.0.7", "--grpc-address", "10.0.0.7"], environment)[1]
    given = [a for a in arguments if "-address" in a]
    assert sorted(given) == ["--grpc-address", "--http-address=10.0.0.7", "--metrics-address=127.0.0.1"]
    arguments = tritonserver.command([], environment)[1]
    assert {f"--{door}-address=127.0.0.1" for door in ("http", "grpc", "metrics")} <= set(arguments)


def test_servers_started_at_once_share_one_whole_backend_folder(environment):
    wheel = tritonserver.wheel_folder()
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: tritonserver.backend_folder(wheel, environment), range(32)))
    (folder,) = folders
    assert list(folder.parent.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_says_which_variable_to_set(environment, tmp_path):
    put(tmp_path / "cache", b"a file where a folder should be")
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        tritonserver.command([], environment)


@pytest.mark.parametrize("form", [["--model-repository={}"], ["--model-repository", "{}"], ["--model-store={}"]])
def test_a_repository_in_a_folder_with_a_space_is_named_from_here(environment, tmp_path, monkeypatch, form):
    """Seen: the Python backend's processes died of the space, and the server waited for them for ever."""
    here = tmp_path / "my search"
    here.mkdir()
    monkeypatch.chdir(here)
    flags = [word.format(here / "models") for word in form]
    assert tritonserver.command(flags, environment)[1][-len(form) :] == [word.format("models") for word in form]
    with pytest.raises(InputError, match="my models: this server takes no model repository with white space"):
        tritonserver.command([word.format(here / "my models") for word in form], environment)
    with pytest.raises(InputError, match="set XDG_CACHE_HOME to a folder without any"):
        tritonserver.command([], environment | {"XDG_CACHE_HOME": str(here)})
