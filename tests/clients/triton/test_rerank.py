"""The rerank client without a server: URLs, documents, deadlines.

What a server answers is in tests/e2e/test_students.py.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from clients.rerank import read_documents
from clients.triton.connection import Credentials, TritonAccess, TritonConnection
from clients.triton.reranker import AsyncReranker, Reranker, RerankError
from clients.triton.scoring import AsyncScoringClient, ScoringFailure, _failure
from ranking.errors import DataError, InputError
from tests.helpers.broken_http import BROKEN_ANSWERS, answering

ROOT = Path(__file__).parents[3]


@pytest.fixture
def silent():
    """host:port of something that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_the_scheme_picks_the_protocol_and_grpc_is_the_default():
    assert str(TritonConnection("localhost:8001")) == "grpc://localhost:8001"
    assert str(TritonConnection("https://search.example:443/triton/")) == "https://search.example:443/triton"
    assert TritonConnection("grpcs://a:1").is_grpc and TritonConnection("grpcs://a:1").is_secure
    assert not TritonConnection("http://a:1").is_grpc and not TritonConnection("http://a:1").is_secure
    for wrong in ("ftp://a:1", "grpc://nohost", "http://a", "http://a:99999"):
        with pytest.raises(InputError, match=r"scheme|[pP]ort"):
            TritonConnection(wrong)


@pytest.mark.parametrize("name", BROKEN_ANSWERS)
def test_an_answer_that_is_none_is_a_failure_with_a_reason_over_every_protocol(name):
    """Seen: over HTTP most of these came through as whatever the parser raised, in the router as a 500 for the page."""

    async def ask(url: str) -> None:
        ranker = AsyncReranker([url], deadline_ms=3000)
        try:
            await ranker.rank("q", ["a", "b"], ["", ""])
        finally:
            await ranker.close()

    async def limits(url: str) -> None:
        client = AsyncScoringClient(TritonConnection(url), 3000)
        try:
            assert await client.served_limits("student", 3000) == {}  # an answer that names none
        except ScoringFailure as problem:
            assert str(problem)
        finally:
            await client.close()

    with answering(BROKEN_ANSWERS[name]) as address:
        for url in (f"http://{address}", f"grpc://{address}"):
            with pytest.raises(RerankError), Reranker([url], deadline_ms=3000) as ranker:
                ranker.rank("q", ["a", "b"], ["", ""])
            with pytest.raises(RerankError):
                asyncio.run(ask(url))
            asyncio.run(limits(url))


def test_a_stream_over_http_is_refused_before_anything_is_sent():
    with pytest.raises(InputError, match="streaming needs gRPC"):
        TritonConnection("http://a:1").stream_channel()


def test_titles_and_summaries_must_be_as_many():
    with Reranker(["127.0.0.1:1"]) as ranker, pytest.raises(RerankError, match="2 titles and 1 summaries") as refused:
        ranker.rank("q", ["a", "b"], ["c"])
    assert refused.value.bad_request


def test_access_settings_name_the_file_that_is_missing_and_take_the_token_of_the_environment(tmp_path, monkeypatch):
    (tmp_path / "ca.pem").touch()
    with pytest.raises(InputError, match=r"--ca .*none\.pem: no such file"):
        TritonAccess(ca=tmp_path / "none.pem").credentials()
    with pytest.raises(InputError, match="--certificate and --key belong together"):
        TritonAccess(certificate=tmp_path / "ca.pem").credentials()
    monkeypatch.setenv("DISRANKER_TOKEN", "of the environment")
    assert TritonAccess(ca=tmp_path / "ca.pem").credentials() == Credentials("of the environment", tmp_path / "ca.pem")
    (tmp_path / "token").write_text("given\n")
    assert TritonAccess(token_file=tmp_path / "token").credentials().token == "given"
    (tmp_path / "token").write_text("two words")
    with pytest.raises(InputError, match=r"--token-file .*: one token without spaces"):
        TritonAccess(token_file=tmp_path / "token").credentials()
    assert "token" not in vars(TritonAccess())  # seen: --token stood in the list of processes for everybody


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_silent_server_costs_no_more_than_the_deadline(silent, scheme):
    start = time.monotonic()
    with (
        Reranker([f"{scheme}://{silent}"], deadline_ms=500) as ranker,
        pytest.raises(RerankError, match=r"within 500 ms"),
    ):
        ranker.rank("q", ["a"], ["b"])
    assert time.monotonic() - start < 30  # far above the deadline, for a busy machine, and far below for ever

    async def ask() -> None:
        async with AsyncReranker([f"{scheme}://{silent}"], deadline_ms=500) as ranker:
            await ranker.rank("q", ["a"], ["b"])

    start = time.monotonic()
    with pytest.raises(RerankError, match=r"within 500 ms"):
        asyncio.run(ask())
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_every_url_is_tried_and_named(silent, scheme):
    """Seen: over HTTP a silent server took the whole deadline, and no other was tried."""
    with (
        Reranker([f"{scheme}://{silent}", "http://127.0.0.1:1", "127.0.0.1:2"], deadline_ms=4000) as ranker,
        pytest.raises(RerankError) as failed,
    ):
        ranker.rank("q", ["a"], ["b"])
    assert all(url in str(failed.value) for url in (silent, "http://127.0.0.1:1", "grpc://127.0.0.1:2"))


def test_the_token_goes_into_the_authorization_header():
    assert Credentials(token="secret").headers() == {"authorization": "Bearer secret"}
    assert Credentials().headers() == {}


def test_documents_name_their_first_bad_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"title": "a", "doc_id": 7}\n\n{"summary": "no title"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="row 3: an object with a text `title`"):
        read_documents(path)
    path.write_text('{"title": "a", "doc_id": 7, "prior": 3}\n{"title": "b", "summary": "s"}\n', encoding="utf-8")
    assert [(d["doc_id"], d["prior"]) for d in read_documents(path)] == [("7", 3), ("2", None)]
    path.write_text('{"title": "a", "prior": "high"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="row 1: `prior` is not a number"):
        read_documents(path)
    # seen: these stand in JSON as they are, and were taken for ends of lines; a file of Windows' editors begins so
    path.write_text('\ufeff{"title": "a\u2028b\u0085c"}\r\n{"title": "d"}\r\n', encoding="utf-8")
    assert [d["title"] for d in read_documents(path)] == ["a\u2028b\u0085c", "d"]
    path.write_text('{"title": "cut \\ud83d", "doc_id": "\\ud83d"}\n', encoding="utf-8")  # seen: could not be printed
    assert [(d["title"], d["doc_id"]) for d in read_documents(path)] == [("cut ?", "?")]
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(DataError, match="row 1: not JSON"):
        read_documents(path)


def test_the_command_says_in_one_line_that_no_server_is_there(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"title": "a"}\n', encoding="utf-8")
    command = [sys.executable, "clients/rerank.py", "--query", "q", "--documents", str(path), "--url", "127.0.0.1:1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "no server answered" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("status", "message", "callers_fault"),
    [
        ("StatusCode.INVALID_ARGUMENT", "1001 documents in one request; at most 1000 are served", True),
        ("400", "query is blank: it has no visible character", True),
        # as a real server says it where a model was deployed with other tensors: no caller can help that
        ("StatusCode.INVALID_ARGUMENT", "[request id: <id_unknown>] expected 3 inputs but got 2 inputs", False),
        ("400", "Request for unknown model: 'absent' is not found", False),
        ("StatusCode.UNAUTHENTICATED", "no token", False),
        ("StatusCode.UNAVAILABLE", "exceeds maximum queue size", False),
    ],
)
def test_a_wrong_page_is_told_from_a_wrong_deployment(status, message, callers_fault):
    assert _failure(InferenceServerException(message, status), 100).callers_fault is callers_fault
