"""The daily watch on made-up days: quiet where nothing changed, and an alert of the right kind where something did."""

from __future__ import annotations

import datetime as dt
import json
import re
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import yaml

from clients.ab.watch.checks import Watched, WatchLimits, click_findings, latest_day
from clients.ab.watch.drift import score_drift, stability_index
from clients.ab.watch.findings import RUNBOOK, Finding, judged
from clients.ab_watch import EXIT_ALERT, Config, main
from ranking.calibration import ece, probability
from ranking.errors import DataError, InputError
from ranking.schema import TABLES, read_table, write_table
from ranking.text import StudentFormat
from ranking.text_figures import text_figures
from tests.helpers.tiny_student import make_student

ROOT = Path(__file__).parents[4]
DAYS = [dt.date(2026, 1, day) for day in range(1, 5)]
USERS = 150
PLATT = {"kind": "platt", "slope": 1.0, "intercept": 0.0}


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A version folder of `student` as a build leaves it, as far as the watch reads it."""
    folder = make_student(tmp_path_factory.mktemp("repository") / "student" / "1")
    scores = np.random.default_rng(0).normal(size=1000)
    figures = text_figures(StudentFormat.of_checkpoint(folder), ["red film"], ["night train"], ["a ghost story"])
    reference = {"source": "candidates.parquet", "scores": sorted(scores), "text": vars(figures)}
    (folder / "reference.json").write_text(json.dumps(reference))
    (folder / "probabilities.json").write_text(json.dumps({"alone": PLATT, "with_prior": PLATT}))
    quality = {"prior": {"weight": 0.0}, "callers_send_prior": False}
    manifest = {"quality": quality, "probabilities": {"ece": 0.02, "ece_with_prior": 0.03}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder.parents[1]


@pytest.fixture(scope="module")
def days_before(tmp_path_factory) -> Path:
    """Compacted days of like pages."""
    folder = tmp_path_factory.mktemp("days")
    for number, day in enumerate(DAYS[:-1]):
        make_day(folder, day, seed=number)
    return folder


@pytest.fixture
def make_last_day(tmp_path, days_before):
    """A function (what is different on the last day) -> the folder of all days."""

    def make(**change) -> Path:
        shutil.copytree(days_before, tmp_path / "data")
        return make_day(tmp_path / "data", DAYS[-1], seed=9, **change)

    return make


def make_day(folder: Path, day: dt.date, seed: int, **change) -> Path:
    """One day of pages as compaction writes it, two of each user."""
    rng = np.random.default_rng(seed)
    usual = {"shift": 0.0, "ctr": 0.5, "new": 0.02, "latency": 10.0, "title": "night train", "platform": "web"}
    of = usual | change
    pages, events = [], []
    for page in range(2 * USERS):
        request = f"{day}-{page}"
        new = rng.random() < of["new"]
        query = f"blue film {page}{day.day}" if new else f"red film {page % 20}"
        documents = [f"{d}-{rng.integers(1000)}" for d in "abc"]
        shared = {
            "request_id": request, "user_id": f"{day}-u{page % USERS}", "query": query,
            "timestamp": dt.datetime.combine(day, dt.time(12), dt.UTC), "arm": "student",
        }  # fmt: skip
        scores = np.sort(rng.normal(of["shift"], 1, 3))[::-1].tolist()
        clicks = int(rng.random() < of["ctr"])
        pages.append(shared | {
            "experiment": "exp", "served_by": "student", "fallback": "", "model_version": "1",
            "latency_ms": float(rng.gamma(4, of["latency"] / 4)), "query_length": len(query),
            "platform": of["platform"], "segments": "{}", "forced": False, "documents": documents,
            "scores": scores, "teams": [], "clicks": clicks, "clicked_positions": [1] * clicks,
            "dwell_seconds": 0.0, "config": "c",
        })  # fmt: skip
        events += [
            shared | {
                "doc_id": doc, "title": of["title"], "summary": "a ghost story", "position": place + 1,
                "clicked": False, "dwell_seconds": 0.0,
            }
            for place, doc in enumerate(documents)
        ]  # fmt: skip
    for name, rows in (("exposures", pages), ("events", events)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_table(folder / name / f"{day}.parquet", name, pa.Table.from_pylist(rows, TABLES[name].schema))
    return folder


def watch(tmp_path, repository, **settings) -> tuple[int, dict[tuple[str, str], float]]:
    """(exit code, alert of each check and its model, platform and field)"""
    metrics = tmp_path / "watch.prom"
    code = main(Config(data=tmp_path / "data", repository=repository, metrics=metrics, **settings))
    found = {}
    day = settings.get("day") or max(path.stem for path in (tmp_path / "data/exposures").iterdir())
    began = float(re.search(r"^disranker_watch_day_seconds (\S+)$", metrics.read_text(), re.M)[1])
    assert dt.datetime.fromtimestamp(began, dt.UTC).isoformat() == f"{day}T00:00:00+00:00"
    for line in metrics.read_text().splitlines():
        if line.startswith("disranker_watch_alert{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            found[labels.pop("check"), labels["field"] or labels["model"] or labels["platform"]] = float(
                line.split()[-1]
            )
    return code, found


def test_a_day_like_those_before_raises_no_alert(tmp_path, repository, make_last_day, capsys):
    make_last_day()
    code, found = watch(tmp_path, repository, page=tmp_path / "watch.html")
    assert code == 0 and set(found.values()) == {0.0}, found
    assert {check for check, _ in found} == set(RUNBOOK) - {"calibration"}
    assert capsys.readouterr().out == f"2026-01-04: 300 pages, {len(found)} checks, 0 alerts\n"
    assert "0 of" in (page := (tmp_path / "watch.html").read_text()) and "score_drift" in page


@pytest.mark.parametrize(
    ("change", "alerts"),
    [
        ({"shift": 1.0}, {("score_drift", "student")}),
        ({"new": 0.4}, {("query_mix", "")}),
        ({"ctr": 0.2}, {("click_rate", "student"), ("click_rate", "web")}),
        ({"latency": 40.0}, {("latency", "")}),
        ({"title": "夜行列車と幽霊"}, {("unknown_tokens", "unknown")}),
        ({"title": "night train " * 20}, {("cut_fields", "title")}),
    ],
)
def test_what_changed_is_what_is_alerted(tmp_path, repository, make_last_day, capsys, change, alerts):
    make_last_day(**change)
    code, found = watch(tmp_path, repository)
    assert code == EXIT_ALERT and {what for what, alert in found.items() if alert} == alerts
    told = capsys.readouterr().out
    assert all(f"ALERT {check} " in told and RUNBOOK[check] in told for check, _ in alerts)


def test_a_taste_that_turns_from_day_to_day_is_noticed(tmp_path, repository):
    """New queries come to a few pages more on each day: never a jump against the day before."""
    first = dt.date(2026, 1, 1)
    for number, new in enumerate((0.0, 0.0, 0.0, 0.0, 0.0, 0.03, 0.09)):
        make_day(tmp_path / "data", first + dt.timedelta(days=number), seed=number, new=new)
        code, found = watch(tmp_path, repository)
        if not new:
            assert code == 0, (number, found)
    assert code == EXIT_ALERT and {what for what, alert in found.items() if alert} == {("query_mix", "")}


def test_an_alert_needs_to_be_large_and_more_than_an_accident_of_many_looks():
    def finding(p: float, large: bool = True) -> Finding:
        return Finding("click_rate", {}, 0.4, 0.5, "0.475", large, p)

    found = judged([finding(0.004), finding(0.0001), finding(0.0001, large=False), *[finding(0.9)] * 7], alpha=0.01)
    assert [one.alert for one in found] == [False, True, False, *[False] * 7]
    assert found[0].adjusted == pytest.approx(0.032) and found[1].adjusted == pytest.approx(0.001)


def judge(data: Path, out: Path, chance) -> tuple[list[float], list[int]]:
    """Judgments of each page's first document on the last day: (scores, grades). chance(score): of being relevant."""
    pages = read_table(data / "exposures" / "2026-01-04.parquet", "exposures").to_pylist()
    scores = [page["scores"][0] for page in pages]
    grades = (np.random.default_rng(0).random(len(pages)) < chance(np.array(scores))).astype(int).tolist()
    rows = [
        {
            "query_id": page["request_id"], "doc_id": page["documents"][0], "query": page["query"], "title": "t",
            "summary": "", "grade": grade,
        }
        for page, grade in zip(pages, grades)
    ]  # fmt: skip
    write_table(out, "judgments", pa.Table.from_pylist(rows, TABLES["judgments"].schema))
    return scores, grades


def test_calibration_is_measured_on_fresh_judgments(tmp_path, repository, make_last_day):
    # relevant three times more rarely than the map says
    scores, grades = judge(make_last_day(), tmp_path / "fresh.parquet", lambda score: probability(score, PLATT) / 3)
    code, found = watch(tmp_path, repository, judgments=tmp_path / "fresh.parquet")
    assert code == EXIT_ALERT and found["calibration", "student"] == 1
    value = re.search(r'watch_value\{check="calibration".*\} (\S+)', (tmp_path / "watch.prom").read_text())
    assert float(value[1]) == pytest.approx(ece(probability(scores, PLATT), np.array(grades) > 0), abs=0.03)


@pytest.mark.parametrize("callers_send_prior", [True, False])
def test_calibration_of_blended_scores_is_that_of_the_map_with_a_prior(
    tmp_path, repository, make_last_day, capsys, callers_send_prior
):
    """Seen: scores with a prior blended in were held against the map of scores alone: an alert every day."""
    judge(make_last_day(), tmp_path / "fresh.parquet", lambda score: probability(score, PLATT | {"intercept": 2.0}))
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy)
    maps = {"alone": PLATT, "with_prior": PLATT | {"intercept": 2.0}}
    (copy / "student/1/probabilities.json").write_text(json.dumps(maps))
    manifest = json.loads((copy / "student/1/manifest.json").read_text())
    manifest["quality"] = {"prior": {"weight": 0.4}, "callers_send_prior": callers_send_prior}
    (copy / "student/1/manifest.json").write_text(json.dumps(manifest))
    code, found = watch(tmp_path, copy, judgments=tmp_path / "fresh.parquet", page=tmp_path / "watch.html")
    reference = re.search(r'watch_reference\{check="calibration".*\} (\S+)', (tmp_path / "watch.prom").read_text())
    told = "holds if no caller sends a prior"
    if callers_send_prior:
        assert code == 0 and found["calibration", "student"] == 0 and float(reference[1]) == 0.03
        assert told not in (tmp_path / "watch.html").read_text()
    else:
        assert code == EXIT_ALERT and float(reference[1]) == 0.02
        assert told in (tmp_path / "watch.html").read_text() and told in capsys.readouterr().out


def test_a_day_without_pages_is_named(tmp_path, make_last_day):
    make_last_day()
    with pytest.raises(InputError, match=r"no pages of 2026-01-09; run ab_compact.py first"):
        main(Config(data=tmp_path / "data", day="2026-01-09"))
    with pytest.raises(InputError, match="no day there"):
        main(Config(data=tmp_path / "nowhere"))


def test_a_record_of_a_wrong_clock_does_not_hide_the_days_to_come(tmp_path, make_last_day, caplog):
    """Seen: one page dated 40 days ahead was "the last day": no check and no alert until that day came."""
    make_last_day()
    later = dt.date.today() + dt.timedelta(days=40)
    make_day(tmp_path / "data", later, seed=1)
    last = DAYS[-1]
    tomorrow = last + dt.timedelta(days=1)
    assert latest_day(tmp_path / "data", tomorrow) == last and f"pages of {later}" in caplog.text
    assert latest_day(tmp_path / "data", later + dt.timedelta(days=1)) == later
    (tmp_path / "data/exposures/2026-01-01.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"2026-01-01\.parquet"):
        latest_day(tmp_path / "data", last)


def test_the_running_day_waits_until_it_is_over(tmp_path, make_last_day):
    """Seen: run each night at two, the watch looked at two hours of a day, and at the rest of no day ever."""
    data, last = make_last_day(), DAYS[-1]
    assert latest_day(data, last) == DAYS[-2] and latest_day(data, last + dt.timedelta(days=1)) == last
    for day in DAYS[:-1]:
        (data / f"exposures/{day}.parquet").unlink()
    assert latest_day(data, last) == latest_day(data, DAYS[0]) == last  # the only one, running or to come
    shutil.copy(data / f"exposures/{last}.parquet", data / f"exposures/{last} (1).parquet")
    with pytest.raises(InputError, match="its name is no day"):
        latest_day(data, last)


@pytest.mark.parametrize("few", [DAYS[-2], DAYS[-1]])
def test_days_of_few_users_say_nothing(tmp_path, repository, make_last_day, few):
    """Seen: a traceback of "1 users: a variance needs at least two", on a launch's second day for instance."""
    data = make_last_day()
    for day in DAYS[:-2]:
        (data / f"exposures/{day}.parquet").unlink()
    pages = read_table(data / f"exposures/{few}.parquet", "exposures")
    users = pa.array(["one"] * len(pages))
    write_table(data / f"exposures/{few}.parquet", "exposures", pages.set_column(1, "user_id", users))
    code, found = watch(tmp_path, repository)
    assert code == 0 and not {check for check, _ in found} & {"click_rate", "latency", "query_mix"}


def test_a_day_that_cannot_be_read_is_one_line(tmp_path, make_last_day):
    """Seen: DuckDB's traceback, of a damaged file as of a full disk."""
    data = make_last_day()
    day = data / "exposures/2026-01-02.parquet"
    content = day.read_bytes()
    day.write_bytes(content[:40] + bytes(400) + content[440:])
    with pytest.raises(DataError, match=r"data: DuckDB: .*2026-01-02\.parquet"):
        main(Config(data=data))


def test_platforms_are_not_compared_one_by_one(tmp_path, make_last_day):
    """Seen: a query over all pages for each of the platforms, of which callers may send as many as they like."""
    data = make_last_day()
    for day in DAYS:
        pages = read_table(data / f"exposures/{day}.parquet", "exposures")
        names = [("web", "", f"p{row}")[row % 3] for row in range(len(pages))]
        place = pages.column_names.index("platform")
        write_table(
            data / f"exposures/{day}.parquet", "exposures", pages.set_column(place, "platform", pa.array(names))
        )
    asked = []
    with duckdb.connect() as connection:

        class Counted:
            def execute(self, *given):
                asked.append(given)
                return connection.execute(*given)

        watched = Watched(Counted(), data, None, DAYS[-1], 7, 100, WatchLimits())
        watched.load()
        asked.clear()
        found = click_findings(watched)
        pages = connection.execute("SELECT platform, today, (clicks > 0)::INT AS clicked FROM page").fetchall()
    assert len(asked) == 6  # not one for each platform
    assert [one.where for one in found] == [{"model": "student"}, {"platform": "(none)"}, {"platform": "web"}]
    for one, name in zip(found[1:], ("", "web")):
        for value, of in ((one.value, True), (one.reference, False)):
            clicked = [click for platform, today, click in pages if platform == name and today == of]
            assert value == pytest.approx(np.mean(clicked))


def test_alerts_are_told_before_a_page_that_cannot_be_written(tmp_path, repository, make_last_day, capsys):
    """Seen: "No such file or directory", and nobody heard of the alerts."""
    make_last_day(ctr=0.1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        main(Config(data=tmp_path / "data", repository=repository, page=tmp_path / "file/watch.html"))
    assert "ALERT" in capsys.readouterr().out


def test_a_version_without_a_usable_reference_is_told(tmp_path, repository, make_last_day, caplog):
    """Seen: a repository that is not there, or a version without a reference, left checks out without a word."""
    make_last_day()
    with pytest.raises(InputError, match="no such model repository"):
        main(Config(data=tmp_path / "data", repository=tmp_path / "nowhere"))
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy)
    (reference,) = copy.rglob("reference.json")
    reference.write_text('{"scores": [')
    with pytest.raises(InputError, match=r"reference\.json: cannot be read"):
        main(Config(data=tmp_path / "data", repository=copy))
    reference.unlink()
    assert main(Config(data=tmp_path / "data", repository=copy)) == 0
    assert "no reference.json: scores and texts of student 1 are not checked" in caplog.text


def test_the_index_and_the_distance_are_their_textbook_values():
    assert stability_index(np.array([0.5, 0.5]), np.array([0.8, 0.2])) == pytest.approx(
        0.3 * np.log(1.6) - 0.3 * np.log(0.4)
    )
    drift = score_drift(np.arange(100), np.arange(100) + 50)
    assert drift.ks == pytest.approx(0.5) and drift.psi > 1
    same = score_drift(np.arange(100), np.arange(100))
    assert (same.psi, same.ks, same.p) == (pytest.approx(0), 0, 1)


def test_every_check_has_an_alert_rule():
    rules = yaml.safe_load((ROOT / "deploy/watch_alerts.yaml").read_text())["groups"][0]["rules"]
    for check in RUNBOOK:
        assert any(check in rule["expr"] and rule["annotations"]["runbook"] for rule in rules), check
