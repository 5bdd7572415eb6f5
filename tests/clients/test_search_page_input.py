"""What the search page takes from a browser: hostile queries and judgments."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from clients.search_page import Config, make_app
from ranking.errors import InputError
from tests.helpers.graded_rankers import write_data


@pytest.fixture
def page(tmp_path):
    config = Config(data=write_data(tmp_path / "data"), url="127.0.0.1:1", judgments=tmp_path / "judged.csv")
    with TestClient(make_app(config), "http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client, config.judgments


def test_half_a_surrogate_pair_is_the_callers_fault(page):
    """Seen: a lone surrogate in a judged query or in the address was a 500."""
    client, judgments = page
    body = b'{"query": "a\\ud800", "left": "baseline", "better": "left"}'
    for field in (body, body.replace(b"a\\ud800", b"a").replace(b'"baseline"', b'"\\ud800"')):
        answer = client.post("/judge", content=field, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422) and answer.json()["detail"]
    assert client.get("/search?q=%ED%A0%80").status_code < 500 and not judgments.exists()
    assert client.post("/judge", content=b'{"\\ud800": 1}').status_code in (400, 422)


def test_a_page_of_somebody_else_in_the_same_browser_cannot_judge(page):
    """Seen: any web site could name its own address as ours and judge, or read what was searched, through a browser."""
    client, judgments = page
    body = '{"query": "a", "left": "baseline", "better": "left"}'
    for media in ("text/plain", "application/x-www-form-urlencoded", ""):  # what a browser sends to others unasked
        assert client.post("/judge", content=body, headers={"content-type": media}).status_code == 422
    for host in ("attacker.example", "127.0.0.1.attacker.example:8090"):
        headers = {"content-type": "application/json", "host": host}
        assert client.post("/judge", content=body, headers=headers).status_code == 400
        assert client.get("/search?q=a", headers={"host": host}).status_code == 400
    assert not judgments.exists()
    assert client.post("/judge", content=body, headers={"content-type": "application/json"}).status_code == 200


def test_a_query_longer_than_any_query_is_refused_unsearched(page):
    client, _ = page
    assert client.get("/search", params={"q": "a" * 2001}).status_code == 422


def test_a_judged_query_is_no_formula_in_a_spreadsheet(page):
    """Seen: a query that began with = was a formula to whoever opened the CSV."""
    client, judgments = page
    queries = ["=HYPERLINK(1)", " +1", "-2", "@x", "\tx", "a=b"]
    for query in queries:
        body = {"query": query, "left": "baseline", "better": "left"}
        assert client.post("/judge", json=body).status_code == 200
    with judgments.open(newline="") as stream:
        stored = [row["query"] for row in csv.DictReader(stream)]
    assert stored == [f"'{query}" for query in queries[:-1]] + ["a=b"]


def test_a_judgment_that_cannot_be_written_says_why(page):
    """Seen: a page without a reason, "Internal Server Error"."""
    client, judgments = page
    judgments.mkdir()
    answer = client.post("/judge", json={"query": "a", "left": "baseline", "better": "left"})
    assert answer.status_code == 500 and answer.json() == {"detail": "not saved: Is a directory"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"ca": Path("absent.pem")}, "no such file"), ({"url": "ftp://a:1"}, "scheme"), ({"deadline_ms": 0.0}, "above 0")],
)
def test_a_server_that_cannot_be_asked_is_told_before_anything_is_served(tmp_path, settings, said):
    """Seen: a traceback of the web server."""
    with pytest.raises(InputError, match=said):
        make_app(Config(data=write_data(tmp_path), **settings))


@pytest.mark.parametrize("settings", [{"candidates": 0}, {"port": 70_000}])
def test_a_number_that_makes_no_sense_is_refused(tmp_path, settings):
    """Seen: no query found anything; the page was said to be on port 70000."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(data=tmp_path, **settings)
