"""When the demo says "do not ship"."""

from __future__ import annotations

import gzip
import importlib
import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clients.labelling.corpus_run import EXIT_REJECTS
from demo import retrain, run
from demo.run import Config
from demo.stages import Stages
from demo.summary import SYSTEMS
from demo.verdict import reason_not_to_ship
from ranking.errors import InputError
from ranking.program import parse

RNG = np.random.default_rng(0)
# BM25 is the better of the two: each arm serves with all weight on its prior
SAME_AS_BM25 = {"student": -0.1, "baseline": -0.1, "student + bm25": 0.0, "baseline + bm25": 0.0}
BM25 = RNG.uniform(0.3, 0.7, 200)


@pytest.fixture(autouse=True)
def machine_with_room(monkeypatch):
    """Nothing large runs here, so that a busy machine is no reason to stop; tests/demo/test_preflight.py has those."""
    monkeypatch.setattr(run, "check_machine", lambda out, decoder_teacher: None)


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
    assert reason_not_to_ship(with_prior=False, evaluation=evaluation(tmp_path, student=0.05, baseline=0.02)) == ""


def test_a_student_that_equals_the_baseline_ships_if_it_beats_bm25(tmp_path):
    assert reason_not_to_ship(with_prior=False, evaluation=evaluation(tmp_path, student=0.05, baseline=0.05)) == ""


@pytest.mark.parametrize("gain", [-0.2, 0.002, 0.005])
def test_no_gain_beyond_chance_over_bm25_does_not_ship(tmp_path, gain):
    reason = reason_not_to_ship(with_prior=False, evaluation=evaluation(tmp_path, student=gain, baseline=0.0))
    assert f"({gain:+.3f} [" in reason and "nothing trained here beats what you have" in reason


def test_the_baseline_is_named_where_it_is_the_better_one(tmp_path):
    assert "the baseline does beat it" in reason_not_to_ship(
        with_prior=False, evaluation=evaluation(tmp_path, student=0.0, baseline=0.05)
    )
    assert "ship the baseline" in reason_not_to_ship(
        with_prior=False, evaluation=evaluation(tmp_path, student=0.05, baseline=0.1)
    )


def test_on_own_data_the_arms_are_judged_as_they_serve_with_their_prior(tmp_path):
    systems = {"student": -0.05, "baseline": -0.1, "student + bm25": 0.03, "baseline + bm25": 0.01}
    folder = evaluation(tmp_path, **systems)
    assert reason_not_to_ship(folder, with_prior=True) == ""
    assert "NDCG@5 of the student is" in reason_not_to_ship(folder, with_prior=False)
    folder = evaluation(tmp_path, **(systems | {"student + bm25": 0.0}))
    assert "NDCG@5 of the student with BM25 as its prior is" in reason_not_to_ship(folder, with_prior=True)


def test_a_run_without_gain_publishes_nothing_and_exits_with_3(tmp_path, monkeypatch, capsys):
    commands = []

    def program(self, name, title, *command, made=None):
        commands.append(name)
        if name == "evaluate":
            folder = evaluation(tmp_path / "run" / "evaluation", **SAME_AS_BM25)
            row = {"metrics": {"ndcg@5": 0.5, "pnr": 1.0}}
            content = {"systems": dict.fromkeys(SYSTEMS, row)}
            (folder / "evaluation.json").write_text(json.dumps(content))

    monkeypatch.setattr(Stages, "program", program)
    monkeypatch.setattr(Stages, "run", lambda self, name, *_, **__: commands.append(name))
    monkeypatch.setattr("demo.summary.labelling", lambda out: {})
    (tmp_path / "judgments.csv").write_text("query,title,grade\n")
    assert run.main(Config(data=tmp_path / "judgments.csv", out=tmp_path / "run")) == 3
    assert commands == ["data", "sample", "baseline", "label", "student", "evaluate"]
    assert "do not ship: on 200 test queries" in capsys.readouterr().out
    assert "do_not_ship" in json.loads((tmp_path / "run" / "summary.json").read_text())
    assert not (tmp_path / "run" / "model_repository").exists()


def parse_command(*command) -> str:
    """A stage's command as its program reads it, which is not run; returns the program's module."""
    words = [str(word) for word in command]
    module, flags = (words[1], words[2:]) if words[0] == "-m" else (words[0][:-3].replace("/", "."), words[1:])
    program = importlib.import_module(module)
    (kind,) = (kind for name, kind in get_type_hints(program.main).items() if name != "return")
    parse(kind, flags)
    return module


@pytest.mark.parametrize("size", ["small", "0.5b_24gb"])
def test_every_command_of_a_renewed_decoder_takes_its_flags(tmp_path, monkeypatch, size):
    parsed = []
    monkeypatch.setattr(
        Stages, "program", lambda self, name, title, *command, made: parsed.append(parse_command(*command))
    )
    paths = {name: tmp_path / name for name in ("log", "data", "student", "repository", "out", "pretrained")}
    config = retrain.Config(**paths, teacher="renew", teacher_size=size)
    retrain.renew_teacher(Stages(tmp_path / "run", total=3), config)
    assert parsed == ["training.pretrain_teacher", "training.finetune_teacher", "training.finetune_teacher"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"smoke": True},
        {"data": "table"},
        {"data": "table", "smoke": True},
        {"data": "table", "student_init": "scratch"},
        {"data": "table", "teacher_init": "hub/decoder"},
    ],
)
def test_every_command_of_the_flow_takes_its_flags(tmp_path, monkeypatch, settings):
    """Each stage's command parses; nothing is run."""
    parsed = []

    def parses(*command):
        parsed.append(parse_command(*command))

    def stage(self, name, title, work, *_, **__):
        if name in ("data", "sample"):
            work()

    def beside(self, name, title, *command, made):
        parses(*command)
        return nullcontext()

    monkeypatch.setattr(Stages, "program", lambda self, name, title, *command, made=None: parses(*command))
    monkeypatch.setattr(Stages, "beside", beside)
    monkeypatch.setattr(Stages, "run", stage)
    monkeypatch.setattr(run, "run_program", parses)
    monkeypatch.setattr(run, "reason_not_to_ship", lambda evaluation, with_prior: "")
    monkeypatch.setattr(run, "summarise", lambda *_: {"text": "done"})
    (tmp_path / "judgments.csv").write_text("query,title,grade\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "candidates.parquet").write_text("")
    (tmp_path / "data" / "dataset.json").write_text("{}")
    given = {"data": tmp_path / "judgments.csv"} if "data" in settings else {}
    assert run.main(Config(**{**settings, **given}, out=tmp_path)) == 0
    assert parsed[-1] == "clients.ab_report" and parsed.count("build.build_student") == 2
    assert parsed.count("training.train_baseline") == 1
    assert ("training.blend_labels" in parsed) == ("data" in settings and "teacher_init" not in settings)


def test_a_table_with_bad_rows_is_prepared_and_their_number_said(tmp_path, capsys):
    table = tmp_path / "judged.csv"
    rows = [f"red tent {n},d{n}-{g},tent {g},a text,{g}" for n in range(60) for g in (0, 1, 2)]
    table.write_text("\n".join(["query,doc_id,title,summary,grade", *rows, ",d0-0,tent 0,a text,1"]) + "\n")
    flags = run.source_flags(Config(data=table, limit=20))
    Stages(tmp_path / "run", total=1).run("data", "prepare", lambda: run.prepare(flags, tmp_path / "run" / "data"))
    assert "1 bad rows were left out" in capsys.readouterr().out
    assert "query is blank" in (tmp_path / "run" / "data" / "rejects.tsv").read_text()


def test_a_pair_that_the_teacher_refuses_does_not_stop_the_demo(tmp_path, monkeypatch):
    """Seen: exit code 3 of the labeller ended the demo, at the same pair whenever it was run again."""
    accepted = {}
    monkeypatch.setattr(run, "run_program", lambda name, *_, accept=(0,): accepted.setdefault(name, accept))
    monkeypatch.setattr(run, "start_triton", lambda *_, **__: nullcontext(SimpleNamespace(grpc="127.0.0.1:1")))
    run.label(tmp_path / "candidates.parquet", tmp_path, tmp_path / "labels")
    assert accepted == {"clients/label_corpus.py": (0, EXIT_REJECTS)}


@pytest.mark.parametrize("splits", [["test"], ["train", "test"]])
def test_a_collection_judged_for_the_test_alone_is_split_anew(tmp_path, splits):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").touch()
    for split in splits:
        (tmp_path / "qrels" / f"{split}.tsv").touch()
    flags = run.source_flags(Config(data=tmp_path, limit=40))
    assert ("--resplit" in flags) == ("train" not in splits)


def test_a_collection_in_trecs_form_keeps_its_splits_and_gets_others_to_rank(tmp_path):
    """Seen: its own splits were drawn anew without a word, and relevant documents alone ended the run."""
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl.gz").touch()
    (tmp_path / "qrels" / "train.qrels").write_text("q1 0 d1 1\nq2 0 d2 1\n", encoding="utf-8")
    (tmp_path / "qrels" / "test.qrels.gz").write_bytes(gzip.compress(b"q3 0 d1 1\n"))
    flags = run.source_flags(Config(data=tmp_path, limit=40))
    assert "--resplit" not in flags and "--negatives" in flags and f"beir:{tmp_path}" in flags
    (tmp_path / "qrels" / "train.qrels").write_text("q1 0 d1 1\nq1 0 d2 0\nq2 0 d1 0\n", encoding="utf-8")
    assert "--negatives" not in run.source_flags(Config(data=tmp_path, limit=40))


def test_data_that_are_not_there_are_called_so(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        run.source_flags(Config(data=tmp_path / "nowhere", limit=40))


def test_a_folder_of_parquet_files_is_a_table(tmp_path):
    (tmp_path / "split=train").mkdir()
    (tmp_path / "split=train" / "part-0.parquet").touch()
    assert f"table:{tmp_path}" in run.source_flags(Config(data=tmp_path, limit=40))


@pytest.mark.parametrize(("grades", "added"), [("11", True), ("12", True), ("10", False), ("20", False)])
def test_a_collection_that_judges_relevant_documents_alone_gets_others_to_rank(tmp_path, grades, added):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").touch()
    rows = [f"q{n}\td{n}{grade}\t{grade}" for n in range(5) for grade in grades]
    (tmp_path / "qrels" / "train.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    flags = run.source_flags(Config(data=tmp_path, limit=40))
    assert ("--negatives" in flags) == added


def test_own_data_start_from_minilm_and_the_world_from_scratch(tmp_path):
    assert Config().student_init == "scratch" and Config().decoder_teacher
    own = Config(data=tmp_path)
    assert own.student_init == "minilm" and not own.decoder_teacher
    assert Config(data=tmp_path, teacher_init="hub/decoder").decoder_teacher
    assert run.student_start(own)[0] == "minilm" and run.student_start(Config())[0] == "small"
