"""A tiny checkpoint, its export and a judged dataset, made once for all build tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from build.export_onnx import export, load_encoder
from tests.helpers.tiny_student import make_judged, make_student


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return make_student(tmp_path_factory.mktemp("tiny") / "student", seed=1, hidden_size=32, intermediate_size=64)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return make_judged(tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="session")
def exported(checkpoint, tmp_path_factory) -> Path:
    return export(load_encoder(checkpoint), tmp_path_factory.mktemp("onnx") / "model.onnx")
