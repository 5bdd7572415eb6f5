"""What all tests share: tests marked `gpu` are left out where there is no CUDA device."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def has_cuda_device() -> bool:
    """Asked of the driver, not of torch: most tests need no torch, and a container without it may have a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("gpu") for item in items) and not has_cuda_device():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
