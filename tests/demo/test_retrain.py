"""Retraining: what it takes from the log, where it stops, the experiment that it writes."""

from __future__ import annotations

import datetime as dt
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import yaml

from clients.ab.experiment.file import ExperimentFile
from clients.labelling.corpus_run import EXIT_REJECTS
from demo import retrain
from demo.retrain import (
    EXIT_STOPPED,
    Config,
    days_of,
    experiment_text,
    link_days,
    main,
    merge,
    refuse_worse_teacher,
)
from demo.stages import one_run, run_program
from ranking.card import fingerprint
from ranking.errors import InputError
from ranking.schema import TABLES, read_table, write_table
from tests.helpers.tiny_student import make_judged, make_student


def settings(tmp_path, **more) -> Config:
    given = {"teacher": "keep", "since": "2026-01-06", "min_pairs": 5} | more
    for folder in ("student", "repository/student/1"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    return Config(
        log=tmp_path / "log", data=tmp_path / "data", student=tmp_path / "student", repository=tmp_path / "repository",
        out=tmp_path / "out", **given,
    )  # fmt: skip


def make_log(folder, days=(5, 6, 7)) -> None:
    """Three queries of six users a day, with changing places, and one query of a single user."""
    (folder / "events").mkdir(parents=True)
    for day in days:
        rows = []
        for user in range(6):
            for query in ("red film", "blue film", "my rash" if not user else "green film"):
                for place in range(4):
                    rows.append(
                        {
                            "request_id": f"{day}-{user}-{query}", "doc_id": f"d{(place + user) % 4}",
                            "user_id": f"u{user}", "timestamp": dt.datetime(2026, 1, day, 12, tzinfo=dt.UTC),
                            "query": query, "title": f"title of day {day}", "summary": "", "position": place + 1,
                            "clicked": (user + place) % 2 == 0, "dwell_seconds": 60.0 * ((user + place) % 2 == 0),
                            "arm": "student",
                        }
                    )  # fmt: skip
        table = pa.Table.from_pylist(rows, TABLES["events"].schema)
        write_table(folder / "events" / f"2026-01-0{day}.parquet", "events", table)


def test_only_days_from_the_given_one_on_are_learnt_from(tmp_path):
    make_log(tmp_path / "log")
    files = days_of(tmp_path / "log", "2026-01-06")
    assert files == ["2026-01-06.parquet", "2026-01-07.parquet"]
    assert days_of(tmp_path / "log", "", "2026-01-06") == ["2026-01-05.parquet", "2026-01-06.parquet"]
    link_days(tmp_path / "log", files, tmp_path / "linked")
    assert sorted(path.name for path in (tmp_path / "linked/events").iterdir()) == files
    with pytest.raises(InputError, match="no day since 2026-02-01"):
        days_of(tmp_path / "log", "2026-02-01")


def test_it_stops_where_too_little_was_clicked_and_says_so(tmp_path, capsys):
    make_log(tmp_path / "log")
    make_judged(tmp_path / "data")
    config = settings(tmp_path, min_pairs=1000, click_flags="--privacy.personal-data keep")
    assert main(config) == EXIT_STOPPED
    reason = json.loads((tmp_path / "out/summary.json").read_text())["stopped"]
    assert "6 new click pairs, 1000 are needed" in reason and reason in capsys.readouterr().out
    # goes on from there: the days are not read again, and new documents join the old candidates
    found = merge(config)
    assert (found["new_queries"], found["new_pairs"]) == (3, 12)
    candidates = read_table(tmp_path / "out/data/candidates.parquet", "candidates").to_pylist()
    new = [row for row in candidates if row["query_id"].startswith("log:")]
    assert {row["query"] for row in new} == {"red film", "blue film", "green film"}  # my rash has one user
    assert {row["title"] for row in new} == {"title of day 7"} and len(candidates) - len(new) == found["old_pairs"]


def test_a_known_query_joins_again_with_documents_that_it_had_not(tmp_path):
    make_log(tmp_path / "log")
    make_judged(tmp_path / "data")
    first = settings(tmp_path, min_pairs=1, click_flags="--privacy.personal-data keep")
    link_days(first.log, days_of(first.log, first.since), first.out / "log")
    retrain.new_clicks(first)
    assert merge(first)["known_queries"] == 0
    # the next run learns from the same days and has the first one's candidates: nothing is new
    second = settings(tmp_path, min_pairs=1, click_flags=first.click_flags)
    second.data, second.out = first.out / "data", tmp_path / "second"
    link_days(second.log, days_of(second.log, second.since), second.out / "log")
    retrain.new_clicks(second)
    assert merge(second)["new_pairs"] == 0
    # a document that "red film" had not: the query comes again with all that is shown for it now
    known = read_table(second.data / "candidates.parquet", "candidates")
    lacks = pc.and_(pc.equal(known.column("query"), "red film"), pc.equal(known.column("doc_id"), "d2"))
    write_table(second.data / "candidates.parquet", "candidates", known.filter(pc.invert(lacks)))
    found = merge(second)
    assert (found["new_queries"], found["known_queries"], found["new_pairs"]) == (0, 1, 4)


def test_a_ranker_goes_on_learning_from_clicks_and_labels(tmp_path, monkeypatch):
    make_log(tmp_path / "log")
    make_judged(tmp_path / "data")
    commands = []
    monkeypatch.setattr(retrain.Stages, "program", lambda _, name, *words, **__: commands.append((name, words)))
    config = settings(
        tmp_path, teacher="clicks", last_teacher=make_student(tmp_path / "last"), since="",
        click_flags="--privacy.personal-data keep",
    )  # fmt: skip
    make_student(config.out / "teacher")
    labelled = []
    retrain.learn(retrain.Stages(config.out, 6), config, lambda: labelled.append(config.out))
    assert [name for name, _ in commands] == ["teacher", "student"] and labelled == [config.out]
    (_, words), _ = commands
    assert words[words.index("--init") + 1] == config.last_teacher
    assert words[words.index("--data") + 1] == config.out / "data"
    assert (config.out / "data/shown_documents.parquet").is_file()


def test_a_run_that_goes_on_with_a_teacher_of_the_other_kind_finds_its_place_empty(tmp_path, monkeypatch):
    """build_teacher.py and build_student.py refuse each other's folders."""
    config = settings(tmp_path, teacher="renew", pretrained=tmp_path / "pretrained")
    former = config.out / "model_repository" / "teacher" / "1"
    former.mkdir(parents=True)

    def built(program, *_) -> None:
        assert program == "build/build_teacher.py" and not former.exists()
        raise InputError("built")

    monkeypatch.setattr(retrain, "run_program", built)
    with pytest.raises(InputError, match="built"):
        retrain.label(config)


def test_a_worse_teacher_stops_the_run(tmp_path):
    from ranking.card import ScoreCard

    for folder, ndcg in ((tmp_path / "out/teacher", 0.70), (tmp_path / "last", 0.75)):
        card = ScoreCard.load(make_student(folder))
        card.metrics = {"ndcg@5": ndcg}
        card.save(folder)
    config = settings(tmp_path, teacher="renew", pretrained=tmp_path / "pretrained", last_teacher=tmp_path / "last")
    with pytest.raises(InputError, match=r"stopped: the new teacher's ndcg@5 on dev is 0.7000, the last one's 0.7500"):
        refuse_worse_teacher(config)
    config.teacher_tolerance = 0.1
    refuse_worse_teacher(config)


def test_the_router_takes_the_experiment_that_it_writes(tmp_path):
    make_student(tmp_path / "out/student")
    path = tmp_path / "experiment.yaml"
    path.write_text(experiment_text(settings(tmp_path)))
    (experiment,) = ExperimentFile(path).current.experiments
    assert experiment.coverage == 0.05 and experiment.control == "student" and experiment.guardrails is not None
    assert [arm.model for arm in experiment.arms] == ["student", "student_next"]


def test_another_student_is_another_experiment(tmp_path):
    """Seen: two rounds without --since wrote one name and seed, and the report added up two treatments."""
    written = []
    for seed in (0, 1):
        make_student(tmp_path / "out/student", seed=seed)
        written.append(yaml.safe_load(experiment_text(settings(tmp_path, since="")))["experiments"][0])
    assert written[0]["name"] != written[1]["name"] and written[0]["seed"] != written[1]["seed"]
    assert experiment_text(settings(tmp_path)) == experiment_text(settings(tmp_path))


def test_an_arm_of_another_run_is_refused_before_anything_is_made(tmp_path, capsys, monkeypatch):
    """Seen: the second round's student took the place of the first one's while its test was running."""
    make_log(tmp_path / "log")
    make_judged(tmp_path / "data")
    published = tmp_path / "repository/student_next/1/manifest.json"
    published.parent.mkdir(parents=True)
    asked = {"min_pairs": 1000, "click_flags": "--privacy.personal-data keep"}

    def publish(checkpoint) -> None:
        published.write_text(json.dumps({"checkpoint": {"fingerprint": fingerprint(checkpoint)}}))

    publish(make_student(tmp_path / "student"))
    assert main(settings(tmp_path, **asked)) == EXIT_STOPPED
    assert "student_next holds another student than" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "summary.json"]
    # an interrupted run goes on: what is published is its own student; and so does one with a name of its own
    publish(make_student(tmp_path / "out/student"))
    assert main(settings(tmp_path, **asked)) == EXIT_STOPPED and "new click pairs" in capsys.readouterr().out
    # what was trained anew since it was published is another student too
    monkeypatch.setattr(retrain, "learn", lambda *_: make_student(tmp_path / "out/student", seed=1))
    assert main(settings(tmp_path)) == EXIT_STOPPED and "student_next holds another student" in capsys.readouterr().out
    retrain.refuse_taken_arm(settings(tmp_path, arm="student_w48"))


@pytest.mark.parametrize("name", ["data", "student", "log", "pretrained", "last_teacher", "repository"])
def test_what_a_run_reads_may_not_lie_where_it_writes(tmp_path, name):
    """Seen: the run before's OUT/data and OUT/student were removed before they were read."""
    make_log(tmp_path / "log")
    make_judged(tmp_path / "data")
    kept = tmp_path / "out" / name / "file"
    kept.parent.mkdir(parents=True)
    kept.write_text("of the run before")
    config = settings(tmp_path)
    setattr(config, name, kept.parent)
    with pytest.raises(InputError, match=f"--{name} .* lies in --out"):
        main(config)
    assert kept.is_file()


def test_another_log_or_dataset_is_learnt_from_anew(tmp_path):
    """Seen: with the same --out and days of the same names the clicks of the first log were "done before"."""
    for name in ("log", "other"):
        make_log(tmp_path / name, days=(5, 6, 7) if name == "log" else (6, 7))
    make_judged(tmp_path / "data")
    asked = {"min_pairs": 1000, "click_flags": "--privacy.personal-data keep", "since": "20260106"}
    assert main(settings(tmp_path, **asked)) == EXIT_STOPPED
    first = (tmp_path / "out/log/events/2026-01-06.parquet").resolve()
    config = settings(tmp_path, **asked)
    config.log = tmp_path / "other"
    assert main(config) == EXIT_STOPPED
    assert (tmp_path / "out/log/events/2026-01-06.parquet").resolve() != first


def test_settings_that_cannot_go_together_are_refused(tmp_path):
    for wrong in (
        {"teacher": "renew"}, {"arm": "student"}, {"since": "yesterday"}, {"coverage": 0.0},
        {"arm": "next_first"}, {"arm": "a/b"}, {"teacher_model": "teacher_encoder"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"pretrained|arm is student|isoformat|coverage|name '"):
            settings(tmp_path, **wrong)


def test_what_is_first_read_after_hours_is_looked_for_at_once(tmp_path):
    """Seen: a misspelt serving arm, student or last teacher was missed after labelling and training."""
    make_log(tmp_path / "log")
    make_judged(tmp_path / "data")
    with pytest.raises(InputError, match=r"--last-teacher .*/lost: no such folder"):
        main(settings(tmp_path, last_teacher=tmp_path / "lost"))
    with pytest.raises(InputError, match=r"--serving-arm studnet: .* has no version of it"):
        main(settings(tmp_path, serving_arm="studnet"))


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    """Seen: the next night's retraining removed the student that the last one's was still training."""
    make_log(tmp_path / "log")
    make_judged(tmp_path / "data")
    config = settings(tmp_path)
    with one_run(config.out), pytest.raises(InputError, match="out: another run works in it"):
        main(config)
    assert [path.name for path in config.out.iterdir()] == [".lock"]


@pytest.mark.parametrize(("code", "refused"), [(3, True), (1, False), (-9, False)])
def test_a_stage_that_fails_is_no_gate_that_refuses(tmp_path, monkeypatch, capsys, code, refused):
    """Seen: exit code 3 for a build that was killed, as for a student that is worse."""
    config = settings(tmp_path)
    make_log(config.log)
    make_judged(config.data)
    make_student(config.out / "student")
    monkeypatch.setattr(retrain, "learn", lambda *_: {})
    program = "import os, sys; " + (f"sys.exit({code})" if code > 0 else f"os.kill(os.getpid(), {-code})")
    monkeypatch.setattr(
        retrain.Stages, "program",
        lambda self, name, title, *_, **__: self.run(name, title, lambda: run_program("-c", program)),
    )  # fmt: skip
    if refused:
        assert main(config) == EXIT_STOPPED
    else:
        with pytest.raises(InputError, match=rf"exit code {code}\)"):
            main(config)
    (told,) = json.loads((config.out / "summary.json").read_text()).items()
    assert told[0] == ("stopped" if refused else "failed") and f"(exit code {code})" in told[1]


def test_a_pair_that_the_teacher_refuses_does_not_stop_the_run(tmp_path, monkeypatch):
    """Seen: exit code 3 of the labeller ended the retraining, at the same pair whenever it was run again."""
    accepted = {}
    monkeypatch.setattr(retrain, "run_program", lambda name, *_, accept=(0,): accepted.setdefault(name, accept))
    monkeypatch.setattr(retrain, "start_triton", lambda *_: nullcontext(SimpleNamespace(grpc="127.0.0.1:1")))
    retrain.label(settings(tmp_path))
    assert accepted == {"clients/label_corpus.py": (0, EXIT_REJECTS)}
