"""When the demo says "do not ship"."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from demo import run
from demo.run import Config
from demo.stages import Stages
from demo.verdict import reason_not_to_ship

RNG = np.random.default_rng(0)
BM25 = RNG.uniform(0.3, 0.7, 200)


def evaluation(folder, **difference):
    """per_query.parquet whose systems differ from BM25 by so much in the mean, with noise of 0.1 a query."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = RNG.normal(0, 0.1, 200)
    noise -= noise.mean()
    systems = {"bm25": BM25} | {name: BM25 + by + noise for name, by in difference.items()}
    rows = {"system": np.repeat(list(systems), 200), "ndcg@5": np.concatenate(list(systems.values()))}
    pq.write_table(pa.table(rows), folder / "per_query.parquet")
    return folder


def test_a_student_that_beats_both_ships(tmp_path):
    assert reason_not_to_ship(evaluation(tmp_path, student=0.05, baseline=0.02)) == ""


def test_a_student_that_equals_the_baseline_ships_if_it_beats_bm25(tmp_path):
    assert reason_not_to_ship(evaluation(tmp_path, student=0.05, baseline=0.05)) == ""


@pytest.mark.parametrize("gain", [-0.2, 0.002, 0.005])
def test_no_gain_beyond_chance_over_bm25_does_not_ship(tmp_path, gain):
    reason = reason_not_to_ship(evaluation(tmp_path, student=gain, baseline=0.0))
    assert f"({gain:+.3f} [" in reason and "nothing trained here beats what you have" in reason


def test_the_baseline_is_named_where_it_is_the_better_one(tmp_path):
    assert "the baseline does beat it" in reason_not_to_ship(evaluation(tmp_path, student=0.0, baseline=0.05))
    assert "ship the baseline" in reason_not_to_ship(evaluation(tmp_path, student=0.05, baseline=0.1))


def test_a_run_without_gain_publishes_nothing_and_exits_with_3(tmp_path, monkeypatch, capsys):
    commands = []

    def program(self, name, title, *command, made=None):
        commands.append(name)
        if name == "evaluate":
            folder = evaluation(tmp_path / "run" / "evaluation", student=0.0, baseline=-0.1)
            row = {"metrics": {"ndcg@5": 0.5, "pnr": 1.0}}
            content = {"systems": dict.fromkeys(("bm25", "baseline", "teacher", "student"), row)}
            (folder / "evaluation.json").write_text(json.dumps(content))

    monkeypatch.setattr(Stages, "program", program)
    monkeypatch.setattr(Stages, "run", lambda self, name, *_, **__: commands.append(name))
    monkeypatch.setattr("demo.summary.labelling", lambda out: {})
    (tmp_path / "judgments.csv").write_text("query,title,grade\n")
    assert run.main(Config(data=tmp_path / "judgments.csv", out=tmp_path / "run")) == 3
    assert commands == ["data", "sample", "label", "baseline", "student", "evaluate"]
    assert "do not ship: on 200 test queries" in capsys.readouterr().out
    assert "do_not_ship" in json.loads((tmp_path / "run" / "summary.json").read_text())
    assert not (tmp_path / "run" / "model_repository").exists()


def test_own_data_start_from_minilm_and_the_world_from_scratch(tmp_path):
    assert Config().student_init == "scratch" and Config().decoder_teacher
    own = Config(data=tmp_path)
    assert own.student_init == "minilm" and not own.decoder_teacher
    assert Config(data=tmp_path, teacher_init="hub/decoder").decoder_teacher
    assert run.student_start(own)[0] == "minilm" and run.student_start(Config())[0] == "small"
