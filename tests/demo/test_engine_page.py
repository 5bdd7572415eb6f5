"""The page with a search engine behind it, beside routers that rank nothing."""

from __future__ import annotations

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from demo.engine_page import Config, make_app
from ranking.schema import TABLES, write_table
from tests.helpers.broken_http import BROKEN_ANSWERS, answering


@pytest.mark.parametrize("name", BROKEN_ANSWERS)
def test_a_router_whose_answers_are_none_leaves_the_engines_order(tmp_path, name):
    """Seen: where something else answered in the router's place, the search failed."""
    names = TABLES["candidates"].schema.names
    rows = [("q", f"d{number}", "boots", f"boots {number}", "") for number in range(3)]
    columns = dict(zip(names, map(list, zip(*rows))))
    write_table(tmp_path / "candidates.parquet", "candidates", pa.table(columns))
    with (
        answering(BROKEN_ANSWERS[name]) as address,
        TestClient(make_app(Config(data=tmp_path, router=f"http://{address}"))) as browser,
    ):
        page = browser.get("/search", params={"q": "boots"})
    assert page.status_code == 200, page.text
    assert (page.json()["found"], page.json()["ranked"], len(page.json()["results"])) == (3, False, 3)
