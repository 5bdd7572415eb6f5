"""A ranker trained on what a click log shows, and what goes on from it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from ranking.card import ScoreCard, model_name
from ranking.errors import InputError
from ranking.schema import TABLES, read_table, write_table
from tests.training.student.test_students import TINY
from training.student.encoder import StudentModelSettings, create_student
from training.student.student_groups import judged_groups, with_different_targets
from training.train_baseline import Config as BaselineConfig
from training.train_baseline import train_baseline


@pytest.fixture(scope="module")
def shown(data, tmp_path_factory):
    """Users of a position-based model saw the candidates in their order and clicked those that share a word."""
    rng = np.random.default_rng(0)
    rows = read_table(data / "candidates.parquet", "candidates").to_pylist()
    seen: dict[tuple[str, str], dict] = {}
    places: dict[str, int] = {}
    for row in rows:
        place = places[row["query"]] = places.get(row["query"], 0) + 1
        relevance = 0.8 if {*row["query"].lower().split()} & {*row["title"].lower().split()} else 0.05
        pages = 30
        clicks = int(rng.binomial(pages, relevance / place))
        key = (row["query"], row["doc_id"])
        seen[key] = {k: row[k] for k in ("query", "doc_id", "title", "summary")} | {
            "clicks": clicks,
            "examinations": pages / place,
        }
    path = tmp_path_factory.mktemp("clicks") / "shown_documents.parquet"
    table = TABLES["shown_documents"].schema
    columns = {name: [row[name] for row in seen.values()] for name in table.names}
    write_table(path, "shown_documents", pa.table(columns, schema=table))
    return path


def test_clicks_teach_a_ranker_that_judgments_go_on_from(data, shown, tmp_path):
    card = train_baseline(
        BaselineConfig(
            learn_from="clicks", data=data, shown_documents=shown, out=tmp_path / "clicked", **(TINY | {"epochs": 4})
        )
    )
    assert (card.role, card.judged_queries, set(card.trained_on)) == ("baseline", 0, {"shown_documents", "dev"})
    settings = TINY | {"init": str(tmp_path / "clicked")}
    tuned = train_baseline(BaselineConfig(data=data, out=tmp_path / "tuned", **settings))
    assert tuned.judged_queries == 24 and tuned.base_model == model_name(tmp_path / "clicked")
    assert ScoreCard.load(tmp_path / "tuned").limits == card.limits


def test_queries_whose_documents_are_all_alike_are_left_out(data, tmp_path):
    text_format = create_student(
        StudentModelSettings(size="tiny-2", vocabulary_size=800), data, tmp_path, seed=1
    ).text_format
    groups = judged_groups(data / "judgments/dev.parquet", text_format)
    first = slice(groups.group_starts[0], groups.group_starts[1])
    groups.targets[first] = 1.0
    kept = with_different_targets(groups)
    assert kept.query_ids == groups.query_ids[1:]
    groups.targets[:] = 0.0
    with pytest.raises(InputError, match="nothing to learn an order from"):
        with_different_targets(groups)
