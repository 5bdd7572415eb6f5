"""Impressions of a log: what was shown, how often it was likely seen, and what a ranker is taught from it."""

import numpy as np
import pyarrow as pa
import pytest

from ranking.errors import InputError
from ranking.schema import TABLES, read_table
from tests.training.clicks.test_prepare_clicks import ALL_USERS, ClickPairSettings, event, write_events
from training.clicks.click_pairs import write_clicks
from training.student.clicked_groups import click_rates


def shown(tmp_path, rows, **settings) -> dict[tuple[str, str], tuple[float, float]]:
    events = write_events(tmp_path / "events.parquet", rows)
    out = tmp_path / "shown_documents.parquet"
    write_clicks(
        ClickPairSettings(
            events=str(events), out=tmp_path / "clicks.parquet", shown_documents=out, **(ALL_USERS | settings)
        )
    )
    found = read_table(out, "shown_documents").to_pylist()
    return {(row["query"], row["doc_id"]): (row["clicks"], pytest.approx(row["examinations"])) for row in found}


def test_skipped_documents_of_clicked_queries_are_kept_with_their_expected_examinations(tmp_path):
    rows = [
        event(1, "d1"),
        event(1, "d2", position=2, clicked=False),
        event(2, "d1", clicked=False, query="Red  Tent"),
        event(2, "d3", position=3, dwell=3.0),
        event(3, "d4", query="nobody clicked", clicked=False),
    ]
    assert shown(tmp_path, rows, propensities=[1.0, 0.5, 0.2]) == {
        ("red tent", "d1"): (1, 2.0),
        ("red tent", "d2"): (0, 0.5),
        ("red tent", "d3"): (0, 0.2),  # left after three seconds: not satisfied
    }


def test_without_debiasing_every_impression_is_an_examination(tmp_path):
    rows = [event(1, "d1"), event(1, "d2", position=9, clicked=False), event(2, "d2", position=8, clicked=False)]
    assert shown(tmp_path, rows, debias=False) == {("red tent", "d1"): (1, 1), ("red tent", "d2"): (0, 2)}


def table(clicks: list[float], examinations: list[float]) -> pa.Table:
    names = [str(i) for i in range(len(clicks))]
    columns = [["q"] * len(clicks), names, names, names, clicks, examinations]
    return pa.table(columns, schema=TABLES["shown_documents"].schema)


def test_a_document_nobody_can_have_seen_stands_between_the_clicked_and_the_skipped():
    clicked, skipped, unseen = click_rates(table([5, 0, 0], [10, 10, 0]), 1.0)
    assert clicked > unseen > skipped
    assert unseen == pytest.approx(5 / 20)


def test_click_rates_are_free_of_position_bias():
    rng = np.random.default_rng(0)
    relevance, propensity = np.array([0.6, 0.3, 0.6, 0.3]), np.array([1.0, 1.0, 0.1, 0.1])
    clicks = rng.binomial(20_000, relevance * propensity)
    rates = click_rates(table(clicks.tolist(), (20_000 * propensity).tolist()), 1.0)
    assert rates == pytest.approx(relevance, rel=0.05)


def test_a_log_without_a_click_teaches_nothing():
    with pytest.raises(InputError, match="no shown document was clicked"):
        click_rates(table([0, 0], [1, 1]), 1.0)
