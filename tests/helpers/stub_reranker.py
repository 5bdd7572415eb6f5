"""A reranking service without a model: each HTTP dialect of clients/labelling, faults on demand, pairs counted."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOSTILE = ("brackets", "thousand digits", "beyond float32", "not gzip", "without end", "drop by drop")


def stub_score(query: str, document: str) -> float:
    """A float32-exact score in -8..8 from the pair's text."""
    digest = hashlib.blake2b(f"{query}\n{document}".encode(), digest_size=2).digest()
    return int.from_bytes(digest, "little") / 4096 - 8


class StubReranker:
    """What the service does and has done.

    faults: share of requests by what befalls them: an HTTP status as text, "slow" (answered after `slow_seconds`),
    "short" (half of the documents), "twice" (one index twice), "garbled" (no JSON), "nan", and the hostile ones of
    HOSTILE; key: the bearer token that
    it asks for; poison: a document with this text is refused with 413; nameless: it does not say what it serves.
    """

    def __init__(self, dialect: str, faults: Mapping[str, float] | None = None, **options):
        self.dialect, self.faults = dialect, dict(faults or {})
        self.key: str | None = options.pop("key", None)
        self.poison: str = options.pop("poison", "")
        self.slow_seconds: float = options.pop("slow_seconds", 1.5)
        self.model: str = options.pop("model", "stub-model")
        self.retry_after: str = options.pop("retry_after", "0.05")
        self.nameless: bool = options.pop("nameless", False)
        assert not options, options
        self.draw = random.Random(1)
        self.lock = threading.Lock()
        self.requests = 0
        self.answered: Counter[tuple[str, str]] = Counter()  # pairs whose score went out
        self.url = ""

    def fault(self) -> str:
        with self.lock:
            self.requests += 1
            point = self.draw.random()
        for name, share in self.faults.items():
            if point < share:
                return name
            point -= share
        return ""

    def read(self, path: str, body: dict) -> tuple[str, list[str]]:
        """(query, documents) of a request. AssertionError if it is not the dialect's form."""
        if self.dialect == "vllm-score":
            assert path == "/score" and body["use_activation"] is False
            return body["text_1"], body["text_2"]
        if self.dialect == "tei":
            assert path == "/rerank" and body["raw_scores"] is True
            return body["query"], body["texts"]
        assert path == ("/v2/rerank" if self.dialect == "cohere" else "/v1/rerank")
        assert body.get("top_n", len(body["documents"])) == len(body["documents"])
        return body["query"], body["documents"]

    def answer(self, scores: list[tuple[int, float]]) -> object:
        """The dialect's answer with these (index, score) entries, best first as services send them."""
        scores = sorted(scores, key=lambda entry: -entry[1])
        if self.dialect == "vllm-score":
            return {"data": [{"index": index, "object": "score", "score": score} for index, score in scores]}
        if self.dialect == "tei":
            return [{"index": index, "score": score} for index, score in scores]
        return {"results": [{"index": index, "relevance_score": score} for index, score in scores]}

    def identity(self, path: str) -> object:
        if self.dialect == "tei":
            return {"model_id": self.model, "model_sha": "abc", "model_dtype": "float32"}
        return {"data": [{"id": self.model, "root": self.model}]}


@contextmanager
def reranker(dialect: str, faults: Mapping[str, float] | None = None, **options) -> Iterator[StubReranker]:
    """A service on a free port of this machine until the block ends."""
    stub = StubReranker(dialect, faults, **options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply(500, {}) if stub.nameless else self.reply(200, stub.identity(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if stub.key is not None and self.headers.get("authorization") != f"Bearer {stub.key}":
                self.reply(401, {"message": "invalid api token"})
                return
            fault = stub.fault()
            query, documents = stub.read(self.path, body)
            if stub.poison and any(stub.poison in document for document in documents):
                self.reply(413, {"error": "inputs must have less than 512 tokens"})
                return
            if fault.isdigit():
                self.reply(
                    int(fault), {"error": "asked to fail"}, {"retry-after": stub.retry_after} if fault == "429" else {}
                )
                return
            if fault == "slow":
                time.sleep(stub.slow_seconds)
            scores = [(index, stub_score(query, document)) for index, document in enumerate(documents)]
            if fault == "short":
                scores = scores[: len(scores) // 2]
            if fault == "twice":
                scores.append((0, 1.0))
            if fault == "nan":
                scores[0] = (0, math.nan)
            if fault in ("", "short"):
                with stub.lock:
                    stub.answered.update((query, documents[index]) for index, _ in scores)
            if fault in HOSTILE:
                self.reply_as_an_enemy(fault, stub.answer(scores))
                return
            self.reply(200, stub.answer(scores) if fault != "garbled" else "{")

        def reply_as_an_enemy(self, fault: str, answer: object) -> None:
            text = json.dumps(answer)
            first = re.search(r"(?<=core\": )-?[\d.]+", text)
            assert first is not None
            data = {
                "brackets": b"[" * 100_000,
                "thousand digits": f"{text[: first.start()]}{'9' * 1000}{text[first.end() :]}".encode(),
                "beyond float32": f"{text[: first.start()]}1e300{text[first.end() :]}".encode(),
                "not gzip": b"no gzip at all",
                "without end": b" " * (1 << 20),
                "drop by drop": b" ",
            }[fault]
            endless = fault in ("without end", "drop by drop")
            self.close_connection = True
            try:
                self.send_response(200)
                self.send_header("content-length", str(1 << 40 if endless else len(data)))
                if fault == "not gzip":
                    self.send_header("content-encoding", "gzip")
                self.end_headers()
                self.wfile.write(data)
                while endless:  # until the caller has had enough
                    time.sleep(0.1 if fault == "drop by drop" else 0)
                    self.wfile.write(data)
            except OSError:
                return

        def reply(self, status: int, content: object, headers: Mapping[str, str] | None = None) -> None:
            data = b"{" if content == "{" else json.dumps(content).encode()
            try:
                self.send_response(status)
                for name, value in {"content-length": str(len(data)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the caller's patience is over
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Quiet."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request, client_address) -> None:
            """Quiet: a caller whose patience or budget is over closes its connections."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
