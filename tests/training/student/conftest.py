"""The small world that tests of students train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.world.dataset import WorldConfig, write_world


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world")
    write_world(WorldConfig.small(train_queries=24, dev_queries=12, test_queries=4, unlabelled_queries=40), out)
    return out
