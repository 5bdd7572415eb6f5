"""The systems that systems_compared.py compares, each as a function that gives a client: one request -> scores."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil

from benchmarks.serving.closed_loop import Ask
from benchmarks.serving.rerank_lists import RerankList
from build import openvino_engine
from build.triton_config import ServingLimits
from clients.triton.reranker import Reranker
from ranking.encoder_inputs import pad
from ranking.text import EncodedPair, StudentFormat
from serving.front.buckets import cut
from serving.temporary_server import free_ports, start_triton

MakeAsk = Callable[[], Ask]


@dataclass
class System:
    """make: gives a client; server: the process that serves it, None for in-process systems."""

    make: MakeAsk
    server: psutil.Process | None = None


@dataclass
class PublishedEngine:
    """A published version: its two folders, and what its manifest says of precision, bucket lengths and limits."""

    front: Path
    encoder: Path
    precision: str
    lengths: list[int]
    limits: ServingLimits


def in_process(published: PublishedEngine, beforehand: Iterable[RerankList] = ()) -> System:
    """The published engine in this process, with the served model's buckets and no server between; one caller.

    beforehand: requests whose tokens are made here, outside all measured time; any other is tokenised as it is asked.
    """
    text = StudentFormat.of_checkpoint(published.front)
    limits = published.limits
    runner = openvino_engine.runner(published.encoder / "model.xml", published.precision)

    def encode(request: RerankList) -> list[EncodedPair]:
        return text.encode([request.query] * len(request.titles), request.titles, request.summaries)

    # with the request itself, whose identity would be another's once it is gone
    known = {id(request): (request, encode(request)) for request in beforehand}

    def ask(request: RerankList) -> np.ndarray:
        pairs = known[id(request)][1] if id(request) in known else encode(request)
        scores = np.empty(len(pairs), np.float32)
        lengths = [len(pair.ids) for pair in pairs]
        for bucket in cut(lengths, published.lengths, limits.max_batch, limits.batch_tokens, limits.call_tokens):
            scores[bucket.rows] = runner(pad([pairs[row] for row in bucket.rows], bucket.length, text.pad_id))
        return scores

    return System(lambda: ask)


@contextmanager
def triton(repository: Path, model: str = "student") -> Iterator[System]:
    """tritonserver with the published student, asked over gRPC by the project's client."""
    with start_triton(repository) as server:

        def make() -> Ask:
            ranker = Reranker([f"grpc://{server.grpc}"], model, deadline_ms=300_000)
            return lambda request: ranker.rank(request.query, request.titles, request.summaries).scores

        yield System(make, psutil.Process(server.pid))


@contextmanager
def cross_encoder(
    checkpoint: Path, dtype: str, backend: str = "torch", python: Path = Path(sys.executable)
) -> Iterator[System]:
    """CrossEncoder behind FastAPI and uvicorn. backend: "torch", or "openvino" if python has optimum-intel."""
    (port,) = free_ports(1)
    script = Path(__file__).with_name("cross_encoder_server.py")
    command = [str(python), str(script), str(checkpoint), dtype, str(port), backend]
    with started(command, f"http://127.0.0.1:{port}/health") as server:
        yield System(
            http_client(f"http://127.0.0.1:{port}/rerank", lambda q, d: {"query": q, "documents": d}, lambda a: a),
            server,
        )


@contextmanager
def infinity(python: Path, checkpoint: Path, dtype: str) -> Iterator[System]:
    """infinity-emb's rerank endpoint, from its own venv (its dependencies do not agree with this one's).

    dtype: float32 or bfloat16, of its weights and computation.
    """
    (port,) = free_ports(1)
    command = [
        *(str(python.with_name("infinity_emb")), "v2", "--model-id", str(checkpoint), "--served-model-name", "student"),
        *("--engine", "torch", "--device", "cpu", "--port", str(port), "--host", "127.0.0.1", "--no-bettertransformer"),
        *("--dtype", dtype),
    ]

    def scores(answer: dict) -> list[float]:
        by_index = {entry["index"]: entry["relevance_score"] for entry in answer["results"]}
        return [by_index[i] for i in range(len(by_index))]

    with started(command, f"http://127.0.0.1:{port}/health") as server:
        yield System(
            http_client(
                f"http://127.0.0.1:{port}/rerank",
                lambda q, d: {"model": "student", "query": q, "documents": d, "raw_scores": True},
                scores,
            ),
            server,
        )


def http_client(url: str, body: Callable[[str, list[str]], dict], scores: Callable) -> MakeAsk:
    """A client of a JSON server. body: query and documents -> the request; scores: the answer -> scores in order."""

    def make() -> Ask:
        client = httpx.Client(timeout=600)

        def ask(request: RerankList) -> np.ndarray:
            documents = [f"{title} {summary}" for title, summary in zip(request.titles, request.summaries)]
            answer = client.post(url, json=body(request.query, documents))
            answer.raise_for_status()
            return np.asarray(scores(answer.json()), np.float32)

        return ask

    return make


@contextmanager
def started(command: list[str], health: str, patience_seconds: float = 300.0) -> Iterator[psutil.Process]:
    """A server process, ready. RuntimeError with what it printed if it ends first."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        end = time.monotonic() + patience_seconds
        while True:
            try:
                if httpx.get(health, timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass  # not listening yet
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{command[0]} did not start: {process.communicate()[0][-1500:]}")
            time.sleep(0.5)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
