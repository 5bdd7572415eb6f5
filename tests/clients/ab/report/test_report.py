"""The A/B report: from a log with a known truth to the page that a person reads."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from clients import ab_report
from clients.ab_report import Config
from ranking.errors import DataError, InputError
from ranking.object_store import staged
from ranking.query_engine import DuckDbEngine
from ranking.schema import DROPPED_QUERY, TABLES, write_table
from tests.helpers.ab_logs import exposures, save, started
from tests.helpers.browser import browser, errors, needs_browser, overflow, set_width
from tests.helpers.bucket_server import bucket_server


def replace_column(log: pa.Table, name: str, values) -> pa.Table:
    kind = log.schema.field(name).type
    return log.set_column(log.column_names.index(name), log.schema.field(name), pa.array(values, kind))


def report(folder: Path, **settings) -> dict:
    config = Config(events=folder, out=folder / "report.html", **settings)
    ab_report.main(config)
    return json.loads((folder / "report.json").read_text())


def metric(figures: dict, name: str) -> dict:
    return next(m for m in figures["metrics"] if m["name"] == name)


@pytest.fixture(scope="module")
def winning(tmp_path_factory) -> tuple[Path, dict]:
    folder = save(tmp_path_factory.mktemp("ab"), exposures())
    return folder, report(folder)


def test_a_better_student_wins_and_the_interval_covers_the_truth(winning):
    _, figures = winning
    page = metric(figures, "page CTR")
    assert figures["trustworthy"] and figures["verdict"].startswith("student wins: page CTR")
    assert page["low"] < 0.15 < page["high"] and page["adjusted_p"] < 0.001
    assert page["always_low"] < page["low"] and page["high"] < page["always_high"]


def test_every_figure_is_the_plain_count_of_the_log(winning):
    folder, figures = winning
    log = pq.read_table(folder / "exposures" / "2026-11-01.parquet").to_pandas()
    for arm in ("baseline", "student"):
        pages = log[log.arm == arm]
        users = pages.groupby("user_id").clicks.sum()
        side = "control" if arm == "baseline" else "treatment"
        assert figures["users"][arm] == len(users)
        assert metric(figures, "page CTR")[side] == pytest.approx((pages.clicks > 0).mean(), rel=1e-9)
        assert metric(figures, "user CTR")[side] == pytest.approx((users > 0).mean(), rel=1e-9)
        capped = np.minimum(pages.dwell_seconds, figures["dwell_cap"] * pages.clicks).sum() / pages.clicks.sum()
        assert metric(figures, "dwell per click")[side] == pytest.approx(capped, rel=1e-5)
        assert metric(figures, "fallback share")[side] == pytest.approx((pages.fallback != "").mean(), rel=1e-9)
        assert metric(figures, "latency p95")[side] == pytest.approx(np.quantile(pages.latency_ms, 0.95), rel=1e-6)


def test_the_cumulative_lift_ends_at_the_reported_lift(winning):
    _, figures = winning
    assert len(figures["cumulative"]["time"]) > 5
    assert figures["cumulative"]["lift"][-1] == pytest.approx(metric(figures, "page CTR")["lift"], rel=1e-9)


def test_segments_cover_platform_query_frequency_and_length(winning):
    _, figures = winning
    assert {s["family"] for s in figures["segments"]} == {"platform", "query frequency", "query length"}


@pytest.mark.parametrize("clicked", [1, 0])
def test_no_users_platform_takes_the_report_from_all(tmp_path, clicked):
    """A name that our SQL uses, and a segment whose users all did the same, so that its interval is no number."""
    log = exposures(users=600)
    arms = log.column("arm").to_pylist()
    odd = {arms.index("baseline", 50), arms.index("student", 50), arms.index("baseline", 90), arms.index("student", 90)}
    platforms = ["$dwell_cap" if row in odd else value for row, value in enumerate(log.column("platform").to_pylist())]
    clicks = [clicked if row in odd else value for row, value in enumerate(log.column("clicks").to_pylist())]
    log = replace_column(replace_column(log, "platform", platforms), "clicks", clicks)
    figures = report(save(tmp_path, log))
    assert figures["verdict"] and "$dwell_cap" not in {segment["name"] for segment in figures["segments"]}
    assert {"query frequency", "query length", "platform"} == {segment["family"] for segment in figures["segments"]}


def test_the_line_starts_where_users_first_differ(tmp_path):
    log = exposures(users=600)
    whole = report(save(tmp_path / "whole", log))["cumulative"]["time"]
    moments = [moment.isoformat() for moment in log.column("timestamp").to_pylist()]
    clicks = [1 if moment <= whole[1] else value for moment, value in zip(moments, log.column("clicks").to_pylist())]
    assert report(save(tmp_path, replace_column(log, "clicks", clicks)))["cumulative"]["time"] == whole[2:]


def events_of(log: pa.Table) -> list[pa.Table]:
    """The `events` of exposures, two documents a page, as the first is clicked."""
    rows = []
    for position in (1, 2):
        shown = {
            "doc_id": [f"d{position}"] * len(log),
            "title": ["t"] * len(log),
            "summary": ["s"] * len(log),
            "position": pa.array([position] * len(log), pa.int32()),
            "clicked": pa.array(log.column("clicks").to_numpy() > 0) if position == 1 else pa.array([False] * len(log)),
            "dwell_seconds": log.column("dwell_seconds") if position == 1 else pa.array([0.0] * len(log), pa.float32()),
        }
        table = log.select(["request_id", "user_id", "timestamp", "query", "arm"])
        for name, values in shown.items():
            table = table.append_column(name, pa.array(values) if isinstance(values, list) else values)
        rows.append(table.select(TABLES["events"].schema.names))
    return rows


def test_an_events_table_gives_the_same_clicks_as_the_exposures(winning, tmp_path):
    folder, figures = winning
    rows = events_of(pq.read_table(folder / "exposures" / "2026-11-01.parquet"))
    write_table(tmp_path / "events.parquet", "events", rows)
    from_events = report(tmp_path)
    for name in ("page CTR", "user CTR", "dwell per click"):
        assert metric(from_events, name)["lift"] == pytest.approx(metric(figures, name)["lift"], rel=1e-6)
    assert "latency p50" not in {m["name"] for m in from_events["metrics"]}
    # clicks of a document counted: one that was clicked, as in the exposures
    events = pq.read_table(tmp_path / "events.parquet")
    counted = pa.array([3 if clicked else 0 for clicked in events["clicked"].to_pylist()])
    place = events.column_names.index("clicked")
    (tmp_path / "counted").mkdir()
    pq.write_table(events.set_column(place, "clicked", counted), tmp_path / "counted" / "events.parquet")
    from_counted = report(tmp_path / "counted")
    for name in ("page CTR", "user CTR", "dwell per click"):  # sums of several threads differ in the last digits
        assert metric(from_counted, name)["lift"] == pytest.approx(metric(from_events, name)["lift"], rel=1e-9)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("doc_id", None, "shows a document in several rows"),  # None: the row is there twice
        ("arm", "student", "has more than one arm"),
        ("user_id", "someone else", "has more than one user_id"),
        ("dwell_seconds", float("nan"), "has a click whose dwell_seconds is missing (write 0 where none is known)"),
        ("dwell_seconds", -float("nan"), "has a click whose dwell_seconds is missing"),
        ("dwell_seconds", -3.0, "has a click whose dwell_seconds is missing"),
        ("dwell_seconds", "", "has a click whose dwell_seconds is missing"),
        ("arm", "", "has an arm in some of its rows only"),
        ("request_id", "", "has a row without request_id"),
        ("clicked", "", "has a row without clicked"),
    ],
)
def test_an_events_table_that_would_be_counted_wrongly_is_refused(tmp_path, column, value, said):
    events = pa.concat_tables(events_of(exposures(users=40)))
    place = next(
        row
        for row, (arm, clicked) in enumerate(zip(events["arm"].to_pylist(), events["clicked"].to_pylist()))
        if arm == "baseline" and clicked
    )
    if value is None:
        events = pa.concat_tables([events, events.slice(place, 1)])
    else:
        values = events[column].to_pylist()
        values[place] = None if value == "" else value
        bare = pa.field(column, events.schema.field(column).type)
        events = events.set_column(events.column_names.index(column), bare, pa.array(values, bare.type))
    pq.write_table(events, tmp_path / "own.parquet")
    page = None if (column, value) == ("request_id", "") else events["request_id"][place].as_py()
    with pytest.raises(DataError, match=re.escape(f"page {page!r} {said}")):
        report(tmp_path)


def test_pages_of_ones_own_before_the_experiment_need_no_arm(tmp_path):
    events = pa.concat_tables(events_of(exposures(users=200)))
    middle = sorted(events["timestamp"].to_pylist())[len(events) // 2]
    arms = [
        None if moment < middle else arm
        for moment, arm in zip(events["timestamp"].to_pylist(), events["arm"].to_pylist())
    ]
    pq.write_table(events.drop_columns("arm").append_column("arm", pa.array(arms)), tmp_path / "own.parquet")
    figures = report(tmp_path, start=middle.isoformat())
    later = {page for page, arm in zip(events["request_id"].to_pylist(), arms) if arm is not None}
    assert figures["pages"] == len(later) < len(set(events["request_id"].to_pylist()))
    assert metric(figures, "page CTR")["cuped_variance"] is not None
    outside = len(set(events["request_id"].to_pylist())) - len(later)
    assert f"{outside} pages outside the two arms" in report(tmp_path)["basis"]["left out"]


def test_an_experiment_that_is_not_in_the_log_is_named(winning):
    folder, figures = winning
    with pytest.raises(InputError, match=f"no page of experiment 'autumn'; the log has {figures['experiment']}"):
        report(folder, experiment="autumn")


def test_a_sample_ratio_mismatch_forbids_a_verdict(tmp_path):
    figures = report(save(tmp_path, exposures(treatment_share=0.45)))
    assert figures["srm_p"] < 1e-6 and not figures["trustworthy"]
    assert figures["verdict"].startswith("No verdict")


def test_a_leaky_split_is_found(tmp_path):
    log = exposures(2000)
    arms = np.array(log.column("arm").to_pylist())
    arms[::20] = "student"  # one page in twenty served by the other arm, whoever the user
    figures = report(save(tmp_path, replace_column(log, "arm", arms)))
    assert not figures["trustworthy"]
    assert any("both arms" in check["text"] and not check["passed"] for check in figures["checks"])


def test_a_bot_is_found_and_can_be_left_out(tmp_path):
    log = exposures(2000)
    users = np.array(log.column("user_id").to_pylist(), dtype=object)
    students = np.array(log.column("arm").to_pylist()) == "student"
    users[np.flatnonzero(students)[:1000]] = "bot"
    folder = save(tmp_path, replace_column(log, "user_id", users))
    figures = report(folder, weights=[0.57, 0.43])
    assert any("busiest" in check["text"] and not check["passed"] for check in figures["checks"])
    without = report(folder, weights=[0.57, 0.43], max_pages_per_user=200)
    assert any(
        "1 users with more than 200 pages left out (1,000 pages)" in check["text"] for check in without["checks"]
    )
    assert without["pages"] == figures["pages"] - 1000


def test_pages_before_the_start_narrow_the_interval_by_cuped(tmp_path):
    folder = save(tmp_path, started(exposures(8000, days=20), "2026-11-11"))
    plain = metric(report(folder, start="2026-11-11"), "page CTR")
    assert plain["cuped_variance"] is not None and plain["cuped_variance"] < 0.95


def test_what_the_arms_showed_before_the_start_adjusts_nothing(tmp_path):
    """Seen: a start that left out the first days of a running experiment halved the lift of 20%, by CUPED."""
    log = exposures(8000, lift=0.2, days=20)
    figures = report(save(tmp_path, log), start="2026-11-11")
    later = [moment.isoformat() >= "2026-11-11" for moment in log.column("timestamp").to_pylist()]
    alone = report(save(tmp_path / "later", log.filter(pa.array(later))))
    assert metric(figures, "page CTR") == metric(alone, "page CTR")
    assert metric(figures, "page CTR")["lift"] > 0.15 and metric(figures, "page CTR")["cuped_variance"] is None
    assert f"{later.count(False):,} pages of the arms before 2026-11-11" in figures["basis"]["left out"]
    # the control alone, as everybody had it before the treatment came
    arms = [arm if since else "baseline" for arm, since in zip(log.column("arm").to_pylist(), later)]
    begun = report(save(tmp_path / "control", replace_column(log, "arm", arms)), start="2026-11-11")
    assert metric(begun, "page CTR")["cuped_variance"] < 0.95 and "of the arms before" not in begun["basis"]["left out"]


@pytest.mark.parametrize("stored", ["hash", "drop"])
def test_queries_whose_words_are_not_logged_have_no_length(tmp_path, stored):
    """Seen: every page as one of "1 or 2 words", and with dropped queries every page as a head query."""
    log = exposures(600)
    queries = [
        hashlib.sha256(query.encode()).hexdigest()[:16] if stored == "hash" else DROPPED_QUERY
        for query in log.column("query").to_pylist()
    ]
    figures = report(save(tmp_path, replace_column(log, "query", queries)))
    families = {"platform", "query frequency"} if stored == "hash" else {"platform"}
    assert {segment["family"] for segment in figures["segments"]} == families


def test_a_page_of_a_wrong_clock_stretches_neither_plan_nor_line(tmp_path, capsys):
    """Seen: one page of the year 2031 made a plan of 153 days one of 23,181, and the line had no days."""
    log = exposures(1000)
    moments = log.column("timestamp").to_pylist()
    plans, lines = [], []
    for moment in (moments[0], dt.datetime(2031, 1, 1, tzinfo=dt.UTC)):
        folder = save(tmp_path / str(moment.year), replace_column(log, "timestamp", [moment, *moments[1:]]))
        ab_report.main(Config(events=folder, plan=True, effect=0.05))
        plans.append(capsys.readouterr().out.splitlines()[-4:])
        lines.append(report(folder)["cumulative"])
    assert plans[0] == plans[1] and "153 days" in plans[0][2]
    assert all("2026-11-10" < line["time"][-1] < "2026-11-11T00:01" for line in lines)
    assert lines[1]["lift"][-1] == pytest.approx(lines[0]["lift"][-1])


def test_forced_pages_are_left_out_and_counted(tmp_path):
    log = exposures(1000)
    forced = np.arange(len(log)) % 10 == 0
    figures = report(save(tmp_path, replace_column(log, "forced", forced)))
    assert figures["pages"] == len(log) - forced.sum()
    assert f"{forced.sum():,} forced pages, 0 pages outside" in figures["basis"]["left out"]
    outside = np.arange(len(log)) < 50  # five of them forced
    log = replace_column(log, "experiment", np.where(outside, "other", "exp"))
    figures = report(save(tmp_path / "two", replace_column(log, "forced", forced)), experiment="exp")
    assert f"{forced.sum():,} forced pages, 45 pages outside" in figures["basis"]["left out"]


@pytest.mark.parametrize("wrong", [{"planned_users": 0}, {"max_pages_per_user": -1}])
def test_limits_that_can_be_none_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="must be above 0"):
        report(tmp_path, **wrong)


def test_a_page_is_not_written_over_its_own_figures(tmp_path):
    with pytest.raises(ValueError, match=r"the figures go to a \.json beside it"):
        Config(events=tmp_path, out=tmp_path / "report.json")


def test_interleaved_pages_are_credited_to_the_team_that_was_clicked(tmp_path):
    log = exposures(1000)
    n = len(log)
    log = replace_column(log, "teams", [["student", "baseline"]] * n)
    clicked = [[1] if i % 3 else [2] for i in range(n)]  # two pages in three go to the student's document
    figures = report(save(tmp_path, replace_column(log, "clicked_positions", clicked)))
    assert figures["interleaving"]["share"] == pytest.approx(2 / 3, abs=0.01)
    assert figures["interleaving"]["p"] < 1e-6


def test_an_experiment_of_interleaved_pages_alone_has_its_own_report(tmp_path):
    log = exposures(1000)
    n = len(log)
    log = replace_column(log, "teams", [["baseline", "student"]] * n)
    folder = save(tmp_path, replace_column(log, "arm", ["mixed"] * n))
    found = report(folder, interleaved=True, experiment="shoes")["interleaving"]
    assert found["share"] == 0.0 and found["pages"] == sum(c > 0 for c in log.column("clicks").to_pylist())
    with pytest.raises(InputError, match="'hats' has no interleaved page"):
        report(folder, interleaved=True, experiment="hats")
    assert report(folder, interleaved=True)["interleaving"] == found  # the only one
    with pytest.raises(InputError, match=r"'mixed' is no team of 'shoes'; --control .* two of baseline, student"):
        report(folder, interleaved=True, treatment="mixed")


@pytest.mark.parametrize("interleaved", [True, False])
def test_interleaved_pages_before_the_start_and_of_bots_are_left_out(tmp_path, interleaved):
    """Seen: --start and --max-pages-per-user changed nothing of what interleaved pages said."""
    log = exposures(1000)
    n, users = len(log), log.column("user_id").to_pylist()
    log = replace_column(log, "teams", [["baseline", "student"]] * n)
    log = replace_column(log, "clicked_positions", [[1]] * n)
    folder = save(tmp_path, log)
    later = [moment.isoformat() >= "2026-11-05" for moment in log.column("timestamp").to_pylist()]
    few = [users.count(user) <= 6 for user in users]
    for settings, kept in (({"start": "2026-11-05"}, later), ({"max_pages_per_user": 6}, few)):
        found = report(folder, interleaved=interleaved, experiment="shoes", **settings)["interleaving"]
        assert found["pages"] == sum(kept) < n


def test_judgments_are_counted_and_a_strange_verdict_names_its_row(tmp_path):
    folder = save(tmp_path, exposures(1000))
    judged = tmp_path / "judged.csv"
    judged.write_text("query,verdict\n" + "a,good\n" * 54 + "b,same\n" * 116 + "c,bad\n" * 30)
    figures = report(folder, judgments=judged)
    assert (figures["judged"]["good"], figures["judged"]["bad"]) == (54, 30)
    judged.write_text("query,verdict\na,good\nb,better\n")
    with pytest.raises(DataError, match="row 2: verdict 'better'"):
        report(folder, judgments=judged)


def test_a_log_without_clicks_gives_reasons_instead_of_lifts(tmp_path):
    log = exposures(500)
    log = replace_column(log, "clicks", [0] * len(log))
    log = replace_column(log, "dwell_seconds", [0.0] * len(log))
    figures = report(save(tmp_path, log))
    assert metric(figures, "page CTR")["lift"] is None and "zero" in metric(figures, "page CTR")["reason"]
    assert figures["verdict"] == "No verdict: there are no clicks to compare."


def test_an_arm_that_is_not_in_the_log_is_named(tmp_path):
    with pytest.raises(InputError, match="0 users in arm 'studnet'; the log has arms baseline, student"):
        report(save(tmp_path, exposures(200)), treatment="studnet")


def test_a_plan_follows_from_the_logs_variance(winning, capsys):
    folder, _ = winning
    ab_report.main(Config(events=folder, plan=True, effect=0.05))
    lines = capsys.readouterr().out
    assert "a lift of +5.00% with power 80%" in lines and "days" in lines


def test_a_plan_needs_no_experiment_yet(tmp_path, capsys):
    """Seen: "0 users in arm 'student'" of a log of before the experiment, which is when a plan is made."""
    log = exposures(2000)
    control = log.filter(pc.equal(log.column("arm"), "baseline"))
    before = control
    for column in ("arm", "experiment"):
        before = replace_column(before, column, [""] * len(control))
    plans = []
    for name, table in (("control", control), ("before", before)):
        ab_report.main(Config(events=save(tmp_path / name, table), plan=True, effect=0.05))
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1] and f"over {len(set(control.column('user_id').to_pylist())):,} users" in plans[0]
    with pytest.raises(InputError, match="0 users in arm 'student'"):
        report(save(tmp_path / "report", control))
    with pytest.raises(InputError, match="0 users in arm 'old'; the log has arms baseline"):
        ab_report.main(Config(events=save(tmp_path / "named", control), plan=True, control="old"))


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError, MemoryError])
def test_an_interrupted_report_gives_back_what_its_engine_holds(tmp_path, monkeypatch, end):
    """Seen: after Ctrl-C the folders of Spark's tables stayed, with users and queries in them."""
    closed = []

    class Engine(DuckDbEngine):
        def table(self, *_, **__):
            raise end

        def close(self):
            closed.append(True)
            super().close()

    monkeypatch.setattr(Config, "open_engine", lambda self, scratch: Engine(self.open_database(scratch)))
    with pytest.raises(end):
        report(save(tmp_path, exposures(200)))
    assert closed == [True]


def test_a_disk_that_fills_while_figures_are_counted_is_one_line(tmp_path, monkeypatch):
    def full(pages, *_):
        pages.engine.rows("SELECT error('No space left on device')")

    monkeypatch.setattr(ab_report, "report_figures", full)
    with pytest.raises(DataError, match=r"DuckDB: .*No space left on device"):
        report(save(tmp_path, exposures(200)))


def test_a_report_in_a_bucket_fetches_nothing_of_it(tmp_path):
    """Seen: the bucket's other objects were copied first, since the report's folder was where to spill."""
    save(tmp_path, exposures(200))
    with bucket_server() as url:
        store, root = pafs.FileSystem.from_uri(url)
        with store.open_output_stream(f"{root}/other/object") as stream:
            stream.write(b"none of the report's")
        config = Config(events=tmp_path, out=Path(f"{url}/report.html"))
        with staged(config) as remotes:
            ab_report.main(config)
            assert [remote.known for remote in remotes] == [{}]
        found = store.get_file_info(pafs.FileSelector(root))
        assert {info.base_name for info in found} == {"other", "report.html", "report.json"}


def test_a_missing_folder_is_one_line_and_a_failure(tmp_path):
    command = [sys.executable, "clients/ab_report.py", "--events", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[4])
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        f"error: {tmp_path / 'none'}: no Parquet file there; run clients/ab_compact.py on the router's log first"
    ]


@needs_browser
def test_the_page_has_no_error_no_outside_resource_and_no_overflow(winning):
    folder, _ = winning
    with browser() as driver:
        for width in (1280, 400):
            set_width(driver, width)
            driver.get((folder / "report.html").as_uri())
            assert overflow(driver) == 0, width
            assert errors(driver) == []
            assert len(driver.find_elements("css selector", "svg")) == 4
        loaded = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert [name for name in loaded if not name.startswith("data:")] == []
