"""What all tests share: `gpu` tests are left out without a CUDA device; property tests are repeatable and untimed."""

from __future__ import annotations

import shutil
import subprocess

import hypothesis
import pytest

# a busy machine must not fail a property test by its clock, nor a run find another example than the last one did
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "write into docs/ what tests show there: the trace of a request, the screens of the pages"
    parser.addoption("--write-docs", action="store_true", help=text)


@pytest.fixture(scope="session")
def write_docs(request: pytest.FixtureRequest) -> bool:
    """Whether a test writes what it made into docs/."""
    return request.config.getoption("--write-docs")


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
    # long files first: with several workers, none is left alone with minutes of work at the end
    items.sort(key=lambda item: 0 if "/e2e/" in item.nodeid or "/labelling/" in item.nodeid else 1)
