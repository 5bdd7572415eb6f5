"""An arm that is a cascade of two students, on a real tritonserver, and its change-overs."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pyarrow as pa
import pytest
from tritonclient.utils import InferenceServerException

from build import releases
from build.build_student import Config, main
from build.export_onnx import load_encoder, torch_runner
from build.gate import GateLimits
from build.runners import score_pairs
from build.running_server import RunningServer
from build.triton_config import ServingLimits
from clients.triton.connection import TritonConnection
from clients.triton.reranker import Reranker, RerankError
from clients.triton.scoring import PageTensors, ScoringClient, ScoringFailure
from ranking.card import ScoreCard, fingerprint
from ranking.cascade import Cascade
from ranking.errors import InputError
from ranking.prior import PriorBlend
from ranking.request_tensors import token_tensors
from ranking.schema import read_table, write_table
from ranking.text import StudentFormat
from serving.temporary_server import start_triton
from tests.helpers.tiny_student import make_judged, make_student, sentence

LIMITS = ServingLimits(threads=1, batch_tokens=512, call_tokens=16, front_instances=1, score_cache_mb=1)
K = 4


def published(checkpoint, name, data, repository, **more) -> None:
    defaults = {"precision": "fp32", "accept_worse": "random weights", "serves_now": "none", "serving": LIMITS}
    main(Config(checkpoint, name, "openvino", data, repository=repository, **defaults | more))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade")
    data, repository = make_judged(folder / "data"), folder / "repository"
    small = make_student(folder / "small", seed=1, hidden_size=32, intermediate_size=64)
    large = make_student(folder / "large", seed=2)
    share_tokenizer(large, small)
    grade_as(large, data)
    published(small, "small", data, repository)
    cascade = {"cascade_first": "small", "cascade_k": K}
    with pytest.raises(InputError, match="cascade_k is 10: no judged query has more documents"):
        published(large, "student", data, repository, cascade_first="small", cascade_k=10)
    published(large, "student", data, repository, gate=GateLimits(max_cascade_loss=1), **cascade)
    with pytest.raises(InputError, match="cascade_first student: version 1 is a cascade itself"):
        published(large, "twice", data, repository, cascade_first="student")
    published(large, "student", data, repository, promote=False)  # version 2: the large model alone
    with start_triton(repository, "--model-control-mode=explicit", "--load-model=*") as server:
        yield server, repository, small, large


def share_tokenizer(source, target) -> None:
    """Two trainings of one tiny tokenizer number its tokens differently."""
    shutil.copy(source / "tokenizer.json", target)
    card = ScoreCard.load(target)
    card.vocabulary = fingerprint(target / "tokenizer.json")
    card.save(target)


def grade_as(checkpoint, data) -> None:
    """Gives the judged documents grades that follow a checkpoint's scores, so that those tell of relevance."""
    path = data / "judgments" / "dev.parquet"
    table = read_table(path, "judgments")
    text = StudentFormat.of_checkpoint(checkpoint)
    pairs = text.encode(*(table.column(name).to_pylist() for name in ("query", "title", "summary")))
    scores = score_pairs(torch_runner(load_encoder(checkpoint)), pairs, text.pad_id)
    scores = scores + np.random.default_rng(0).normal(0, scores.std() / 2, len(scores))
    grades = pa.array(np.digitize(scores, np.quantile(scores, [0.6, 0.85])).astype(np.int8))
    place = table.schema.get_field_index("grade")
    write_table(path, "judgments", table.set_column(place, table.schema.field(place), grades))


def raw_scores(checkpoint, query, titles, summaries) -> np.ndarray:
    text = StudentFormat.of_checkpoint(checkpoint)
    pairs = text.encode([query] * len(titles), titles, summaries)
    return score_pairs(torch_runner(load_encoder(checkpoint)), pairs, text.pad_id)


def test_a_served_cascade_gives_the_joined_scores_of_both_checkpoints(served):
    server, repository, small, large = served
    about = releases.manifest(repository, "student", 1)
    assert about["cascade"]["first"] == "small" and about["cascade"]["cost"]["queries_beyond_k"] == 12
    cascade, blend = Cascade(**about["cascade"]["scores"]), PriorBlend(**about["quality"]["prior"])
    rng = random.Random(2)
    with Reranker([f"grpc://{server.grpc}"], deadline_ms=60_000) as ranker:
        for documents in (1, K, K + 1, 20):
            titles = [f"{sentence(rng, 0, 6)} {number}" for number in range(documents)]  # no two alike: no ties
            page = ("red moon", titles, [sentence(rng, 0, 30)] * documents)
            priors = [rng.choice([None, rng.uniform(0, 9)]) for _ in range(documents)]
            first, scores = (raw_scores(checkpoint, *page) for checkpoint in (small, large))
            groups = np.zeros(documents, int)
            for _ in range(2):  # the second time both models' scores are kept ones
                found = ranker.rank(*page)
                np.testing.assert_allclose(found.scores, cascade.of_lists(first, scores, groups), atol=2e-5)
                prior = np.array([np.nan if p is None else p for p in priors])
                expected = cascade.of_lists(first, scores, groups, lambda s, rows, p=prior: blend.blend(s, p[rows]))
                blended = ranker.rank(*page, priors=priors).scores
                np.testing.assert_allclose(blended, expected, atol=2e-5)
            order = np.argsort(-found.scores, kind="stable")
            assert (np.diff(found.probabilities[order]) <= 0).all()


class ScoringClientOf(ScoringClient):
    def __init__(self, server):
        super().__init__(TritonConnection(f"grpc://{server.grpc}"), 60_000)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def test_token_ids_are_taken_where_both_models_have_one_vocabulary(served):
    server, _, _, large = served
    text = StudentFormat.of_checkpoint(large)
    titles, summaries = ["king", "queen", "moon", "night train", "ship", "red"], ["story"] * 6
    fields = text.tokenise(["red moon"], titles, summaries)
    tensors = token_tensors(fields[0][0], *fields[1:], fingerprint(large / "tokenizer.json"))
    with ScoringClientOf(server) as client, Reranker([f"grpc://{server.grpc}"], deadline_ms=60_000) as ranker:
        expected = ranker.rank("red moon", titles, summaries).scores
        assert client.score("student", PageTensors(tensors), 60_000).values.tobytes() == expected.tobytes()
        wrong = PageTensors(tensors | {"token_counts": tensors["token_counts"][:-1]})
        with pytest.raises(ScoringFailure, match="token_counts has 12 values"):
            client.score("student", wrong, 60_000)


class Refusing(RunningServer):
    def load(self, model):
        raise InferenceServerException("out of memory")


def test_a_cascade_changes_over_to_a_single_model_and_back(served):
    server, repository, _, large = served
    servers = [RunningServer(server.grpc)]
    page = ("secret island", ["king", "queen", "moon", "night train", "ship", "red"], ["story"] * 6)
    with Reranker([f"grpc://{server.grpc}"], deadline_ms=60_000) as ranker:
        before = ranker.rank(*page)
        releases.promote(repository, "student", 2, servers)
        np.testing.assert_allclose(ranker.rank(*page).scores, raw_scores(large, *page), atol=2e-5)
        assert not server.model_is_ready("student_first_encoder")
        # seen: "and student_first_encoder do not serve", of a version that has none
        with pytest.raises(InputError, match=r"does not load .* the old version goes on serving"):
            releases.promote(repository, "student", 1, [Refusing(server.grpc)])
        releases.rollback(repository, "student", servers)
        after = ranker.rank(*page)
        assert (before.version, after.version) == ("1", "1") and before.scores.tobytes() == after.scores.tobytes()
        releases.reload(repository, "student", servers)
        assert ranker.rank(*page).scores.tobytes() == before.scores.tobytes()
        for model in ("student", "student_first_encoder"):  # what a reload that was stopped leaves
            servers[0].unload(model)
            servers[0].wait_until_gone(model, {1})
        releases.reload(repository, "student", servers)
        assert ranker.rank(*page).scores.tobytes() == before.scores.tobytes()
        with pytest.raises(RerankError):
            ranker.rank(" ", ["a"], ["b"])


def test_settings_of_a_cascade_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cascade_first is student, the arm itself"):
        Config(tmp_path, "student", "openvino", tmp_path, cascade_first="student")
    with pytest.raises(ValueError, match="cascades are built for --target openvino alone"):
        Config(tmp_path, "student", "tensorrt", tmp_path, cascade_first="small")
    with pytest.raises(ValueError, match="cascade_k: at least 1"):
        Config(tmp_path, "student", "openvino", tmp_path, cascade_first="small", cascade_k=0)
