"""The demo's record of finished stages: what runs again, what goes on, and what is thrown away."""

from __future__ import annotations

import pytest

from demo.stages import Stages
from ranking.errors import InputError


class Flow:
    """Two stages that append to files; the second can be interrupted half-way."""

    def __init__(self, folder):
        self.folder = folder
        self.ran: list[str] = []

    def run(self, first="a", interrupt=False, interrupt_first=False):
        stages = Stages(self.folder / "run", total=2)
        stages.run("first", "first stage", lambda: self.first(interrupt_first), first)
        return stages.run("second", "second stage", lambda: self.second(interrupt), "s", self.folder / "made")

    def first(self, interrupt):
        self.ran.append("first")
        if interrupt:
            raise KeyboardInterrupt

    def second(self, interrupt):
        self.ran.append("second")
        (self.folder / "made").mkdir(exist_ok=True)
        with (self.folder / "made" / "rows").open("a") as rows:
            rows.write("row ")
            if interrupt:
                raise KeyboardInterrupt
        return {"rows": (self.folder / "made" / "rows").read_text()}


def test_a_finished_stage_is_not_run_again(tmp_path):
    flow = Flow(tmp_path)
    assert flow.run() == flow.run() == {"rows": "row "}
    assert flow.ran == ["first", "second"]


def test_an_interrupted_stage_keeps_what_it_had_made(tmp_path):
    flow = Flow(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        flow.run(interrupt=True)
    assert flow.run() == {"rows": "row row "}
    assert flow.ran == ["first", "second", "second"]


@pytest.mark.parametrize("interrupt", [False, True])
def test_other_settings_upstream_throw_later_results_away(tmp_path, interrupt):
    flow = Flow(tmp_path)
    if interrupt:
        with pytest.raises(KeyboardInterrupt):
            flow.run(interrupt=True)
    else:
        flow.run()
    assert flow.run(first="b") == {"rows": "row "}
    assert flow.ran == ["first", "second"] * 2


def test_a_stop_in_the_changed_stage_does_not_save_the_old_results_of_later_ones(tmp_path):
    flow = Flow(tmp_path)
    flow.run()
    with pytest.raises(KeyboardInterrupt):
        flow.run(first="b", interrupt_first=True)
    assert flow.run(first="b") == {"rows": "row "}
    assert flow.ran == ["first", "second", "first", "first", "second"]


def test_an_interrupted_training_is_told_to_resume(tmp_path):
    """A program that stops half-way the first time, and refuses a folder with a run in it unless told to go on."""
    program, made = tmp_path / "train.py", tmp_path / "made"
    program.write_text(f"""
import sys
from pathlib import Path
run = Path({str(made)!r}) / "training"
if run.is_dir():
    sys.exit(0 if sys.argv[1:] == ["--resume"] else "a run lies here already")
run.mkdir(parents=True)
(run / "settings.json").write_text("{{}}")
sys.exit("interrupted")
""")
    with pytest.raises(InputError, match="run again to go on from here"):
        Stages(tmp_path / "run", total=1).program("train", "a training", program, made=made)
    Stages(tmp_path / "run", total=1).program("train", "a training", program, made=made)
    assert Stages(tmp_path / "run", total=1).known["train"]["seconds"] is not None
