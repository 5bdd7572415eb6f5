"""Logged pages sent to a model that nobody has seen yet, with a server that answers and one page that it refuses."""

from __future__ import annotations

import datetime as dt
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clients.ab.forecast.replay_pages import EXIT_FAILED, Config, main, read_pages
from ranking.errors import DataError, InputError
from ranking.schema import TABLES, write_table
from tests.helpers.stub_ranker import StubRanker


def make_log(folder, pages: int, refused: int = 0, title: str = "night train", day: int = 5):
    rows = [
        {
            "request_id": f"r{number:03}" if day == 5 else f"{day}-{number}", "doc_id": f"d{place}", "user_id": "u",
            "timestamp": dt.datetime(2026, 1, day, 12, number % 60, tzinfo=dt.UTC),
            "query": "refuse me" if number < refused else "red film", "title": title, "summary": "",
            "position": place + 1, "clicked": False, "dwell_seconds": 0.0, "arm": "student",
        }
        for number in range(pages)
        for place in range(3)
    ]  # fmt: skip
    (folder / "events").mkdir(parents=True, exist_ok=True)
    path = folder / "events" / f"2026-01-0{day}.parquet"
    write_table(path, "events", pa.Table.from_pylist(rows, TABLES["events"].schema))
    return folder


def test_the_latest_pages_get_scores_that_a_forecast_reads(tmp_path, capsys):
    log = make_log(tmp_path / "log", 20)
    with StubRanker() as ranker:
        assert main(Config(data=log, model="next", out=tmp_path / "s.parquet", url=ranker.url, pages=15)) == 0
        assert ranker.asked["next"] == 15
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert {row["request_id"] for row in rows} == {f"r{number:03}" for number in range(5, 20)}
    assert [row["score"] for row in rows if row["request_id"] == "r007"] == [0.0, 1.0, 2.0]  # in the order shown
    report = json.loads((tmp_path / "s.report.json").read_text())
    assert report["pages"] == 15 and report["failed"] == 0 and report["p99_ms"] >= report["p50_ms"] > 0
    assert "15 pages, 0.0% failed" in capsys.readouterr().out


def test_days_are_read_from_the_last_one_back_until_there_are_enough_pages(tmp_path):
    """Seen: the text of all days in memory for the last 500 pages: 1.8 GB of 1 GB of text, out of memory with more."""
    log = make_log(make_log(tmp_path / "log", 20), 10, day=6)
    (log / "events/2026-01-04.parquet").write_bytes(b"never read")
    pages = [page[0] for page in read_pages(Config(data=log, model="next", out=tmp_path / "s.parquet", pages=15))]
    with pytest.raises(DataError, match=r"log: DuckDB: .*2026-01-04\.parquet"):
        list(read_pages(Config(data=log, model="next", out=tmp_path / "s.parquet", pages=99)))
    assert pages == [f"6-{number}" for number in range(9, -1, -1)] + [f"r{number:03}" for number in range(19, 14, -1)]


def test_a_model_that_fails_is_not_fit_to_serve(tmp_path, capsys):
    log = make_log(tmp_path / "log", 20, refused=4)
    with StubRanker() as ranker:
        config = Config(data=log, model="next", out=tmp_path / "s.parquet", url=ranker.url)
        assert main(config) == EXIT_FAILED
    assert "not fit to serve: 20.0% of the pages failed (4 error), 1.0% may" in capsys.readouterr().out
    assert len(pq.read_table(tmp_path / "s.parquet")) == 16 * 3


def test_a_log_without_text_is_named(tmp_path):
    with pytest.raises(InputError, match="no page with titles or summaries"):
        main(Config(data=make_log(tmp_path / "log", 3, title=""), model="next", out=tmp_path / "s.parquet"))
    with pytest.raises(InputError, match=r"no day there; run ab_compact.py first"):
        main(Config(data=tmp_path / "nowhere", model="next", out=tmp_path / "s.parquet"))
