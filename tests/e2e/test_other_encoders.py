"""Students that are no BERT: XLM-R, ModernBERT and DeBERTa of random weights, trained, gated and served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer, DistilBertConfig

from build.build_student import Config, main
from build.export_onnx import load_encoder
from build.triton_config import ServingLimits
from clients.triton.reranker import Reranker
from ranking.card import ScoreCard
from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.text import PAIR_FORMAT, StudentFormat
from serving.temporary_server import start_triton
from tests.helpers.foreign_encoders import make_encoder
from tests.helpers.tiny_student import make_judged
from training.evaluation.checkpoint_scores import score_pairs
from training.student.encoder import StudentModelSettings, create_student
from training.train_baseline import Config as TrainConfig
from training.train_baseline import train_baseline

FAMILIES = ("xlm-roberta", "modernbert", "deberta-v2")
LIMITS = FieldLimits(max_query_tokens=64, max_title_tokens=100, max_summary_tokens=200)
# what a student of another script or spelling reads: Chinese, Arabic, Thai, German
QUERIES = ["night train", "夜行列车", "قطار الليل", "รถไฟกลางคืน", "Nachtzüge"]
TITLES = ["The night train", "夜行列车上的医生", "قطار الليل", "รถไฟ", "Größe 44: Züge"]
SUMMARIES = ["a doctor, a robot", "雨中的故事", "", "คนกลางคืน", "Straße im Winter"]


@dataclass
class Arms:
    url: str
    checkpoints: dict[str, Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """A student of each family, trained for one epoch, as `train_baseline --init` makes it."""
    folder = tmp_path_factory.mktemp("encoders")
    data = make_judged(folder / "data", queries=16, documents=6)
    (data / "judgments" / "train.parquet").write_bytes((data / "judgments" / "dev.parquet").read_bytes())
    (data / "dataset.json").write_text('{"source": "world:test"}')
    for family in FAMILIES:
        start = make_encoder(folder / f"{family}-start", family)
        train_baseline(
            TrainConfig(
                data=data, out=folder / family, init=str(start), limits=LIMITS, epochs=1, learning_rate=1e-4,
                precision="fp32", loss="point",
            )
        )  # fmt: skip
    return {"data": data} | {family: folder / family for family in FAMILIES}


@pytest.fixture(scope="module")
def arms(trained, tmp_path_factory) -> Iterator[Arms]:
    repository = tmp_path_factory.mktemp("served") / "repository"
    names = {family: family.replace("-", "_") for family in FAMILIES}
    for family, name in names.items():
        main(
            Config(
                trained[family], name, "openvino", trained["data"], repository=repository, precision="fp32",
                serves_now="none", accept_worse="random weights", serving=ServingLimits(threads=1),
            )
        )  # fmt: skip
    with start_triton(repository) as server:
        yield Arms(server.grpc, {name: trained[family] for family, name in names.items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ids_are_those_of_the_families_own_tokenizer(trained, family):
    text, tokenizer = StudentFormat.of_checkpoint(trained[family]), AutoTokenizer.from_pretrained(trained[family])
    assert ScoreCard.load(trained[family]).text_format == PAIR_FORMAT and not text.token_types
    pairs = text.encode(QUERIES, TITLES, SUMMARIES)
    for pair, query, title, summary in zip(pairs, QUERIES, TITLES, SUMMARIES):
        assert pair.ids == tokenizer(query, f"{title} {summary}".strip())["input_ids"]
        marks = pair.ids[: pair.document_start]
        assert marks[-1] == tokenizer.sep_token_id
    # a document that holds the tokenizer's own mark cannot end the pair early
    [pair] = text.encode(["a"], [tokenizer.sep_token], ["b"])
    assert pair.ids.count(tokenizer.sep_token_id) == len(text.marks.between) + len(text.marks.last)


@pytest.mark.parametrize("family", FAMILIES)
def test_sentence_transformers_opens_it_with_the_same_scores(trained, family):
    expected = score_pairs(trained[family], QUERIES, TITLES, SUMMARIES)
    documents = [f"{title} {summary}".strip() for title, summary in zip(TITLES, SUMMARIES)]
    scores = CrossEncoder(str(trained[family]), device="cpu").predict(list(zip(QUERIES, documents)))
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert expected.std() > 1e-3


def test_all_families_pass_the_gate_and_are_served_with_their_checkpoints_scores(arms):
    for name, checkpoint in arms.checkpoints.items():
        with Reranker([arms.url], name, deadline_ms=20_000) as ranker:
            for query in QUERIES:
                ranked = ranker.rank(query, TITLES, SUMMARIES)
                expected = score_pairs(checkpoint, [query] * len(TITLES), TITLES, SUMMARIES)
                np.testing.assert_allclose(ranked.scores, expected, atol=1e-4)


def test_another_family_is_refused_with_what_to_do_instead(tmp_path):
    DistilBertConfig(n_layers=1).save_pretrained(tmp_path / "distilbert")
    refused = r"a distilbert model; students are bert, .* build/build_cross_encoder\.py"
    with pytest.raises(InputError, match=refused):
        create_student(StudentModelSettings(init=str(tmp_path / "distilbert")), tmp_path, tmp_path / "work", seed=1)
    ScoreCard("student", PAIR_FORMAT, 1, LIMITS, "linear", "cls").save(tmp_path / "distilbert")
    with pytest.raises(InputError, match=refused):
        load_encoder(tmp_path / "distilbert")
