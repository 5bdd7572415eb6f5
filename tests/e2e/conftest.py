"""Fixtures for tests on real servers. `serving.temporary_server.start_triton` starts one; session fixtures share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serving.temporary_server import TritonServer, start_triton

# Several servers run beside each other in tests: no pinning to cores, one thread each.
QUIET_VLLM = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
LONGEST_SEQUENCE = 4096


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


@pytest.fixture(scope="session")
def tiny_teacher_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama-like teacher in float32, as training would leave it."""
    from tests.helpers.tiny_teacher import make_teacher

    return make_teacher(tmp_path_factory.mktemp("tiny-teacher") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_teacher_repository(tiny_teacher_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with that teacher, published by build/build_teacher.py."""
    from build.build_teacher import Config, main

    repository = tmp_path_factory.mktemp("teacher-repository") / "model_repository"
    arguments = {"enforce_eager": True, "max_model_len": LONGEST_SEQUENCE}
    main(Config(checkpoint=tiny_teacher_checkpoint, repository=repository, engine_args=arguments))
    return repository


@pytest.fixture(scope="session")
def teacher_server(tiny_teacher_repository: Path) -> Iterator[TritonServer]:
    """The server of that repository, shared by all tests whose callers read every answer: leave it as you found it."""
    with start_triton(tiny_teacher_repository, environment=QUIET_VLLM) as server:
        yield server
        assert server.stop() == 0, server.log_tail()
        assert server.stragglers == []


@pytest.fixture(scope="session")
def abandoned_teacher_server(tiny_teacher_repository: Path) -> Iterator[TritonServer]:
    """Another one, for tests whose callers are killed or cut their streams.

    Server 24.10 may keep a request of such a stream for ever and cannot unload its model then (docs/serving-teacher.md,
    Limits): it leaves with exit code 1 when its exit timeout is over. It must leave by itself all the same, and with
    everything that it started.
    """
    with start_triton(tiny_teacher_repository, "--exit-timeout-secs=10", environment=QUIET_VLLM) as server:
        yield server
        assert server.stop() in (0, 1), server.log_tail()
        assert server.stragglers == []
