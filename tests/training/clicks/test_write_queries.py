"""Written queries end to end: a small decoder learns to write from clicks, and what of it is kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ranking.bm25 import Bm25
from ranking.card import ScoreCard
from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.schema import read_table, write_table
from ranking.text import WRITER_FORMAT
from training import finetune_teacher, pretrain_teacher
from training.clicks.normalised_queries import normalise_query
from training.clicks.write_queries import Config, candidates_of, leads_back, write_queries
from training.sources.held_out import held_out_files, held_out_queries
from training.teacher.query_writer import QueryWriter
from training.world.dataset import WorldConfig, write_world


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    sizes = WorldConfig(
        documents=300, clicked_pairs=300, log_queries=250, train_queries=4, dev_queries=6, test_queries=6,
        unlabelled_queries=30, candidates=10,
    )  # fmt: skip
    write_world(sizes, folder)
    return folder


@pytest.fixture(scope="module")
def writer(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "writer"
    pretrain_teacher.main(
        pretrain_teacher.Config(
            data=data, out=out, direction="document-to-query", from_scratch="100K", vocabulary=400, held_out=0.1,
            epochs=2, precision="fp32", learning_rate=3e-3,
            limits=FieldLimits(max_query_tokens=12, max_title_tokens=16, max_summary_tokens=24),
        )
    )  # fmt: skip
    return out


def documents_of(data: Path) -> dict[str, tuple[str, str]]:
    rows = read_table(data / "candidates.parquet", "candidates").to_pylist()
    return {row["doc_id"]: (row["title"], row["summary"]) for row in rows}


def test_a_writer_says_so_and_is_no_start_for_a_teacher(writer, data, tmp_path):
    card = ScoreCard.load(writer)
    assert card.text_format == WRITER_FORMAT and card.role == "pretrained"
    assert card.metrics["perplexity"] < 0.7 * 400  # a uniform guess over the vocabulary
    settings = finetune_teacher.Config(data=data, model=str(writer), out=tmp_path / "teacher")
    with pytest.raises(InputError, match="writes queries"):
        finetune_teacher.main(settings)


def test_a_prompt_is_what_training_has_before_the_query(writer):
    text_format = QueryWriter(writer).text_format
    titles, summaries = ["A </s> shoe", "", "北京 café"], ["Query: \nin it", "light", "x" * 900]
    for query in ("red shoes", "a", "北京", "(x)"):
        pairs = text_format.encode([query] * 3, titles, summaries)
        for pair, prompt in zip(pairs, text_format.prompts(titles, summaries)):
            assert pair.ids[: pair.document_start] == prompt
            predicted = text_format.tokenizer.decode(pair.ids[pair.document_start : -1])
            assert (predicted.strip(), pair.ids[-1]) == (query, text_format.eos_id)


def test_a_likelihood_is_the_sum_over_the_tokens_of_the_query(writer):
    made = QueryWriter(writer)
    made.bf16 = False
    fields = ["red shoes", "a much longer query"], ["Light shoes", "Paella"], ["for runners", ""]
    found = made.likelihoods(*fields, 4096)
    for pair, value in zip(made.text_format.encode(*fields), found):
        with torch.no_grad():
            shares = made.decoder(torch.tensor([pair.ids])).logits[0].log_softmax(-1)
        places = range(pair.document_start, len(pair.ids))
        assert value == pytest.approx(sum(float(shares[i - 1, pair.ids[i]]) for i in places), rel=1e-4)


@pytest.mark.parametrize("round_trip", ["none", "writer"])
def test_written_queries_are_new_far_from_dev_and_test_and_the_same_for_a_seed(data, writer, tmp_path, round_trip):
    settings = {"data": data, "writer": writer, "queries": 12, "round_trip": round_trip, "first": 5, "candidates": 8}
    report = write_queries(Config(out=tmp_path / "written.parquet", **settings))
    rows = read_table(tmp_path / "written.parquet", "candidates")
    queries = list(dict.fromkeys(zip(rows.column("query_id").to_pylist(), rows.column("query").to_pylist())))
    assert len(queries) == len({query for _, query in queries}) == report["kept"] == 12
    assert len(rows) == report["pairs"] == 12 * 8
    known = set(map(normalise_query, read_table(data / "candidates.parquet", "candidates").column("query").to_pylist()))
    held_out = held_out_queries(held_out_files(data))
    assert not any(query in known or query in held_out for _, query in queries)
    clicked = set(read_table(data / "clicks.parquet", "clicks").column("doc_id").to_pylist())
    own = rows.column("doc_id").to_pylist()[::8]
    assert not clicked & set(own) and len(set(own)) == 12
    if round_trip == "writer":
        of_pairs = (rows.column(name).to_pylist() for name in ("query", "title", "summary"))
        for scores in QueryWriter(writer).likelihoods(*of_pairs, 4096).reshape(12, 8):
            assert (scores > scores[0]).sum() < 5
    write_queries(Config(out=tmp_path / "again.parquet", **settings))
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "written.parquet").read_bytes()
    write_queries(Config(out=tmp_path / "other.parquet", seed=2, **settings))
    assert (tmp_path / "other.parquet").read_bytes() != (tmp_path / "written.parquet").read_bytes()


def test_what_is_not_kept_is_counted_by_its_reason(data, writer, tmp_path, monkeypatch):
    """The draw alone is set by hand: queries that each fail at another check, then one that leads back."""
    documents = documents_of(data)
    judged = read_table(data / "judgments/test.parquet", "judgments").column("query")[0].as_py()
    known = read_table(data / "candidates.parquet", "candidates").column("query")[0].as_py()
    bad = ["  ", known.upper(), f" {judged}s", "mail to jane.doe@example.com", "zzz qqq"]
    monkeypatch.setattr(
        QueryWriter, "write",
        lambda self, titles, summaries, **_: [[*bad, f"{t} {s}"] for t, s in zip(titles, summaries)],
    )  # fmt: skip
    out = tmp_path / "written.parquet"
    report = write_queries(Config(data=data, writer=writer, out=out, queries=3, first=1))
    reasons = {"empty", "known", "near_dev_or_test", "personal_data", "not_led_back"}
    assert {report[reason] for reason in reasons} == {report["documents"]} and report["kept"] == 3
    assert report["drawn"] == 5 * report["documents"] + 3
    assert report == json.loads((tmp_path / "written.report.json").read_text())
    index = Bm25(list(documents.values()))
    rows = read_table(out, "candidates").to_pylist()
    for start in range(0, len(rows), 20):
        scores = next(index.scores([rows[start]["query"]]))
        assert list(documents)[int(scores.argmax())] == rows[start]["doc_id"]
        assert len({row["doc_id"] for row in rows[start : start + 20]}) == 20
    monkeypatch.setattr(QueryWriter, "write", lambda self, titles, summaries, **_: [bad for _ in titles])
    with pytest.raises(InputError, match="no query that it wrote can be kept"):
        write_queries(Config(data=data, writer=writer, out=tmp_path / "none.parquet"))
    assert not list(tmp_path.glob("*none*"))


def test_documents_with_clicks_alone_a_teacher_and_bad_settings_are_refused(data, writer, tmp_path):
    everything = pa.table({"doc_id": sorted(documents_of(data))})
    clicks = read_table(data / "clicks.parquet", "clicks").slice(0, 1).to_pylist()[0]
    rows = [clicks | {"doc_id": doc_id} for doc_id in everything.column("doc_id").to_pylist()]
    schema = read_table(data / "clicks.parquet", "clicks").schema
    write_table(tmp_path / "clicks.parquet", "clicks", pa.Table.from_pylist(rows, schema))
    settings = {"data": data, "writer": writer, "out": tmp_path / "out.parquet"}
    with pytest.raises(InputError, match="every document has a click"):
        write_queries(Config(clicks=tmp_path / "clicks.parquet", **settings))
    with pytest.raises(InputError, match=r"no ranker\.json"):
        write_queries(Config(**settings | {"writer": tmp_path}))
    for wrong in ({"queries": 0}, {"candidates": 1}, {"temperature": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Config(**settings | wrong)


def test_candidates_are_the_own_document_the_best_and_others():
    scores = np.array([0, 5, 3, 0, 0, 4, 0, 0], np.float32)
    found = candidates_of(3, scores, 5, np.random.default_rng(0))
    assert found[:3].tolist() == [3, 1, 5] and len(set(found.tolist())) == 5
    assert sorted(candidates_of(1, scores, 99, np.random.default_rng(0))) == list(range(8))
    assert leads_back(2, scores, 3) and not leads_back(2, scores, 2)
    assert not leads_back(0, np.zeros(4, np.float32), 10)  # nothing tells the documents apart
