"""What the demo says of a machine that it cannot run on."""

from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from demo import preflight, run
from ranking.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def room_on_the_disk(monkeypatch):
    """The disk of the machine that tests run on may be nearly full."""
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))


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


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("fpu avx2", "no AVX-512:"),
        ("fpu avx2 avx512f", "no AVX-512 BF16 and no AMX:"),
        ("avx2 avx512_bf16", ""),
        ("", ""),
    ],
)
def test_a_processor_without_bf16_is_slow_and_told_so(flags, said, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "_processor", lambda: f"model name : x\nflags\t\t: {flags}\n" if flags else "")
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: SimpleNamespace(available=16 * 2**30))
    told = preflight.slower_processor()
    assert told.startswith(f"This processor has {said}") if said else told == ""
    preflight.check_machine(tmp_path, decoder_teacher=True)


def test_a_processor_that_vllm_cannot_use_is_told_before_the_first_stage(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "_processor", lambda: "flags : fpu sse4_2 avx\n")
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: SimpleNamespace(available=16 * 2**30))
    with pytest.raises(InputError, match="no AVX2, without which vLLM serves no teacher"):
        preflight.check_machine(tmp_path, decoder_teacher=True)
    preflight.check_machine(tmp_path, decoder_teacher=False)


def test_make_says_which_python_it_needs(tmp_path):
    """`make install` with no such interpreter, and with one that is too old, in a copy without a .venv."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt", "requirements-no-deps.txt"):
        (tmp_path / name).touch()
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")  # what any interpreter answers whose version is none of those asked for
    old.chmod(0o755)
    for python in ("/nowhere/python3.11", str(old)):
        done = subprocess.run(["make", "install", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode and f"Python 3.11 is needed, {python} is none" in done.stdout
        assert not (tmp_path / ".venv").exists()


def test_make_passes_a_path_with_a_space_on_as_one_word():
    """Seen: `make demo DATA="my judgments.csv"` asked for the table `my`."""
    given = {"DATA": "~/my judgments.csv", "OUT": "runs/my demo"}
    told = [f"{name}={value}" for name, value in given.items()]
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.installed", "demo", *told], cwd=ROOT, capture_output=True, text=True
    )
    words = shlex.split(done.stdout)
    assert words[words.index("--data") + 1] == f"{Path.home()}/my judgments.csv"
    assert words[words.index("--out") + 1] == "runs/my demo"


def test_what_tritonserver_cannot_open_is_told_before_the_first_stage(tmp_path):
    with pytest.raises(InputError, match="tritonserver takes no path with white space: give another OUT="):
        run.main(run.Config(out=tmp_path / "my demo"))


def test_make_clean_keeps_what_cannot_be_made_again(tmp_path):
    """Seen: it removed the log of an A/B test and the salt, which docs and compose.yaml put below runs/ too."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (
        "demo/model",
        "demo-data/model",
        "ab/log/a.ablog",
        "salt",
        "serve/judgments.csv",
        "label_store/labels",
    ):
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name).touch()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    left = {str(path.relative_to(tmp_path / "runs")) for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert left == {"ab/log/a.ablog", "salt", "serve/judgments.csv", "label_store/labels"}
