"""finish_engine.py before TensorRT is imported: is the module there, and is it the server's version?"""

from __future__ import annotations

import pytest

from build import finish_engine, tensorrt_engine
from build.finish_engine import check_tensorrt
from ranking.errors import InputError


@pytest.fixture
def serving(tmp_path, monkeypatch):
    """A function (file names of the serving image's libraries) that notes them as deploy/engine.Dockerfile does."""

    def note(*names: str) -> None:
        (tmp_path / "serving-tensorrt").write_text("".join(f"{name}\n" for name in names))
        monkeypatch.setenv("SERVING_TENSORRT", str(tmp_path / "serving-tensorrt"))

    return note


@pytest.fixture
def installed(monkeypatch):
    """A function (version, or None) that makes the build believe in that TensorRT."""

    def pretend(version: str | None) -> None:
        monkeypatch.setattr(tensorrt_engine, "is_available", lambda: version is not None)
        monkeypatch.setattr(tensorrt_engine, "version", lambda: version)

    return pretend


def test_the_servers_version_may_build(serving, installed):
    serving("libnvinfer.so.11.1.0")
    installed("11.1.0.106")
    check_tensorrt("the command")


def test_another_version_is_refused_with_both_named(serving, installed):
    serving("libnvinfer.so.11.1.0")
    installed("11.4.0.106")
    with pytest.raises(InputError, match=r"TensorRT 11\.4\.0\.106 is installed here, the server has 11\.1\.0"):
        check_tensorrt("the command")


def test_an_image_without_the_module_does_not_print_its_own_command_again(serving, installed):
    serving("libnvinfer.so.11.1.0")
    installed(None)
    with pytest.raises(InputError, match=r"no Python module tensorrt; the server's TensorRT is 11\.1\.0") as caught:
        check_tensorrt("docker compose run")
    assert "docker compose run" not in str(caught.value)


def test_outside_the_image_the_command_is_printed(installed, monkeypatch):
    monkeypatch.delenv("SERVING_TENSORRT", raising=False)
    installed(None)
    with pytest.raises(InputError, match="docker compose run --rm build-engine --staged runs"):
        check_tensorrt(finish_engine.container_command("runs", "models"))


def test_a_serving_image_without_tensorrt_is_said(serving, installed):
    serving("libonnxruntime.so.1.2.3")
    installed("11.1.0.106")
    with pytest.raises(InputError, match=r"names no libnvinfer\.so"):
        check_tensorrt("the command")
