"""The demo's record of finished stages: what runs again, what goes on, and what is thrown away."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from demo.stages import ROOT, Stages, last_words, one_run, run_program
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


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "stages.json").write_text('{"train": ')
    with pytest.raises(InputError, match=r"stages\.json: cannot be read .*every stage runs"):
        Stages(tmp_path, total=1)


def test_an_interrupted_stage_keeps_what_it_had_made(tmp_path):
    flow = Flow(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        flow.run(interrupt=True)
    assert flow.run() == {"rows": "row row "}
    assert flow.ran == ["first", "second", "second"]


def test_a_finished_stage_whose_folder_was_removed_runs_again_and_all_after_it_do(tmp_path, capsys):
    ran = []

    def stages():
        all_stages = Stages(tmp_path / "run", total=3)
        for name in ("first", "second", "third"):
            made = tmp_path / name

            def work(name=name, made=made):
                ran.append(name)
                made.mkdir()

            all_stages.run(name, name, work, made=made)

    stages()
    shutil.rmtree(tmp_path / "second")
    stages()
    stages()
    assert ran == ["first", "second", "third", "second", "third"]
    assert "second is gone: this stage and all after it run again" in capsys.readouterr().out


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
(run / "checkpoint-1").mkdir(parents=True)
(run / "checkpoint-1" / "trainer_state.json").write_text("{{}}")
sys.exit("interrupted")
""")
    with pytest.raises(InputError, match="run again to go on from here"):
        Stages(tmp_path / "run", total=1).program("train", "a training", program, made=made)
    Stages(tmp_path / "run", total=1).program("train", "a training", program, made=made)
    assert Stages(tmp_path / "run", total=1).known["train"]["seconds"] is not None


def test_a_training_that_failed_before_its_first_checkpoint_starts_anew(tmp_path):
    program, made = tmp_path / "train.py", tmp_path / "made"
    program.write_text(f"""
import sys
from pathlib import Path
run = Path({str(made)!r}) / "training"
if run.is_dir():
    sys.exit("other data than before" if sys.argv[1:] else 0)
run.mkdir(parents=True)
(run / "settings.json").write_text("{{}}")
sys.exit("no dev judgments")
""")
    with pytest.raises(InputError, match="run again to go on from here"):
        Stages(tmp_path / "run", total=1).program("train", "a training", program, made=made)
    Stages(tmp_path / "run", total=1).program("train", "a training", program, made=made)


def test_two_runs_do_not_work_in_one_folder(tmp_path):
    with (
        one_run(tmp_path / "run"),
        pytest.raises(InputError, match="another run works in it"),
        one_run(tmp_path / "run"),
    ):
        pass
    with one_run(tmp_path / "run"):
        pass


MEET = """
import sys, time
from pathlib import Path
mine, other = map(Path, sys.argv[1:])
mine.touch()
end = time.monotonic() + 60
while not other.exists():
    time.sleep(0.05)
    assert time.monotonic() < end, "the other stage never ran"
"""


def test_a_stage_beside_another_runs_while_that_one_does(tmp_path, capsys):
    one, other = tmp_path / "one", tmp_path / "other"
    for expected in ([], ["done before"] * 2):
        stages = Stages(tmp_path / "run", total=2)
        with stages.beside("one", "first stage", "-c", MEET, one, other):
            stages.program("other", "second stage", "-c", MEET, other, one)
        assert [stages.known[name]["number"] for name in ("one", "other")] == [1, 2]
        shown = capsys.readouterr().out
        assert [words for words in expected if words in shown] == expected
        one.unlink(missing_ok=True)  # a second run that did the work again would wait for it


def test_a_failed_stage_beside_another_fails_the_run_once_that_one_is_done(tmp_path):
    stages = Stages(tmp_path / "run", total=2)
    with (
        pytest.raises(InputError, match=r"exit code 1.*01-one\.log; run again"),
        stages.beside("one", "first stage", "-c", "import sys; sys.exit('error: no such row')"),
    ):
        stages.run("other", "second stage", lambda: {"rows": 3})
    assert stages.known["one"]["seconds"] is None
    assert stages.known["other"]["found"] == {"rows": 3}


def test_a_stop_ends_the_stage_beside_it_too_and_the_next_run_goes_on_with_both(tmp_path):
    made = tmp_path / "made"
    program = tmp_path / "train.py"
    program.write_text(f"""
import sys, time
from pathlib import Path
run = Path({str(made)!r}) / "training"
if run.is_dir():
    sys.exit(0 if sys.argv[1:] == ["--resume"] else "a run lies here already")
(run / "checkpoint-1").mkdir(parents=True)
(run / "checkpoint-1" / "trainer_state.json").write_text("{{}}")
time.sleep(300)
""")

    def interrupted():
        while not (made / "training" / "checkpoint-1" / "trainer_state.json").is_file():
            time.sleep(0.05)
        raise KeyboardInterrupt

    began = time.monotonic()
    stages = Stages(tmp_path / "run", total=2)
    with pytest.raises(KeyboardInterrupt), stages.beside("one", "a training", program, made=made):
        stages.run("other", "second stage", interrupted)
    assert time.monotonic() - began < 60
    assert stages.known["one"]["seconds"] is None
    stages = Stages(tmp_path / "run", total=2)
    with stages.beside("one", "a training", program, made=made):
        stages.run("other", "second stage", lambda: {"rows": 3})
    assert all(stages.known[name]["seconds"] is not None for name in ("one", "other"))


KILLED_RUN = """
import os, signal, sys, threading, time
from pathlib import Path
from demo.stages import Stages

pid, folder = map(Path, sys.argv[1:])

def end():
    while not pid.is_file() or not pid.read_text():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=end).start()
training = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(300)"
Stages(folder, total=1).program("one", "a training", "-c", training, pid)
"""


def test_a_killed_run_leaves_no_program_behind(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED_RUN, tmp_path / "pid", tmp_path / "run"], cwd=ROOT, timeout=200)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)
            assert time.monotonic() < deadline, "the program goes on without its run"


def test_a_programs_output_goes_to_the_stages_log_and_not_to_the_terminal(tmp_path, capfd):
    stages = Stages(tmp_path / "run", total=1)
    stages.run("first", "first stage", lambda: run_program("-c", "print(dict(pairs=3)); print('3 pairs')"))
    assert (tmp_path / "run" / "logs" / "01-first.log").read_text() == "{'pairs': 3}\n3 pairs\n"
    shown = capfd.readouterr().out
    assert "[ 1/1] first stage" in shown and "{'pairs'" not in shown


def test_a_failed_program_shows_the_end_of_its_output_and_where_the_rest_is(tmp_path, capfd):
    stages = Stages(tmp_path / "run", total=1)
    work = "import sys; print('\\n'.join(map(str, range(100)))); sys.exit('error: no such row')"
    with pytest.raises(InputError, match=r"exit code 1.*01-first\.log; run again"):
        stages.run("first", "first stage", lambda: run_program("-c", work))
    shown = capfd.readouterr().err.split()
    assert shown[-4:] == ["error:", "no", "such", "row"] and "99" in shown and "3" not in shown


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (b"step 1\rstep 2\rstep 3", "step 3"),
        (b'5 of 9 files\n{\n  "pairs": 3\n}\n', "5 of 9 files"),
        (b"", ""),
        (b"\xff\xfe half a character", "\ufffd\ufffd half a character"),
    ],
)
def test_the_progress_line_is_the_last_one_that_tells_something(output, told):
    assert last_words(output) == told
