"""A student's folder in the hands of others: sentence-transformers, transformers' pipeline, a model hub."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from sentence_transformers import CrossEncoder
from transformers import pipeline

from ranking.card import ScoreCard
from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.schema import read_table
from training.evaluation.checkpoint_scores import score_pairs
from training.student.model_card import push_to_hub
from training.train_baseline import Config, train_baseline
from training.world.dataset import WorldConfig, write_world


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world")
    write_world(WorldConfig.small(train_queries=24, dev_queries=12, test_queries=4, unlabelled_queries=10), out)
    return out


@pytest.fixture(scope="module")
def student(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "films"
    settings = {"size": "tiny-2", "vocabulary_size": 800, "epochs": 1, "learning_rate": 3e-3, "precision": "fp32"}
    train_baseline(Config(data=data, out=out, calibrate="isotonic", limits=FieldLimits(16, 48, 128), **settings))
    return out


@pytest.fixture(scope="module")
def pairs(data) -> tuple[list[str], list[str], list[str]]:
    rows = read_table(data / "judgments/dev.parquet", "judgments").to_pylist()
    random.Random(1).shuffle(rows)
    return tuple([row[name] for row in rows[:200]] for name in ("query", "title", "summary"))


def test_sentence_transformers_and_the_pipeline_give_the_same_raw_scores(student, pairs):
    expected = score_pairs(student, *pairs)
    documents = [f"{title} {summary}".strip() for title, summary in zip(*pairs[1:])]
    opened = CrossEncoder(str(student), device="cpu")
    scores = opened.predict(list(zip(pairs[0], documents)), show_progress_bar=False)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert expected.std() > 1e-3
    classify = pipeline("text-classification", str(student), device="cpu")
    told = classify([{"text": q, "text_pair": d} for q, d in zip(pairs[0][:20], documents)])
    np.testing.assert_allclose([entry["score"] for entry in told], expected[:20], atol=1e-4)
    assert {entry["label"] for entry in told} == {"relevance"}
    best = opened.rank(pairs[0][0], documents[:10], top_k=1)[0]["corpus_id"]
    assert best == int(np.argmax(score_pairs(student, [pairs[0][0]] * 10, pairs[1][:10], pairs[2][:10])))


def test_a_pair_beyond_the_limits_is_cut_rather_than_refused(student):
    long = CrossEncoder(str(student), device="cpu").predict([("query " * 500, "word " * 5000)])
    assert np.isfinite(long).all()


def test_the_model_card_has_metrics_data_and_no_path_of_this_machine(student, data):
    text, card = (student / "README.md").read_text(), ScoreCard.load(student)
    assert text.startswith("---\nlibrary_name: sentence-transformers\npipeline_tag: text-ranking\n")
    assert f"| ndcg@5 | {card.metrics['ndcg@5']:.4f} |" in text and "(isotonic)" in text
    assert all(f"| {name} | `{digest}` |" in text for name, digest in card.trained_on.items())
    assert "the first 16 tokens of the query, 48 of" in text and 'CrossEncoder("films")' in text
    assert str(data.parent) not in text and str(student.parent) not in text


@contextmanager
def hub() -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    """A server in place of a model hub, which refuses a repository `taken/...`: its address, and what was asked."""
    asked: list[tuple[str, str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            asked.append((self.command, self.path, body))
            content: object = {
                "url": f"{url}/owner/films",
                "commitUrl": f"{url}/owner/films/commit/{0:040}",
                "commitOid": "0" * 40,
            }
            status = 200
            if b'"taken"' in body:
                status, content = 400, {"error": "no such owner"}
            elif "/preupload/" in self.path:
                named = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                content = {"files": named}
            elif "/revision/" in self.path:
                content = {"id": "owner/films", "sha": "0" * 40, "siblings": []}
            elif "/tree/" in self.path:
                content = []
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_HEAD = _answer

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield url, asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_folder_goes_to_a_private_repository_of_a_hub_without_the_runs_states(student, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token")
    with hub() as (url, asked):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", url)
        push_to_hub(student, "owner/films")
        created = next(json.loads(body) for method, path, body in asked if path == "/api/repos/create")
        assert created["visibility"] == "private"
        commit = next(body for _, path, body in asked if "/commit/" in path)
        sent = {json.loads(line)["value"]["path"] for line in commit.splitlines() if b'"file"' in line}
        assert {"README.md", "ranker.json", "config.json", "model.safetensors", "tokenizer.json"} <= sent
        assert not any("training" in name for name in sent)
        with pytest.raises(InputError, match=r"--push-to-hub taken/films: .* the checkpoint is in .*films"):
            push_to_hub(student, "taken/films")


def test_a_hub_that_nobody_answers_for_is_named_and_the_folder_stays(student, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token")
    with socket.socket() as kept:  # bound and not listening
        kept.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{kept.getsockname()[1]}")
        with pytest.raises(InputError, match=r"--push-to-hub owner/films: .* the checkpoint is in .*films"):
            push_to_hub(student, "owner/films")
