"""What the demo says of a machine that it cannot run on."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from demo import preflight
from ranking.errors import InputError


def test_a_taken_port_is_named_with_its_flag():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} is taken .*--router-port {port + 10}"):
            preflight.check_ports({port: "--router-port"})


def test_a_full_disk_is_told_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    with pytest.raises(InputError, match=r"1\.0 GiB are free on its disk, a run needs 4"):
        preflight.check_machine(tmp_path / "not" / "there" / "yet", decoder_teacher=False)


def test_little_memory_is_told_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: SimpleNamespace(available=6 * 2**30))
    preflight.check_machine(tmp_path, decoder_teacher=False)
    with pytest.raises(InputError, match=r"6\.0 GiB of memory are free, this run needs 8"):
        preflight.check_machine(tmp_path, decoder_teacher=True)
