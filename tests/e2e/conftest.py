"""Fixtures for tests on real servers. Start one with `serving.local_server.start_triton`; session fixtures share it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def python_model(tmp_path: Path) -> Callable[[str, str], Path]:
    """A function (name, source of model.py) -> repository folder with that python-backend model, text to text."""

    def make(name: str, source: str) -> Path:
        repository = tmp_path / "repository"
        version = repository / name / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(source, encoding="utf-8")
        (repository / name / "config.pbtxt").write_text(
            'backend: "python"\n'
            'input { name: "text" data_type: TYPE_STRING dims: -1 }\n'
            'output { name: "text" data_type: TYPE_STRING dims: -1 }\n'
        )
        return repository

    return make
