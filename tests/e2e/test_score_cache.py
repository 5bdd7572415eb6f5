"""Scores that a front keeps, on a real tritonserver: a hit is the bits of a miss, whatever list the pair comes in."""

from __future__ import annotations

import random
import re
import urllib.request
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from build import releases
from build.build_student import Config, main
from build.openvino_engine import cpu_precisions
from build.running_server import RunningServer
from build.triton_config import ServingLimits
from clients.triton.connection import TritonConnection
from clients.triton.reranker import Reranker
from clients.triton.scoring import PageTensors, ScoringClient
from ranking.card import fingerprint
from ranking.request_tensors import token_tensors
from ranking.text import StudentFormat
from serving.front.score_cache import AUDIT_EVERY
from serving.temporary_server import TritonServer, start_triton
from tests.helpers.tiny_student import make_judged, make_student, sentence

LIMITS = {"threads": 1, "batch_tokens": 512, "call_tokens": 16, "front_instances": 1}
RNG = random.Random(7)
TITLES = [sentence(RNG, 0, 6) for _ in range(40)]
SUMMARIES = [sentence(RNG, 0, 40) for _ in range(40)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Three versions: one that keeps scores, one of another checkpoint that does too, one that keeps none."""
    folder = tmp_path_factory.mktemp("score-cache")
    data, repository = make_judged(folder / "data"), folder / "repository"
    checkpoints = [make_student(folder / f"student{seed}", seed=seed) for seed in (1, 2)]
    precision = "bf16" if "bf16" in cpu_precisions() else "fp32"
    for name, checkpoint, size in (
        ("student", checkpoints[0], 1.0), ("student", checkpoints[1], 1.0), ("plain", checkpoints[0], 0.0)
    ):  # fmt: skip
        serving = ServingLimits(score_cache_mb=size, **LIMITS)
        first = not (repository / name).exists()
        main(
            Config(
                checkpoint, name, "openvino", data, repository=repository, precision=precision, serving=serving,
                promote=first, accept_drop=True, accept_worse="random weights", serves_now="none",
            )
        )  # fmt: skip
    with start_triton(repository, "--model-control-mode=explicit", "--load-model=*") as server:
        yield server, repository, checkpoints[0]


def reranker(server: TritonServer, name: str = "student") -> Reranker:
    return Reranker([f"grpc://{server.grpc}"], name, deadline_ms=60_000)


def figures(server: TritonServer, version: int = 1) -> dict[str, float]:
    text = urllib.request.urlopen(f"http://{server.metrics}/metrics").read().decode()
    found: dict[str, float] = defaultdict(float)
    for name, value in re.findall(rf'^(disranker_score_\w+)\{{.*version="{version}".*\}} (\S+)$', text, re.MULTILINE):
        found[name.removeprefix("disranker_score_cache_")] += float(value)
    return found


def test_a_kept_score_is_the_computed_one_to_the_bit_in_whatever_list_it_comes(served):
    server, _, _ = served
    rng = random.Random(3)
    with reranker(server) as keeps, reranker(server, "plain") as computes:
        before = figures(server)
        for _ in range(30):
            rows = rng.sample(range(40), rng.randint(1, 30))
            page = ("red night", [TITLES[row] for row in rows], [SUMMARIES[row] for row in rows])
            assert keeps.rank(*page).scores.tobytes() == computes.rank(*page).scores.tobytes()
        after = figures(server)
    distinct = len(set(zip(TITLES, SUMMARIES)))
    assert after["misses_total"] - before["misses_total"] == distinct  # each was encoded once, and all came
    assert after["hits_total"] - before["hits_total"] > 100
    assert after["bytes"] == 400 * after["misses_total"] and after["moved_total"] == 0


def test_another_query_and_another_summary_are_other_entries(served):
    server, _, _ = served
    with reranker(server) as keeps, reranker(server, "plain") as computes:
        for query, titles, summaries in (
            ("king", ["queen", "queen"], ["red", "blue"]),
            ("kin", ["gqueen", "queenr"], ["red", "ed"]),  # the same letters, divided otherwise
            ("king", ["queenred", "queen"], ["", "blue "]),
        ):
            for _ in range(2):
                found, expected = (r.rank(query, titles, summaries).scores for r in (keeps, computes))
                assert found.tobytes() == expected.tobytes()


def test_priors_and_token_ids_go_past_the_cache_and_meet_the_same_scores(served):
    server, _, checkpoint = served
    priors = [float(number % 7) for number in range(10)]
    page = ("moon", TITLES[:10], SUMMARIES[:10])
    with reranker(server) as keeps, reranker(server, "plain") as computes:
        for _ in range(2):  # the second time from the cache
            found, expected = (r.rank(*page, priors=priors).scores for r in (keeps, computes))
            assert found.tobytes() == expected.tobytes()
        alone = keeps.rank(*page).scores
    fields = StudentFormat.of_checkpoint(checkpoint).tokenise(["moon"], *page[1:])
    tensors = token_tensors(fields[0][0], *fields[1:], fingerprint(checkpoint / "tokenizer.json"))
    client = ScoringClient(TritonConnection(f"grpc://{server.grpc}"), 60_000)
    for _ in range(2):
        assert client.score("student", PageTensors(tensors), 60_000).values.tobytes() == alone.tobytes()
    client.close()


def test_hits_are_audited(served):
    server, _, _ = served
    with reranker(server) as keeps:
        first = keeps.rank("blue dragon", TITLES[:3], SUMMARIES[:3]).scores
        for _ in range(AUDIT_EVERY):
            assert keeps.rank("blue dragon", TITLES[:3], SUMMARIES[:3]).scores.tobytes() == first.tobytes()
    found = figures(server)
    assert found["audits_total"] >= 1 and found["moved_total"] == 0


def test_a_new_version_never_gives_a_score_of_the_old_one(served):
    server, repository, _ = served
    page = ("secret island", TITLES, SUMMARIES)
    servers = [RunningServer(server.grpc)]
    with reranker(server) as keeps:
        old = keeps.rank(*page)
        releases.promote(repository, "student", 2, servers)
        new, again = keeps.rank(*page), keeps.rank(*page)
        releases.rollback(repository, "student", servers)
        back = keeps.rank(*page)
    assert [answer.version for answer in (old, new, again, back)] == ["1", "2", "2", "1"]
    assert np.abs(new.scores - old.scores).max() > 0.01
    assert new.scores.tobytes() == again.scores.tobytes() and back.scores.tobytes() == old.scores.tobytes()


def test_a_tensorrt_version_cannot_keep_scores():
    with pytest.raises(ValueError, match="score_cache_mb: TensorRT's calls hold whatever lists came"):
        Config(Path("c"), "student", "tensorrt", Path("d"), serving=ServingLimits(score_cache_mb=8))
