"""Rounds of labelling: what is asked, what is asked again, and what is reported."""

from __future__ import annotations

import importlib
import json

import pytest

from demo import label_rounds, stages
from demo.label_rounds import Config, flow, main
from demo.stages import one_run
from ranking.errors import InputError
from ranking.program import parse
from ranking.schema import read_table
from tests.helpers.stub_reranker import reranker
from tests.helpers.tiny_student import make_judged

TINY = "--size tiny-2 --vocabulary-size 300 --epochs 1 --match-steps 0 --calibrate platt --batch-groups 2"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """The rounds' commands as function calls: a start of Python and PyTorch for each would take most of the time."""
    commands: list[list[str]] = []

    def run_here(*command, accept=(0,)) -> None:
        words = [str(word) for word in command if word != "-m"]
        commands.append(words)
        program = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
        code = program.main(parse(program.Config, words[1:]))
        if (code or 0) not in accept:
            raise InputError(f"{words[0]} ended with {code}")

    for module in (label_rounds, stages):
        monkeypatch.setattr(module, "run_program", run_here)
    return commands


@pytest.fixture
def pool(tmp_path):
    """A dataset of 24 queries in the pool, none of which is judged."""
    make_judged(tmp_path / "pool", queries=24, documents=6, seed=3)
    make_judged(tmp_path / "data", queries=6, documents=6, seed=4)
    (tmp_path / "pool" / "candidates.parquet").rename(tmp_path / "data" / "candidates.parquet")
    return tmp_path / "data"


def test_each_round_pays_for_its_new_pairs_alone_and_a_second_run_for_none(tmp_path, pool, in_this_process):
    with reranker("tei") as service:
        label = f"clients/label_over_http.py --dialect tei --url {service.url} --store {tmp_path / 'store'}"
        given = {"data": pool, "out": tmp_path / "out", "label": label, "documents": 3, "student_flags": TINY}
        found = flow(Config(**given, budget=[12, 24]))
        assert [row["labels"] for row in found["rounds"]] == [12, 24]
        assert [row["strategy"] for row in found["rounds"]] == ["bands", "disagreement"]
        assert set(service.answered.values()) == {1} and len(service.answered) == 24
        assert all(0 < row["ndcg@5"][0] <= 1 for row in found["rounds"])
        second = next(words for words in in_this_process if "disagreement" in words)
        assert f"checkpoint:{tmp_path / 'out/round-1/student-1'}" in second and "bm25" in second

        asked, commands = service.requests, len(in_this_process)
        assert flow(Config(**given, budget=[12, 24])) == found
        assert (service.requests, len(in_this_process)) == (asked, commands)

        longer = flow(Config(**given, budget=[12, 24, 60, 72, 90]))
        # 24 queries of 3 documents each are all there is
        assert [row["labels"] for row in longer["rounds"]] == [12, 24, 60, 72]
        assert [row["asked_of_teacher"] for row in longer["rounds"]] == [12, 12, 36, 12]
        assert longer["stopped"] == "every query of the pool has been drawn"
        assert set(service.answered.values()) == {1} and len(service.answered) == 72
    assert json.loads((tmp_path / "out/rounds.json").read_text()) == longer
    rows = read_table(tmp_path / "out/round-4/candidates.parquet", "candidates")
    assert len(set(zip(rows["query_id"].to_pylist(), rows["doc_id"].to_pylist()))) == 72


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": [100, 100]}, "at least documents"),
        ({"budget": []}, "budget is"),
        ({"label": "clients/label_corpus.py --url localhost:8001"}, "--store is missing"),
        ({"label": ""}, "a labelling program is needed"),
        ({"ranker": []}, "two students, or one and a --ranker"),
    ],
)
def test_rounds_that_would_waste_labels_are_refused(tmp_path, changes, said):
    given = {"label": "clients/label_corpus.py --store s", "budget": [100, 200]} | changes
    with pytest.raises(ValueError, match=said):
        Config(data=tmp_path, out=tmp_path / "out", **given)


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    config = Config(data=tmp_path, out=tmp_path / "out", label="-m training.blend_labels", budget=[8])
    with one_run(config.out), pytest.raises(InputError, match="out: another run works in it"):
        main(config)
