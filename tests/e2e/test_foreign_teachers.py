"""Foreign rerankers behind the real tritonserver, labelled by the real programs, score as their published code."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from build import build_cross_encoder, build_teacher
from clients import label_corpus
from ranking.cross_encoder_text import CrossEncoderFormat
from ranking.labels import read_labels
from ranking.limits import FieldLimits
from ranking.reranker_prompts import PromptFormat
from ranking.schema import TABLES
from serving.temporary_server import start_triton
from tests.e2e.conftest import QUIET_VLLM
from tests.helpers.foreign_encoders import ENCODERS, make_encoder, transformers_scores
from tests.helpers.foreign_rerankers import hostile_pairs, make_reranker, published_scores

LIMITS = FieldLimits(16, 16, 48)
PAIRS = hostile_pairs(200)
DECODER = "mxbai-rerank-v2"  # the one whose pieces merge when they are joined as text


@pytest.fixture(scope="module")
def rerankers(tmp_path_factory):
    """{name: folder of the published model}: one decoder and an encoder of each family."""
    folder = tmp_path_factory.mktemp("rerankers")
    return {DECODER: make_reranker(folder / DECODER, DECODER)} | {
        family: make_encoder(folder / family, family) for family in ENCODERS
    }


@pytest.fixture(scope="module")
def server(rerankers, tmp_path_factory):
    repository = tmp_path_factory.mktemp("foreign") / "model_repository"
    eager = {"enforce_eager": True}
    build_teacher.main(
        build_teacher.Config(
            rerankers[DECODER], repository=repository, name="decoder", engine_args=eager, prompt=DECODER, limits=LIMITS
        )
    )
    for family in ENCODERS:
        build_cross_encoder.main(
            build_cross_encoder.Config(rerankers[family], family, repository=repository, limits=LIMITS)
        )
    with start_triton(repository, timeout_seconds=480, environment=QUIET_VLLM) as running:
        yield running, repository


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    path = tmp_path_factory.mktemp("candidates") / "candidates.parquet"
    rows = [(f"q{n}", "d", *pair) for n, pair in enumerate(PAIRS)]
    pq.write_table(pa.table([list(column) for column in zip(*rows)], schema=TABLES["candidates"].schema), path)
    return path


def labelled(folder) -> np.ndarray:
    return read_labels(folder).column("teacher_score").to_numpy()


def test_a_folded_reranker_scores_as_its_published_code(server, rerankers, candidates, tmp_path):
    running, repository = server
    settings = {"url": [running.grpc], "teacher": repository / "decoder", "model": "decoder"}
    assert label_corpus.main(label_corpus.Config(candidates=candidates, out=tmp_path / "labels", **settings)) == 0
    text_format = PromptFormat.of_checkpoint(repository / "decoder/1/checkpoint")
    pairs = list(zip(*text_format.fields(*zip(*PAIRS))))
    expected = np.array(published_scores(rerankers[DECODER], DECODER, pairs))
    assert expected.std() > 0.3
    np.testing.assert_allclose(labelled(tmp_path / "labels"), expected, atol=1e-4)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_scores_as_transformers_does(family, server, rerankers, candidates, tmp_path):
    running, repository = server
    settings = {"url": [running.grpc], "model": family, "teacher_kind": "ranker"}
    assert label_corpus.main(label_corpus.Config(candidates=candidates, out=tmp_path / "labels", **settings)) == 0
    text_format = CrossEncoderFormat.of_checkpoint(repository / family / "1/checkpoint")
    expected = np.array(transformers_scores(rerankers[family], list(zip(*text_format.fields(*zip(*PAIRS))))))
    assert expected.std() > 0.05
    np.testing.assert_allclose(labelled(tmp_path / "labels"), expected, atol=1e-4)
