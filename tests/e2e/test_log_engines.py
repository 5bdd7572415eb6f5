"""Spark gives what DuckDB gives: click pairs, compacted logs and reports, on a cluster of two workers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clients import ab_report
from clients.ab.log.compaction import compact
from clients.ab.log.lines import DAY_MICROSECONDS, encode
from ranking import spark_engine
from ranking.click_models import ClickModel
from ranking.errors import DataError, InputError
from ranking.query_engine import QueryEngineSettings
from ranking.schema import TABLES, read_table, write_table
from tests.helpers.messy_log import good_events, write_messy_log, write_pool
from training import sample_candidates
from training.clicks import click_pairs
from training.clicks.click_pairs import ClickPairSettings, write_clicks
from training.clicks.privacy_gate import PrivacySettings
from training.world.click_log import event_tables, simulate_log
from training.world.dataset import WorldConfig, make_world

ENGINES = ("duckdb", "spark")
QUICK_START = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"  # no time for thorough compilation here, nor for its threads
NOON = 20_000 * DAY_MICROSECONDS + DAY_MICROSECONDS // 2


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[object]:
    """A Spark cluster of two workers and a session that the programs find, as they would under spark-submit."""
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java: apt-get install openjdk-17-jre-headless")
    sql = pytest.importorskip("pyspark.sql", reason="Spark is an extra: pip install 'disranker[spark]'")

    builder = sql.SparkSession.builder.master("local-cluster[2,1,512]").appName("tests")
    settings = {
        "spark.executor.memory": "512m", "spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1",
        "spark.ui.enabled": "false", "spark.sql.shuffle.partitions": "2", "spark.log.level": "ERROR",
        "spark.ui.showConsoleProgress": "false",
        # compiling a query and planning it anew after each stage take longer than these few rows
        "spark.sql.codegen.wholeStage": "false", "spark.sql.adaptive.enabled": "false",
        "spark.driver.extraJavaOptions": QUICK_START, "spark.executor.extraJavaOptions": QUICK_START,
    }  # fmt: skip
    for name, value in settings.items():
        builder = builder.config(name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")  # of master and workers
        found = builder.getOrCreate()
    yield found
    found.stop()


def clicks_of(engine: str, settings: ClickPairSettings, folder: Path, monkeypatch) -> tuple[dict, dict, list[pa.Table]]:
    """The report without its settings, the propensities unrounded, and both tables."""
    estimated = {}

    def keep(*arguments):
        found = estimate(*arguments)
        estimated.update(found.values)
        return found

    estimate = click_pairs.estimate_propensities
    with monkeypatch.context() as patch:
        patch.setattr(click_pairs, "estimate_propensities", keep)
        folder.mkdir()
        out, shown = folder / "clicks.parquet", folder / "shown.parquet"
        report = write_clicks(replace(settings, engine=engine, out=out, shown_documents=shown))
    report.pop("settings")
    return report, estimated, [read_table(out, "clicks"), read_table(shown, "shown_documents")]


def assert_same_clicks(settings: ClickPairSettings, folder: Path, monkeypatch) -> dict:
    by_duckdb, by_spark = (clicks_of(engine, settings, folder / engine, monkeypatch) for engine in ENGINES)
    assert by_spark[0] == by_duckdb[0]
    assert by_spark[1] == pytest.approx(by_duckdb[1], rel=1e-9)
    assert by_spark[2] == by_duckdb[2]
    # nothing that Spark wrote on the way stays
    assert {p.name for p in (folder / "spark").iterdir()} == {p.name for p in (folder / "duckdb").iterdir()}
    return by_spark[0]


def test_click_pairs_of_the_worlds_log_are_the_same(tmp_path, monkeypatch):
    small = {"documents": 500, "log_queries": 80, "train_queries": 1, "dev_queries": 1, "test_queries": 1}
    world = make_world(WorldConfig.small(**small, clicked_pairs=100))
    model, rng = ClickModel(), np.random.default_rng(5)
    candidates = np.array([world.corpus.candidates(query, 14, world.luck) for query in world.logged])
    grades = np.stack([world.grades(query, row) for query, row in zip(world.logged, candidates)])
    log = simulate_log(candidates, grades, model, rng, 150, 10, robot_share=0.02)
    path = tmp_path / "events.parquet"
    write_table(path, "events", event_tables(log, [q.text for q in world.logged], world.documents, rng, 0.05))
    settings = ClickPairSettings(events=str(path), out=path, estimation_events=8_000)
    report = assert_same_clicks(settings, tmp_path, monkeypatch)
    assert report["clicks"] > 50 and report["bot_users"] and report["position_bias"]["standard_errors_of_log"]


def test_click_pairs_of_a_messy_log_are_the_same_and_so_is_what_is_refused(tmp_path, monkeypatch):
    log, held_out = write_messy_log(tmp_path / "log"), tmp_path / "held out.parquet"
    pq.write_table(pa.table({"query": ["Crème  brulée", "crème brûlée"]}), held_out)
    settings = ClickPairSettings(
        events=log, out=held_out, exclude=[held_out], on_bad_row="reject", dwell_seconds=29.9, min_impressions=3,
        bot_min_impressions=20, bot_rate_quantile=0.9, privacy=PrivacySettings(min_users=4, window_days=3),
    )  # fmt: skip
    report = assert_same_clicks(settings, tmp_path, monkeypatch)
    assert report["events_rejected"] == 12 and report["bot_users"] and report["excluded_queries"]
    assert report["privacy"]["rare_queries"] or report["privacy"]["clicks_over_cap"]
    refused = [(tmp_path / engine / "clicks.rejects.tsv").read_text() for engine in ENGINES]
    assert refused[0] == refused[1] and refused[0].count("duplicate key") == 3
    told = []
    for engine in ENGINES:
        with pytest.raises(DataError) as caught:
            write_clicks(replace(settings, engine=engine, out=tmp_path / "c.parquet", on_bad_row="stop"))
        told.append(str(caught.value))
    assert told[0] == told[1] and "more bad rows" in told[0]


def test_a_sample_of_a_pool_is_the_same(tmp_path):
    pool, events, judged = write_pool(tmp_path / "pool"), tmp_path / "events.parquet", tmp_path / "judged [1].parquet"
    pq.write_table(pa.Table.from_pylist(good_events(), TABLES["events"].schema), events)
    pq.write_table(pa.table({"query": ["Oak  table"]}), judged)
    made = []
    for engine in ENGINES:
        out = tmp_path / engine / "sample.parquet"
        settings = sample_candidates.Config(
            pool=pool, events=str(events), exclude=[judged], queries=4, bands=["3:2", "rest:3"], on_bad_row="reject",
            engine=engine, out=out,
        )  # fmt: skip
        report = sample_candidates.sample_candidates(settings)
        made.append((report, read_table(out, "candidates"), sorted(path.name for path in out.parent.iterdir())))
    assert made[0] == made[1]
    assert made[0][0]["pairs"] == len(made[0][1]) == 20
    assert made[0][0]["pairs_rejected"] == 1 and made[0][0]["duplicates"] and made[0][0]["pool_queries"] == 5


BEGUN = 9  # the first page at or after 13:00


def router_records() -> list[dict]:
    """Two days of a router: two arms, interleaved, forced and repeated pages, orphans, growing dwells, bad records."""
    rng, records = np.random.default_rng(8), []
    for page in range(240):
        user, logged = page % 40, NOON + page * 400_000_000
        arm, documents = ("student", "baseline")[user % 2], [f"d{d}" for d in rng.permutation(6)[: 3 + page % 3]]
        teams = [("student", "baseline", "")[i % 3] for i in range(len(documents))] if page % 5 == 0 else []
        exposure = {
            "type": "exposure", "logged": logged, "request_id": f"r{page}", "user_id": f"u{user}",
            "experiment": "exp" if page >= BEGUN else "", "arm": arm if page >= BEGUN else "",
            "served_by": "interleaved" if teams else arm, "fallback": "timeout" if page % 17 == 0 else "",
            "model_version": "1", "latency_ms": float(rng.lognormal(2, 0.5)), "platform": ("ios", "web", "")[page % 3],
            "query": f"{'good ' * (page % 4)}thing {page % 11 % 4}", "query_length": 5, "segments": "{}",
            "forced": page % 31 == 0, "documents": documents, "scores": [float(s) for s in rng.random(len(documents))],
            "teams": teams, "title": [f"title of {d}" for d in documents], "config": "f1",
            "summary": [f"é {d}" for d in documents] if page % 7 else [],
        }  # fmt: skip
        records.append(exposure)
        if page % 13 == 0:  # asked again in the same microsecond, answered in another order
            records.append(exposure | {"documents": documents[::-1], "latency_ms": 1.5})
        if page % 6 == 0:
            shadow = {k: exposure[k] for k in ("logged", "request_id", "experiment", "arm", "latency_ms", "documents")}
            records += [shadow | {"type": "shadow", "model": "m", "failure": "", "scores": exposure["scores"]}] * 2
        for doc in rng.choice([*documents, "never shown"], 2):
            event = {"type": "event", "logged": logged + 9, "request_id": f"r{page}", "doc_id": str(doc)}
            kinds = [("click", 0.0)] * int(rng.integers(1, 3)) + [("dwell", float(t)) for t in (4.5, 61.25)[: page % 3]]
            records += [event | {"event": kind, "dwell_seconds": t, "timestamp": None} for kind, t in kinds]
    bad = [records[0] | {"request_id": "\u200b"}, records[0] | {"latency_ms": "soon"}]
    return [*records, *bad]


def test_compaction_and_what_is_made_of_it_are_the_same(tmp_path, monkeypatch):
    (tmp_path / "log").mkdir()
    lines = b"".join(map(encode, router_records()))
    (tmp_path / "log" / "2024-10-04T120000.000000-1-1.ablog").write_bytes(lines + b"0123 torn")
    summaries = [compact(tmp_path / "log", tmp_path / e, QueryEngineSettings(engine=e)) for e in ENGINES]
    assert summaries[0] == summaries[1]
    assert len(summaries[0].days) == 2 and summaries[0].rejected == 2 and summaries[0].exposures_repeated
    for table, rows in summaries[0].rows_written.items():
        pieces = [[read_table(p, table) for p in sorted((tmp_path / e / table).iterdir())] for e in ENGINES]
        assert pieces[0] == pieces[1] and sum(map(len, pieces[0])) == rows

    for table in ("", "events"):
        figures = []
        for engine in ENGINES:
            out, log = tmp_path / f"{engine}{table}.html", tmp_path / "duckdb" / table
            start = "2024-10-04T13:00:00"
            ab_report.main(ab_report.Config(events=log, out=out, engine=engine, start=start, alpha=0.1))
            figures.append(json.loads(out.with_suffix(".json").read_text()))
        by_duckdb, by_spark = (flat(found) for found in figures)
        numbers = {name for name, value in by_duckdb.items() if isinstance(value, int | float)}
        assert {k: v for k, v in by_spark.items() if k not in numbers} == {
            k: v for k, v in by_duckdb.items() if k not in numbers
        }
        numerically = {k: by_duckdb[k] for k in numbers}
        assert {k: by_spark[k] for k in numbers} == pytest.approx(numerically, rel=1e-9, abs=1e-12)
        assert table or figures[0]["interleaving"]["pages"] > 10
        assert figures[0]["metrics"][0]["cuped_variance"] is not None

    settings = ClickPairSettings(
        events=str(tmp_path / "duckdb" / "events"), out=tmp_path, debias=False, bot_volume_quantile=1.0,
        bot_rate_quantile=1.0, privacy=PrivacySettings(min_users=2),
    )  # fmt: skip
    (tmp_path / "clicks").mkdir()
    report = assert_same_clicks(settings, tmp_path / "clicks", monkeypatch)
    pages = report["pages"]
    assert pages["interleaved"] and pages["forced_left_out"] and pages["fallback"] and report["clicks"] > 10


def flat(value: object, name: str = "") -> dict[str, object]:
    """Nested figures as one mapping, so that numbers can be compared within a tolerance."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in parts for k, v in flat(part, f"{name}/{key}").items()}
    return {name: value}


def test_what_spark_lacks_is_one_line(tmp_path, monkeypatch):
    settings = QueryEngineSettings(engine="spark", spark_master="local[1]")
    with pytest.raises(InputError, match=r"a Spark session at local-cluster.* exists, local\[1\] was asked for"):
        settings.open_engine(tmp_path)
    monkeypatch.setattr(spark_engine, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pyspark.*disranker\[spark\]"):
        settings.open_engine(tmp_path)
    monkeypatch.undo()
    sql = sys.modules["pyspark.sql"]
    monkeypatch.setattr(sql.SparkSession, "getActiveSession", classmethod(lambda cls: None))
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"Java 17.*openjdk-17-jre-headless"):
        settings.open_engine(tmp_path)
    with pytest.raises(ValueError, match="spark_master"):
        QueryEngineSettings(spark_master="local")


def test_a_file_that_spark_passes_over_is_named(tmp_path):
    pq.write_table(pa.table({"query": ["a"]}), tmp_path / "_log.parquet")
    with pytest.raises(InputError, match=r"_log.parquet: Spark passes over"):
        QueryEngineSettings(engine="spark").open_engine(tmp_path).read_files("log", [tmp_path / "_log.parquet"])
