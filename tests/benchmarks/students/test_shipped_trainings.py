"""Trainings of the benchmarks: shipped settings, flags that win over them, nothing trained twice."""

from __future__ import annotations

import types
from typing import Any

from benchmarks.students.runs import train_as_shipped
from ranking.card import CARD_NAME
from training import distill_student, train_baseline


def recorder(program: Any) -> tuple[Any, list[Any]]:
    seen: list[Any] = []
    return types.SimpleNamespace(Config=program.Config, main=seen.append), seen


def test_flags_win_over_the_shipped_settings(tmp_path):
    program, seen = recorder(train_baseline)
    out = train_as_shipped(program, "baseline_clicks_minilm.yaml", tmp_path / "b", data=tmp_path, seed=7)
    assert out == tmp_path / "b"
    (config,) = seen
    assert (config.learn_from, config.init, config.seed, config.out, config.resume) == (
        "clicks",
        "minilm",
        7,
        out,
        False,
    )


def test_a_finished_training_is_kept_and_an_interrupted_one_goes_on(tmp_path):
    program, seen = recorder(distill_student)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / CARD_NAME).write_text("{}")
    flags = {"data": tmp_path, "labels": tmp_path, "train_share": 0.0}
    train_as_shipped(program, "student_minilm.yaml", tmp_path / "done", **flags)
    assert seen == []
    state = tmp_path / "begun" / "training" / "checkpoint-10"
    state.mkdir(parents=True)
    (state / "trainer_state.json").write_text("{}")
    train_as_shipped(program, "student_minilm.yaml", tmp_path / "begun", **flags)
    assert seen[0].resume and seen[0].train_share == 0.0 and seen[0].judged_epochs == 2
