"""The click log to click pairs, on Parquet files written here and on a world log whose propensities are known."""

import datetime as dt
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ranking.click_models import ClickModel
from ranking.errors import DataError, InputError
from ranking.object_store import staged
from ranking.schema import TABLES, read_table, write_table
from tests.helpers.bucket_server import bucket_server
from training.clicks import click_pairs
from training.clicks.click_pairs import write_clicks
from training.clicks.normalised_queries import normalise_query
from training.clicks.privacy_gate import OPEN_GATE
from training.clicks.propensities import log_propensities
from training.world.click_log import event_tables, simulate_log
from training.world.dataset import WorldConfig, make_world

# nobody's privacy is at stake in logs that are made here; test_privacy_gate.py is about the gate
ClickPairSettings = partial(click_pairs.ClickPairSettings, privacy=OPEN_GATE)
NOON = dt.datetime(2026, 1, 5, 12, tzinfo=dt.UTC)
ALL_USERS = {"bot_rate_quantile": 1.0, "bot_volume_quantile": 1.0}


def event(request: int, doc: str, query="red tent", position=1, dwell=60.0, clicked=True, user="u1", **more) -> dict:
    row = {"request_id": f"r{request}", "doc_id": doc, "user_id": user, "timestamp": NOON + dt.timedelta(hours=request)}
    row |= {"query": query, "title": f"title of {doc}", "summary": f"summary of {doc}", "position": position}
    return row | {"clicked": clicked, "dwell_seconds": dwell if clicked else 0.0, "arm": "logged"} | more


def write_events(path, rows: list[dict]):
    pq.write_table(pa.Table.from_pylist(rows, TABLES["events"].schema), path)
    return path


def clicks_of(tmp_path, rows: list[dict], **settings) -> list[dict]:
    path = write_events(tmp_path / "events.parquet", rows)
    config = ClickPairSettings(
        events=str(path), out=tmp_path / "clicks.parquet", **{"debias": False, **ALL_USERS, **settings}
    )
    write_clicks(config)
    return read_table(tmp_path / "clicks.parquet", "clicks").to_pylist()


def weights(rows: list[dict]) -> dict[tuple[str, str], float]:
    return {(row["query"], row["doc_id"]): pytest.approx(row["weight"]) for row in rows}


@pytest.mark.parametrize("written", ["out", "shown_documents"])
def test_a_log_is_not_written_over(tmp_path, written):
    """Seen: `--out` was the log itself, which then was a table of clicks; exit 0."""
    path = write_events(tmp_path / "events.parquet", [])
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"events\.parquet: is what is to be read"):
        write_clicks(ClickPairSettings(**{"events": str(path), "out": tmp_path / "clicks.parquet", written: path}))
    assert path.read_bytes() == before


def test_spellings_of_a_query_are_one_query(tmp_path):
    spellings = ["Red  Tent", "red tent", " RED TENT ", "\uff32ed tent", "red\ttent"]
    rows = clicks_of(tmp_path, [event(i, "d1", query=query) for i, query in enumerate(spellings)])
    assert weights(rows) == {("red tent", "d1"): 5}


@pytest.mark.parametrize(
    ("raw", "clean"), [("Ｌａｐｔｏｐ", "laptop"), ("a\u00a0\n b", "a b"), ("Ⅷ", "viii"), ("\x00 \t", "")]
)
def test_queries_are_normalised_as_model_text_is_and_lowered(raw, clean):
    assert normalise_query(raw) == clean


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=30))
@example("\u01c1\u033e\u0130\u0355")
def test_a_normalised_query_is_normalised(text):
    clean = normalise_query(text)
    assert normalise_query(clean) == clean
    assert normalise_query(f"  {text} ") == clean
    assert clean == clean.strip() and "  " not in clean


def test_a_click_counts_from_the_dwell_threshold_on(tmp_path):
    rows = [event(1, "d1", dwell=29.9), event(2, "d2", dwell=30.0), event(3, "d3", clicked=False)]
    assert weights(clicks_of(tmp_path, rows)) == {("red tent", "d2"): 1}
    assert set(weights(clicks_of(tmp_path, rows, dwell_seconds=10))) == {("red tent", "d1"), ("red tent", "d2")}


def test_clicks_weigh_the_inverse_of_their_positions_propensity_up_to_the_cap(tmp_path):
    rows = [
        event(1, "d1", position=1),
        event(2, "d1", position=2),
        event(3, "d2", position=3),
        event(4, "d3", position=9),
    ]
    found = clicks_of(tmp_path, rows, debias=True, propensities=[1.0, 0.5, 0.04], max_weight=10)
    assert weights(found) == {("red tent", "d1"): 3, ("red tent", "d2"): 10, ("red tent", "d3"): 10}


def test_pairs_shown_too_rarely_are_dropped(tmp_path):
    rows = [event(1, "d1"), event(2, "d1", clicked=False), event(3, "d2"), event(4, "d2", query="tent", clicked=False)]
    assert weights(clicks_of(tmp_path, rows, min_impressions=2)) == {("red tent", "d1"): 1}


def test_a_document_has_the_text_it_last_satisfied_with(tmp_path):
    rows = [event(2, "d1", title="new"), event(1, "d1", title="old"), event(3, "d1", title="unseen", clicked=False)]
    assert [row["title"] for row in clicks_of(tmp_path, rows)] == ["new"]


def test_robots_are_dropped_by_click_rate_and_by_volume(tmp_path):
    people = [event(i, f"d{i % 7}", user=f"u{i % 50}", clicked=i // 50 % 5 == 0) for i in range(1000)]
    clicker = [event(2000 + i, f"d{i % 9}", user="clicker") for i in range(30)]
    reader = [event(3000 + i, f"d{i % 9}", user="reader", clicked=i % 10 == 0) for i in range(400)]
    limits = {"bot_min_impressions": 20, "bot_rate_quantile": 0.99, "bot_volume_quantile": 0.99}
    path = write_events(tmp_path / "events.parquet", people + clicker + reader)
    report = write_clicks(ClickPairSettings(events=str(path), out=tmp_path / "c.parquet", debias=False, **limits))
    assert (report["users"], report["bot_users"], report["bot_events"]) == (52, 2, 430)
    total = sum(row["weight"] for row in read_table(tmp_path / "c.parquet", "clicks").to_pylist())
    assert total == sum(row["clicked"] for row in people)


def test_users_with_few_impressions_are_no_robots_however_much_they_click(tmp_path):
    rows = [event(i, f"d{i}", user=f"u{i % 40}", clicked=i % 40 == 0 or i % 3 == 0) for i in range(400)]
    report_rows = clicks_of(tmp_path, rows, bot_rate_quantile=0.5, bot_min_impressions=100)
    assert sum(row["weight"] for row in report_rows) == sum(row["clicked"] for row in rows)


@pytest.fixture(scope="module")
def pbm_log(tmp_path_factory):
    """A log of 60,000 pages by people of a PBM, at most three pages a query so that pairs are sparse."""
    world = make_world(
        WorldConfig.small(documents=2_000, log_queries=6_000, train_queries=1, dev_queries=1, test_queries=1)
    )
    model, rng = ClickModel(), np.random.default_rng(5)
    candidates = np.array([world.corpus.candidates(query, 14, world.luck) for query in world.logged])
    grades = np.stack([world.grades(query, row) for query, row in zip(world.logged, candidates)])
    log = simulate_log(candidates, grades, model, rng, 14_000, 10, robot_share=0.01)
    path = tmp_path_factory.mktemp("log") / "events.parquet"
    write_table(path, "events", event_tables(log, [q.text for q in world.logged], world.documents, rng, 0.05))
    return path, model, log


def test_the_log_gives_back_the_propensities_it_was_made_with(pbm_log, tmp_path):
    path, model, log = pbm_log
    report = write_clicks(ClickPairSettings(events=str(path), out=tmp_path / "clicks.parquet"))
    found = np.array(list(report["position_bias"]["propensities"].values()))
    errors = np.array(list(report["position_bias"]["standard_errors_of_log"].values()))
    true = model.propensities(10)
    np.testing.assert_allclose(found, true, rtol=0.08)
    assert np.all(np.abs(np.log(found / true)) <= 4 * errors + 1e-9)
    # what the naive click rate by position would say is far off: the ranker puts good documents on top
    naive = log.clicked[~log.robot].mean(0)
    assert np.abs(np.log(naive / naive[0] / true)[1:]).max() > 0.3


def test_robots_of_the_log_are_dropped_and_their_clicks_with_them(pbm_log, tmp_path):
    path, _, log = pbm_log
    report = write_clicks(ClickPairSettings(events=str(path), out=tmp_path / "clicks.parquet"))
    assert report["bot_events"] >= log.robot.sum() * 10
    assert report["bot_users"] < 0.01 * report["users"]


def test_a_sample_of_pairs_estimates_the_same_within_its_error(pbm_log, tmp_path):
    path, model, _ = pbm_log
    report = write_clicks(
        ClickPairSettings(events=str(path), out=tmp_path / "clicks.parquet", estimation_events=150_000)
    )
    found = np.array(list(report["position_bias"]["propensities"].values()))
    np.testing.assert_allclose(found, model.propensities(10), rtol=0.2)


def test_little_memory_and_one_thread_give_the_same_file(pbm_log, tmp_path):
    path, _, _ = pbm_log
    for name, memory, threads in (("a", 2.0, 2), ("b", 0.15, 1)):
        write_clicks(
            ClickPairSettings(
                events=str(path), out=tmp_path / f"{name}.parquet", duckdb_memory_gb=memory, duckdb_threads=threads
            )
        )
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.parquet",
        "a.report.json",
        "b.parquet",
        "b.report.json",
    ]  # nothing spilled stays behind


def test_least_squares_recovers_exact_ratios_through_any_chain_of_position_pairs():
    true = np.array([1.0, 0.5, 0.2])
    sums = np.zeros((4, 3, 3))
    for k, other, pairs in ((0, 1, 90.0), (1, 2, 40.0)):  # positions 1 and 3 share no pair
        sums[:, k, other] = pairs * true[k], pairs * true[other], 1.0, 2.0
    np.testing.assert_allclose(np.exp(log_propensities(sums)), true)


def test_least_squares_believes_the_pair_of_positions_with_more_clicks():
    sums = np.zeros((4, 3, 3))
    for k, other, ratio, variance in ((0, 1, 2.0, 1.0), (1, 2, 2.0, 1.0), (0, 2, 9.0, 1e6)):
        sums[:, k, other] = 10 * ratio, 10, variance, variance
    np.testing.assert_allclose(np.exp(log_propensities(sums)), [1, 0.5, 0.25], rtol=1e-3)


def position_bias(tmp_path, rows: list[dict], **settings) -> dict:
    path = write_events(tmp_path / "events.parquet", rows)
    out = tmp_path / "clicks.parquet"
    return write_clicks(ClickPairSettings(events=str(path), out=out, **ALL_USERS, **settings))["position_bias"]


def test_a_log_in_which_every_document_keeps_its_place_cannot_be_corrected(tmp_path):
    rows = [event(i, f"d{i % 3}", position=1 + i % 3, user=f"u{i}", clicked=i > 5) for i in range(30)]
    with pytest.raises(InputError, match=r"both at position 1 and at another one.*--propensities"):
        position_bias(tmp_path, rows)


def half_as_likely_at_each_place() -> list[dict]:
    """Documents shown at two neighbours of positions 1 to 3; a position is clicked half as often as the one above."""
    rows = []
    for first in (1, 2):
        for n in range(240):
            for position in (first, first + 1):
                request = 100_000 * first + 10 * n + position
                clicked = n % (2 ** (position - 1)) == 0
                rows.append(event(request, f"d{first}", position=position, clicked=clicked, user=f"u{n}"))
    return rows


def test_positions_that_nobody_clicked_are_no_examinations(tmp_path):
    rows = half_as_likely_at_each_place()
    rows += [event(900_000 + i, "d1", position=4 + i, clicked=False, user=f"u{i}") for i in range(17)]
    found = position_bias(tmp_path, rows, shown_documents=tmp_path / "shown.parquet")
    assert found["positions_unseen"] == list(range(4, 21)) and not found["positions_extrapolated"]
    assert [found["propensities"][p] for p in ("1", "2", "3", "20")] == pytest.approx([1, 0.5, 0.25, 0], abs=1e-3)
    shown = {row["doc_id"]: row for row in read_table(tmp_path / "shown.parquet", "shown_documents").to_pylist()}
    assert shown["d1"]["examinations"] == pytest.approx(240 * 1 + 240 * 0.5, rel=1e-3)


def test_clicked_positions_without_a_shared_pair_are_extrapolated_or_cut(tmp_path):
    rows = half_as_likely_at_each_place()
    rows += [event(900_000 + i, "deep", position=6, user=f"u{i}") for i in range(10)]
    found = position_bias(tmp_path, rows)
    assert found["positions_extrapolated"] == [6]
    eta = -np.polyfit(np.log([1, 2, 3]), np.log([1, 0.5, 0.25]), 1)[0]
    assert found["propensities"]["6"] == pytest.approx(0.25 * (3 / 6) ** eta, rel=1e-2)
    found = position_bias(tmp_path, rows, unlinked="cut")
    assert found["positions_cut"] == [6] and found["propensities"]["6"] == 0
    pairs = weights(read_table(tmp_path / "clicks.parquet", "clicks").to_pylist())
    assert set(pairs) == {("red tent", "d1"), ("red tent", "d2")}


def test_each_query_keeps_the_snippet_that_was_made_for_it(tmp_path):
    rows = [
        event(1, "d1", summary="for red tents"),
        event(2, "d1", query="tent for two", summary="for two"),
        event(3, "d2", title="", summary=" "),
    ]
    found = {row["query"]: row["summary"] for row in clicks_of(tmp_path, rows)}
    assert found == {"red tent": "for red tents", "tent for two": "for two"}


def test_a_folder_and_a_glob_read_all_their_files(tmp_path):
    folder = tmp_path / "log" / "day=1"
    folder.mkdir(parents=True)
    write_events(folder / "a.parquet", [event(1, "d1")])
    write_events(tmp_path / "log" / "b.parquet", [event(2, "d1"), event(3, "d2", query="tent")])
    expected = {("red tent", "d1"): 2, ("tent", "d2"): 1}
    for events in (tmp_path / "log", tmp_path / "log" / "**" / "*.parquet"):
        write_clicks(ClickPairSettings(events=str(events), out=tmp_path / "clicks.parquet", debias=False, **ALL_USERS))
        assert weights(read_table(tmp_path / "clicks.parquet", "clicks").to_pylist()) == expected


GOOD = [event(i, f"d{i}") for i in range(5)]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"query": " \t"}, "query is blank"),
        ({"user_id": ""}, "user_id is blank"),
        ({"query": None}, "query is null"),
        ({"summary": None}, "summary is null"),
        ({"position": 0}, "position is outside"),
        ({"dwell_seconds": float("nan")}, "dwell_seconds is NaN or infinite"),
        ({"dwell_seconds": -1.0}, "dwell_seconds is outside 0 to inf"),
        ({"title": "x" * (1 << 20) + "x"}, "title is longer"),
        ({"request_id": "r1", "doc_id": "d1"}, "duplicate key"),
    ],
)
def test_a_bad_event_is_named_with_file_and_row_or_goes_to_the_rejects(tmp_path, bad, reason):
    rows = [*GOOD, event(7, "d7") | bad]
    schema = pa.schema([field.with_nullable(True) for field in TABLES["events"].schema])
    path = tmp_path / "events.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    settings = {"events": str(path), "out": tmp_path / "clicks.parquet", "debias": False, **ALL_USERS}
    with pytest.raises(DataError, match=reason) as caught:
        write_clicks(ClickPairSettings(**settings))
    assert (caught.value.path, caught.value.row) == (str(path), 6)
    assert not (tmp_path / "clicks.parquet").exists()

    report = write_clicks(ClickPairSettings(**settings, on_bad_row="reject"))
    assert (report["events_read"], report["events_rejected"], report["clicks"]) == (6, 1, 5)
    assert reason in (tmp_path / "clicks.rejects.tsv").read_text()


@pytest.mark.parametrize("settings", [{"debias": True}, {"shown_documents": Path("shown.parquet")}])
def test_a_log_of_clicks_alone_is_refused_where_what_was_passed_over_is_needed(tmp_path, settings):
    settings = settings | {"shown_documents": tmp_path / "shown.parquet"} if "shown_documents" in settings else settings
    with pytest.raises(DataError, match="every row is a click: without the documents that were shown and not clicked"):
        clicks_of(tmp_path, GOOD, **settings)
    assert not (tmp_path / "clicks.parquet").exists() and not (tmp_path / "shown.parquet").exists()
    # one page that says what else it showed is a log; clicks as they are need nothing else
    assert len(clicks_of(tmp_path, [*GOOD, event(1, "d7", position=2, clicked=False)], **settings)) == len(GOOD)
    assert len(clicks_of(tmp_path, GOOD)) == len(GOOD) == len(clicks_of(tmp_path, GOOD, propensities=[1.0]))


def export(path: Path, rows: list[dict], **columns) -> Path:
    """A log with some columns as an export has them: of another type, or with nulls."""
    table = pa.Table.from_pylist(rows, pa.schema([f.with_nullable(True) for f in TABLES["events"].schema]))
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    pq.write_table(table, path)
    return path


def test_a_row_that_nobody_clicked_may_have_no_dwell(tmp_path):
    rows = [event(1, "d1"), event(1, "d2", position=2, clicked=False), event(2, "d1", position=2)]
    settings = {"out": tmp_path / "clicks.parquet", "debias": False, **ALL_USERS}
    for clicked in ([True, False, True], [1, 0, 1]):
        path = export(tmp_path / "log.parquet", rows, dwell_seconds=[60.0, None, 45.0], clicked=clicked)
        report = write_clicks(ClickPairSettings(events=str(path), **settings))
        assert (report["events_read"], report["events_rejected"], report["events_kept"]) == (3, 0, 3)
    path = export(tmp_path / "log.parquet", rows, dwell_seconds=[60.0, None, None])
    with pytest.raises(DataError, match="row 3: dwell_seconds is null"):
        write_clicks(ClickPairSettings(events=str(path), **settings))


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"clicked": ["true", "false"]}, "column clicked is string, bool is needed"),
        ({"clicked": ["Yes", "no"]}, "column clicked is string, bool is needed"),
        ({"clicked": [1.0, 0.0]}, "column clicked is double, bool is needed"),
        ({"timestamp": [1_767_614_400_000] * 2}, r"column timestamp is int64, .* converts milliseconds since 1970"),
        ({"timestamp": ["2026-01-05T12:00:00"] * 2}, r"column timestamp is string, timestamp\[us, tz=UTC\] is needed"),
        ({"position": [0, 1]}, "row 1: position is outside .* the first position is 1"),
    ],
)
def test_a_column_of_another_kind_is_refused_with_the_command_that_converts_it(tmp_path, columns, problem):
    rows = [event(1, "d1", timestamp=NOON), event(1, "d2", timestamp=NOON, position=2, clicked=False)]
    path = export(tmp_path / "log.parquet", rows, **columns)
    settings = {"out": tmp_path / "clicks.parquet", "debias": False, **ALL_USERS}
    with pytest.raises(DataError, match=problem) as refused:
        write_clicks(ClickPairSettings(events=str(path), **settings))
    command = "python -c" + str(refused.value).partition("python -c")[2]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True, cwd=tmp_path)
    write_clicks(ClickPairSettings(events=str(tmp_path / "converted.parquet"), **settings))
    converted = pq.read_table(tmp_path / "converted.parquet").to_pylist()
    assert [(row["position"], row["clicked"]) for row in converted] == [(1, True), (2, False)]
    assert {row["timestamp"].replace(tzinfo=dt.UTC) for row in converted} == {NOON}


def test_positions_are_whole_numbers_whatever_their_type(tmp_path):
    rows = half_as_likely_at_each_place()
    settings = {"out": tmp_path / "clicks.parquet", **ALL_USERS}
    path = export(tmp_path / "log.parquet", rows, position=[float(row["position"]) for row in rows])
    report = write_clicks(ClickPairSettings(events=str(path), **settings))
    assert list(report["position_bias"]["propensities"]) == ["1", "2", "3"]
    path = export(tmp_path / "log.parquet", rows, position=[1.5, *(float(row["position"]) for row in rows[1:])])
    with pytest.raises(DataError, match="row 1: position is no whole number"):
        write_clicks(ClickPairSettings(events=str(path), **settings))
    assert write_clicks(ClickPairSettings(events=str(path), **settings, on_bad_row="reject"))["events_rejected"] == 1


def test_unreadable_files_are_named(tmp_path):
    good = write_events(tmp_path / "good.parquet", GOOD)
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(good.read_bytes()[:-20])
    short = tmp_path / "short.parquet"
    pq.write_table(pq.read_table(good).drop_columns(["position"]), short)
    typed = tmp_path / "typed.parquet"
    table = pq.read_table(good)
    pq.write_table(table.set_column(0, "request_id", pa.array([0.5] * len(table))), typed)
    for path, reason in (
        (torn, "cannot be read as Parquet"),
        (short, "no column position; there are .*; map them with --columns"),
        (typed, "request_id"),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            write_clicks(ClickPairSettings(events=str(path), out=tmp_path / "clicks.parquet"))
        assert caught.value.path == str(path)
    with pytest.raises(InputError, match="no Parquet file"):
        write_clicks(ClickPairSettings(events=str(tmp_path / "none*.parquet"), out=tmp_path / "clicks.parquet"))


def test_invalid_utf8_is_refused(tmp_path):
    table = pa.Table.from_pylist(GOOD, TABLES["events"].schema)
    broken = pa.Array.from_buffers(
        pa.string(), 5, [None, pa.py_buffer(np.arange(0, 12, 2, dtype=np.int32)), pa.py_buffer(b"\xff\xfe" * 5)]
    )
    path = tmp_path / "events.parquet"
    pq.write_table(table.set_column(4, "query", broken), path)
    with pytest.raises(DataError, match=r"(?i)utf|encoding"):
        write_clicks(ClickPairSettings(events=str(path), out=tmp_path / "clicks.parquet", **ALL_USERS))


def test_a_log_without_a_satisfied_click_leaves_no_file(tmp_path):
    with pytest.raises(DataError, match="no satisfied click"):
        clicks_of(tmp_path, [event(1, "d1", dwell=1.0)])
    assert not (tmp_path / "clicks.parquet").exists()


def test_a_log_without_a_satisfied_click_leaves_what_an_earlier_run_wrote(tmp_path):
    """Seen: the clicks were gone, and the report of the run that had written them still stood there."""
    clicks_of(tmp_path, [event(1, "d1")])
    written = [tmp_path / "clicks.parquet", tmp_path / "clicks.report.json"]
    before = [path.read_bytes() for path in written]
    for rows, said in (
        ([event(1, "d1", dwell=1.0)], "no satisfied click"),
        ([event(1, "d1", title="", summary="")], "kept without text"),
    ):
        shown = [*rows, event(2, "d2", clicked=False)]
        with pytest.raises(DataError, match=said):
            clicks_of(tmp_path, shown, shown_documents=tmp_path / "shown.parquet")
        assert [path.read_bytes() for path in written] == before and not (tmp_path / "shown.parquet").exists()


def test_positions_that_nobody_clicks_cost_no_memory(tmp_path):
    """Seen: in a list of 10,000 documents, tables of every two positions wanted 75 GB."""
    rows = [
        event(page, f"d{(place + page) % 3}", position=place + 1, clicked=(place * page) % 3 != 1)
        for page in range(30)
        for place in range(3)
    ]
    rows += [event(page, f"deep{page}", position=9_990 - page, clicked=False) for page in range(30, 9_000)]
    path = write_events(tmp_path / "events.parquet", rows)
    report = write_clicks(ClickPairSettings(events=str(path), out=tmp_path / "clicks.parquet", **ALL_USERS))
    bias = report["position_bias"]
    assert set(bias["standard_errors_of_log"]) == {"1", "2", "3"}
    assert len(bias["positions_unseen"]) == 8_970 and len(bias["propensities"]) == 8_973


def test_a_column_that_stands_in_a_log_twice_is_told(tmp_path):
    table = pq.read_table(write_events(tmp_path / "events.parquet", [event(1, "d1")]))
    pq.write_table(table.append_column("query", table["title"]), tmp_path / "events.parquet")
    with pytest.raises(DataError, match="column query occurs twice"):
        write_clicks(ClickPairSettings(events=str(tmp_path / "events.parquet"), out=tmp_path / "clicks.parquet"))


def test_what_failed_jobs_leave_in_a_folder_is_no_part_of_the_log(tmp_path):
    log = tmp_path / "log"
    for folder in ("day=1", "_temporary/0/task", ".ipynb_checkpoints"):
        (log / folder).mkdir(parents=True)
        write_events(log / folder / "part-0.parquet", [event(1, "d1"), event(2, "d1")])
    write_clicks(ClickPairSettings(events=str(log), out=tmp_path / "clicks.parquet", debias=False, **ALL_USERS))
    assert weights(read_table(tmp_path / "clicks.parquet", "clicks").to_pylist()) == {("red tent", "d1"): 2}


def test_the_command_line_writes_clicks_and_ends_in_one_line_on_bad_input(tmp_path):
    path = write_events(tmp_path / "events.parquet", GOOD)
    command = [
        sys.executable,
        "-m",
        "training.prepare_clicks",
        "--out",
        str(tmp_path / "clicks.parquet"),
        "--no-debias",
        "--privacy.min-users",
        "1",
        "--privacy.max-user-clicks=0",
    ]
    done = subprocess.run([*command, "--events", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["clicks"] == 5
    failed = subprocess.run([*command, "--events", str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in failed.stderr


@pytest.mark.parametrize("events", ["log", "log/2026-*.parquet"])
def test_a_log_in_a_bucket_gives_the_same_clicks_and_the_report_beside_them(tmp_path, events):
    local = clicks_of(tmp_path, GOOD)
    settings = {"debias": False, "exclude_held_out": False, **ALL_USERS}
    with bucket_server() as bucket:
        store, root = pafs.FileSystem.from_uri(bucket)
        with store.open_output_stream(f"{root}/log/2026-01.parquet") as stream:
            stream.write((tmp_path / "events.parquet").read_bytes())
        config = ClickPairSettings(events=f"{bucket}/{events}", out=Path(f"{bucket}/made/clicks.parquet"), **settings)
        with staged(config):
            write_clicks(config)
        with store.open_input_file(f"{root}/made/clicks.parquet") as stream:
            assert pq.read_table(stream).to_pylist() == local
        names = sorted(Path(each.path).name for each in store.get_file_info(pafs.FileSelector(f"{root}/made")))
        assert names == ["clicks.parquet", "clicks.report.json"]


def test_held_out_queries_beside_an_output_in_a_store_are_not_passed_over_in_silence():
    with pytest.raises(ValueError, match="no-exclude-held-out"):
        ClickPairSettings(events="events.parquet", out=Path("s3://bucket/data/clicks.parquet"))
    with pytest.raises(ValueError, match="--exposures"):
        ClickPairSettings(events="s3://bucket/ab/events", out=Path("clicks.parquet"))
