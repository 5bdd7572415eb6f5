"""What the A/B router adds to a page: the same pages through it and straight to Triton, side by side, in turns.

The router is asked by its own `/rank` and by `/v2/rerank`, Cohere's form (docs/integrations.md).

python -m benchmarks.ab.router --clients 8 --model-ms 10

A real tritonserver serves toy rankers that wait `model_ms` without using the processor, as a model on an accelerator
does, so that what is left is the cost of the path. Clients are closed loops in one process; both paths use the lightest
client at hand.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc.aio as grpc_aio
from tritonclient.grpc import InferInput

from benchmarks.ab.toy_rankers import write_toy_repository
from benchmarks.paired_rounds import interleaved
from clients.ab.router.api import RankRequest
from clients.ab.router.http_requests import as_json, parse_body
from clients.ab.router.local_router import start_router
from clients.ab.router.rerank_api import RerankRequest, cohere_answer, reranked
from ranking.program import run
from serving.temporary_server import start_triton

EXPERIMENT = """
default_model: baseline
experiments:
  - {name: bench, arms: [{name: baseline, model: baseline}, {name: student, model: student}]}
"""
HEAD = b"POST %s HTTP/1.1\r\nHost: router\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@dataclass
class Config:
    """Measure the router's overhead over calling Triton directly.

    Args:
        clients: closed-loop clients
        documents: candidates of a page
        model_ms: how long a model takes
        rounds: turns of each path; paths alternate, so that a busy machine hits both
        seconds: length of a turn
        pause_ms: pause of a client between pages; 0 is a closed loop at full speed
        out: also write the figures here as JSON
    """

    clients: int = 8
    documents: int = 48
    model_ms: float = 10.0
    rounds: int = 5
    seconds: float = 4.0
    pause_ms: float = 0.0
    out: Path | None = None


Ask = Callable[[int, int], Awaitable[None]]  # (client, page number)


def page_texts(documents: int) -> tuple[str, list[str], list[str]]:
    """A query, titles of 8 words and summaries of 40, as on a real page."""
    titles = [" ".join(f"title{(i * 7 + k) % 90}" for k in range(8)) for i in range(documents)]
    summaries = [" ".join(f"word{(i * 11 + k) % 300}" for k in range(40)) for i in range(documents)]
    return "title3 word7 word21", titles, summaries


async def direct(address: str, documents: int) -> tuple[Ask, Callable[[], Coroutine[Any, Any, None]]]:
    """Ask Triton over gRPC, as a service without a router would."""
    client = grpc_aio.InferenceServerClient(address)
    query, titles, summaries = page_texts(documents)

    async def ask(number: int, page: int) -> None:
        tensors = []
        for name, texts in (("query", [query]), ("title", titles), ("summary", summaries)):
            tensor = InferInput(name, [len(texts)], "BYTES")
            tensor.set_data_from_numpy(np.array([t.encode() for t in texts], dtype=object))
            tensors.append(tensor)
        result = await client.infer("student" if page % 2 else "baseline", tensors)
        assert len(result.as_numpy("score")) == documents

    return ask, client.close


async def routed(url: str, documents: int, path: bytes) -> tuple[Ask, Callable[[], Coroutine[Any, Any, None]]]:
    """Ask the router over HTTP on kept-open connections, one per client. path: /rank or /v2/rerank."""
    host, port = url.removeprefix("http://").split(":")
    query, titles, summaries = page_texts(documents)
    listed = [{"doc_id": f"d{i}", "title": t, "summary": s} for i, (t, s) in enumerate(zip(titles, summaries))]
    connections: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}

    async def ask(number: int, page: int) -> None:
        if number not in connections or connections[number][0].at_eof():  # the router ends what is idle for 5 s
            connections[number] = await asyncio.open_connection(host, int(port))
        reader, writer = connections[number]
        user = f"u{number}-{page % 100}"
        body = json.dumps({"user_id": user, "user": user, "query": query, "documents": listed}).encode()
        if path == b"/rank":  # it takes no field that it does not know
            body = body.replace(f'"user": "{user}", '.encode(), b"", 1)
        writer.write(HEAD % (path, len(body)) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        answer = json.loads(await reader.readexactly(length))
        told = answer.get("meta", answer)
        assert told["logged"] and not told["fallback"] and told["arm"], answer

    async def close() -> None:
        for _, writer in connections.values():
            writer.close()

    return ask, close


async def turn(ask: Ask, clients: int, seconds: float, pause_ms: float) -> list[float]:
    """Latencies in ms of one turn."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        page = number * 1000
        while time.perf_counter() < end:
            started = time.perf_counter()
            await ask(number, page)
            latencies.append((time.perf_counter() - started) * 1000)
            page += 1
            if pause_ms:
                await asyncio.sleep(pause_ms / 1000)

    await asyncio.gather(*(client(n) for n in range(clients)))
    return latencies


def measure(
    config: Config, triton: str, router: str, process: psutil.Process
) -> tuple[dict[str, list[list[float]]], dict[str, float]]:
    """Path -> latencies in ms of each of its turns, and path -> processor ms of the router a page.

    triton, router: their addresses; process: the router's.
    """
    seconds: dict[str, float] = {}
    with asyncio.Runner() as loop:
        paths = {
            "direct": loop.run(direct(triton, config.documents)),
            "router": loop.run(routed(router, config.documents, b"/rank")),
            "rerank": loop.run(routed(router, config.documents, b"/v2/rerank")),
        }
        for ask, _ in paths.values():
            loop.run(turn(ask, config.clients, 1.0, 0))  # connections, caches

        def one_turn(name: str) -> list[float]:
            before = process.cpu_times()
            latencies = loop.run(turn(paths[name][0], config.clients, config.seconds, config.pause_ms))
            after = process.cpu_times()
            used = after.user + after.system - before.user - before.system
            seconds[name] = seconds.get(name, 0.0) + used
            return latencies

        turns = interleaved({name: partial(one_turn, name) for name in paths}, config.rounds)
        for _, close in paths.values():
            loop.run(close())
    return turns, {name: seconds[name] * 1000 / sum(map(len, turns[name])) for name in paths}


def form_costs(documents: int, pages: int = 100, passes: int = 7) -> dict[str, float]:
    """Path -> the processor's ms for reading a page's body and writing its answer, without the ranking between them.

    The median of some passes: unlike a latency, processor time hardly depends on who else uses the machine.
    """
    query, titles, summaries = page_texts(documents)
    listed = [{"doc_id": f"d{i}", "title": t, "summary": s} for i, (t, s) in enumerate(zip(titles, summaries))]
    body = {"user": "u", "query": query, "documents": listed}
    told: dict[str, Any] = dict.fromkeys(("experiment", "arm", "served_by", "fallback", "model_version"), "")
    told |= {"request_id": "r", "logged": True, "left_out": 0, "latency_ms": 1.0, "probabilities": None}
    told["scores"] = [0.0123 * i for i in range(documents)]

    def own(content: bytes) -> None:
        page = parse_body(RankRequest, content)
        as_json({**told, "ranking": [document.doc_id for document in page.documents]})

    def rerank(content: bytes) -> None:
        asked = parse_body(RerankRequest, content)
        page = asked.page("u", "r")
        answer = {**told, "ranking": [document.doc_id for document in page.documents]}
        as_json(cohere_answer(asked, reranked(asked, page, answer), answer, "2", "disranker"))

    texts = [f"{title} {summary}" for title, summary in zip(titles, summaries)]
    forms: dict[str, tuple[Callable[[bytes], None], dict[str, Any]]] = {
        "/rank": (own, {"user_id": "u", "query": query, "documents": listed}),
        "/v2/rerank, objects": (rerank, body),
        "/v2/rerank, texts": (rerank, {**body, "documents": texts}),
    }
    costs: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(passes):
        for name, (work, content) in forms.items():
            sent = json.dumps(content).encode()
            started = time.thread_time()
            for _ in range(pages):
                work(sent)
            costs[name].append((time.thread_time() - started) * 1000 / pages)
    return {name: float(np.median(values)) for name, values in costs.items()}


def main(config: Config) -> None:
    """Serve the toy rankers and a router, measure both paths in turns, and print what the router adds."""
    with tempfile.TemporaryDirectory() as folder:
        repository = write_toy_repository(Path(folder) / "models", config.model_ms / 1000, instances=config.clients)
        experiment = Path(folder) / "experiment.yaml"
        experiment.write_text(EXPERIMENT)
        log = Path(folder) / "log"
        flags = ("--deadline-ms", "5000")
        with start_triton(repository) as triton, start_router(experiment, triton.grpc, log, *flags) as router:
            turns, used = measure(config, triton.grpc, router.url, psutil.Process(router.process.pid))
    pages = sum(len(turn) for name in ("router", "rerank") for turn in turns[name])
    figures = {name: np.percentile(np.concatenate(t), [50, 95, 99]).round(2).tolist() for name, t in turns.items()}
    by_round = [float(np.median(r) - np.median(d)) for d, r in zip(turns["direct"], turns["router"])]
    of_rerank = [float(np.median(v) - np.median(r)) for r, v in zip(turns["router"], turns["rerank"])]
    load = psutil.getloadavg()[0]
    print(f"{config.clients} clients, {config.documents} documents, model {config.model_ms:g} ms, "
          f"pause {config.pause_ms:g} ms, {pages} pages through the router, load average {load:.1f}")  # fmt: skip
    for name, (p50, p95, p99) in figures.items():
        rate = sum(map(len, turns[name])) / (config.rounds * config.seconds)
        print(f"{name:8} p50 {p50:7.2f} ms  p95 {p95:7.2f} ms  p99 {p99:7.2f} ms  {rate:7.0f} pages/s")
    print(f"overhead at p50 {np.median(by_round):.2f} ms (rounds: {', '.join(f'{x:.2f}' for x in by_round)}); "
          f"router's processor time {used['router']:.2f} ms a page, {used['rerank']:.2f} by /v2/rerank")  # fmt: skip
    print(f"/v2/rerank over /rank at p50 {np.median(of_rerank):.2f} ms "
          f"(rounds: {', '.join(f'{x:.2f}' for x in of_rerank)})")  # fmt: skip
    costs = form_costs(config.documents)
    print(f"body and answer, processor ms a page: {', '.join(f'{name} {ms:.2f}' for name, ms in costs.items())}")
    if config.out:
        content = {"figures_ms_p50_p95_p99": figures, "overhead_p50_ms_by_round": by_round, "processor_ms": used}
        content |= {"rerank_over_rank_p50_ms_by_round": of_rerank, "body_and_answer_processor_ms": costs}
        config.out.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.ab.router --clients 8 --model-ms 10")
