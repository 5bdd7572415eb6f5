"""`make serve`: what it leaves when it is interrupted, which run it serves, and ports that cannot be."""

from __future__ import annotations

import os

import pytest

from demo import serve
from ranking.errors import InputError


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "ROOT", tmp_path)
    monkeypatch.setattr(serve, "STATE", tmp_path / "runs" / "serve")
    return tmp_path / "runs"


def finished(runs, name: str, age: int, published: bool = True):
    """A run that ended `age` seconds ago."""
    (runs / name).mkdir(parents=True)
    (runs / name / "summary.json").touch()
    os.utime(runs / name / "summary.json", (10**9 - age, 10**9 - age))
    if published:
        (runs / name / "model_repository" / "student").mkdir(parents=True)
    return runs / name


def test_an_interrupted_start_leaves_nothing_running(runs, monkeypatch):
    """Seen: tritonserver went on, without router and page, and the next `make serve` refused to start."""
    program = "import time; time.sleep(300)  # tritonserver"
    monkeypatch.setattr(
        serve, "commands", lambda config, out: {"tritonserver": (["-c", program], "http://127.0.0.1:1")}
    )
    seen = []

    def interrupted(name, process, *_) -> None:
        seen.append((process, serve.running()))
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "wait_until_ready", interrupted)
    monkeypatch.setattr(serve, "check_ports", lambda flags: None)  # whoever else uses them
    config = serve.Config(out=finished(runs, "demo", 0))
    with pytest.raises(KeyboardInterrupt):
        serve.start(config)
    ((process, running),) = seen
    assert list(running) == ["tritonserver"]
    process.wait(30)
    assert not serve.running()


def test_the_newest_run_that_published_a_student_is_served(runs):
    with pytest.raises(InputError, match="no finished demo run"):
        serve.newest_run()
    finished(runs, "refused", 10, published=False)
    with pytest.raises(InputError, match="refused: its student was not published"):
        serve.newest_run()
    finished(runs, "old", 900)
    new = finished(runs, "new", 90)
    assert serve.newest_run() == new


@pytest.mark.parametrize("port", [{"http_port": 65534}, {"router_port": 0}, {"page_port": 70000}])
def test_a_port_that_cannot_be_is_named(port):
    (name,) = port
    with pytest.raises(ValueError, match=f"{name} is {port[name]}: a port from 1 to"):
        serve.Config(**port)
