"""What the search page takes from a browser: hostile queries and judgments."""

from __future__ import annotations

import csv

import pytest
from fastapi.testclient import TestClient

from clients.search_page import Config, make_app
from tests.helpers.graded_rankers import write_data


@pytest.fixture
def page(tmp_path):
    config = Config(data=write_data(tmp_path / "data"), url="127.0.0.1:1", judgments=tmp_path / "judged.csv")
    with TestClient(make_app(config), raise_server_exceptions=False) as client:
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
