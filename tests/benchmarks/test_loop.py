"""The loop benchmark in its tiniest form: real log, real compaction, real retraining, two rounds."""

from __future__ import annotations

import importlib
import typing
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import loop
from benchmarks.retraining.loop_report import write_report
from demo import retrain, stages
from ranking.card import ScoreCard
from ranking.program import parse
from ranking.schema import read_table
from training.world.dataset import WorldConfig
from training.world.drift import DriftSettings

ROOT = Path(__file__).parents[2]
SMALLER = {"size": "tiny-2", "match_steps": 10, "least_steps": 4, "epochs": 0.2, "warmup": 1}


def run_here(*command: str | Path, accept: tuple[int, ...] = (0,)) -> None:
    """run_program in this process: the programs are the same, and their imports cost nothing again."""
    words = [str(word) for word in command]
    name = words[1] if words[0] == "-m" else words[0].removesuffix(".py").replace("/", ".")
    program = importlib.import_module(name)
    (settings,) = (kind for part, kind in typing.get_type_hints(program.main).items() if part != "return")
    assert (program.main(parse(settings, words[2 if words[0] == "-m" else 1 :], prog=name)) or 0) in accept


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its settings and what it found."""
    folder = tmp_path_factory.mktemp("loop")
    for name, shipped in (("student", "training/configs/student_small.yaml"), ("teacher", loop.Config.teacher_config)):
        given = yaml.safe_load((ROOT / shipped).read_text()) | SMALLER
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({k: v for k, v in given.items() if k != "calibrate"}))
    drift = DriftSettings(new_intents=0.2, moved_meanings=0.2, first_round=2, last_round=2)
    config = loop.Config(
        out=folder / "out", seeds=[1], rounds=2, days=2, pages=90, users=60, wishes=25, tested=40, in_stock=8,
        min_pairs=5, teacher_tolerance=1.0, student_config=str(folder / "student.yaml"),
        next_student_config=str(folder / "student.yaml"), teacher_config=str(folder / "teacher.yaml"),
        world=WorldConfig.small(drift=drift), report=folder,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for module in (stages, retrain, loop):
            patch.setattr(module, "run_program", run_here)
        loop.main(config)
    return config, loop.Seed(config, 1).found()


def test_what_was_served_is_logged_learnt_from_and_served_again(run):
    config, found = run
    seed = loop.Seed(config, 1)
    assert [one["round"] for one in found] == [1, 2] and not found[0]["refused"]
    first, second = (read_table(seed.log / f"exposures/2026-03-0{day}.parquet", "exposures") for day in (2, 4))
    assert set(first.column("served_by").to_pylist()) == {"frozen", "loop"} and len(first) == config.pages
    assert set(second.column("model_version").to_pylist()) == {"1", "2"}  # the new student serves the second round
    made = config.out / "seed-1/round-1/retrain"
    queries = set(read_table(made / "data/clicks.parquet", "clicks").column("query").to_pylist())
    logged = {query.lower() for query in first.column("query").to_pylist()}
    assert queries and queries <= logged | {q.lower() for q in _log_of(seed, 3)}
    assert found[0]["clicks"]["privacy"]["rare_queries"] > 0
    assert ScoreCard.load(made / "student").base_model != ScoreCard.load(config.out / "seed-1/base/student").base_model


def _log_of(seed: loop.Seed, day: int) -> list[str]:
    return read_table(seed.log / f"exposures/2026-03-0{day}.parquet", "exposures").column("query").to_pylist()


def test_both_students_are_measured_on_queries_of_the_rounds_taste(run):
    config, found = run
    quiet, drifted = (one["test"] for one in found)
    assert quiet["frozen"] == quiet["loop"]  # in the first round both arms are one checkpoint
    assert set(quiet["kinds"]) == {"unchanged"} and {"new", "moved", "unchanged"} == set(drifted["kinds"])
    assert len(drifted["kinds"]) > len(quiet["kinds"])
    seed = loop.Seed(config, 1)
    frozen, later = (seed.models(2)[model] / "model.safetensors" for model in ("frozen", "loop"))
    assert frozen.read_bytes() != later.read_bytes()
    assert np.mean(drifted["loop"]) == pytest.approx(drifted["ndcg@5"]["loop"])


def test_a_finished_run_trains_nothing_again_and_writes_the_same_page(run, monkeypatch):
    config, found = run
    for module in (stages, retrain, loop):
        monkeypatch.setattr(module, "run_program", lambda *_, **__: pytest.fail("ran a program again"))
    before = (config.report / "loop.md").read_text()
    loop.main(config)
    assert (config.report / "loop.md").read_text() == before
    assert "| 2 | 1 | " in before and "Seed 1: the watch " in before
    unfinished = write_report(found[:1], 2, config.world.drift, None, "", "command")
    assert "Not finished: 1 of 2 rounds" in unfinished and "no round with drift is finished" in unfinished
