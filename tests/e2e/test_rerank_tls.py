"""Rerank client, router and labeller against servers that speak TLS and that ask for a token, as a proxy would
have it."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import re
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from clients.ab.router.local_router import start_router
from clients.labelling.label_ranges import find_teacher
from clients.triton.connection import Credentials, TritonConnection
from clients.triton.reranker import AsyncReranker, Reranker, RerankError
from loadtest._request_pool import RankRequest
from loadtest._targets import RequestFailed, RouterTarget, TritonTarget
from ranking.errors import InputError
from serving.temporary_server import TritonServer, start_triton

x509 = pytest.importorskip("cryptography.x509")

LENGTH_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        titles = [pb_utils.get_input_tensor_by_name(r, "title").as_numpy() for r in requests]
        scores = [np.array([len(t) for t in each], np.float32) for each in titles]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("score", s)]) for s in scores]
"""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and localhost, and its key."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "server.pem").write_bytes(made.public_bytes(pem))
    (folder / "server.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "server.pem", folder / "server.key"


@pytest.fixture(scope="module")
def length_server(certificate, tmp_path_factory) -> Iterator[TritonServer]:
    """A Triton under TLS whose model `student` scores a document by the length of its title."""
    repository = tmp_path_factory.mktemp("repository")
    version = repository / "student" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(LENGTH_MODEL, encoding="utf-8")
    (version.parent / "config.pbtxt").write_text(
        'backend: "python"\n'
        + "".join(f'input {{ name: "{n}" data_type: TYPE_STRING dims: -1 }}\n' for n in ("query", "title", "summary"))
        + 'output { name: "score" data_type: TYPE_FP32 dims: -1 }\n',
        encoding="utf-8",
    )
    crt, key = certificate
    flags = ("--grpc-use-ssl=true", f"--grpc-server-cert={crt}", f"--grpc-server-key={key}")
    with start_triton(repository, *flags) as server:
        yield server


def test_grpc_over_tls_needs_the_right_authority(certificate, length_server):
    crt, _ = certificate
    url, trusted = f"grpcs://{length_server.grpc}", Credentials(ca=crt)

    async def ask():
        async with AsyncReranker([url], deadline_ms=20000, credentials=trusted) as ranker:
            return await ranker.rank("q", ["a", "bbb"], ["", ""])

    with Reranker([url], deadline_ms=20000, credentials=trusted) as ranker:
        ranking = ranker.rank("q", ["a", "bbb"], ["", ""])
    assert list(ranking.order) == list(asyncio.run(ask()).order) == [1, 0]
    for other, credentials in ((url, Credentials()), (f"grpc://{length_server.grpc}", Credentials())):
        with Reranker([other], deadline_ms=3000, credentials=credentials) as ranker, pytest.raises(RerankError):
            ranker.rank("q", ["a"], [""])


REQUEST = RankRequest(number=0, query="q", doc_ids=["a", "b"], titles=["a", "bbb"], summaries=["", ""])


def test_the_load_test_speaks_tls_with_triton(certificate, length_server):
    crt, _ = certificate
    trusting = TritonConnection(f"grpcs://{length_server.grpc}", Credentials(ca=crt))
    assert list(TritonTarget(trusting, 20_000).send("student", REQUEST).scores) == [1, 3]
    with pytest.raises(RequestFailed):
        TritonTarget(TritonConnection(f"grpcs://{length_server.grpc}"), 3000).send("student", REQUEST)


def test_the_load_test_asks_a_router_behind_a_proxy_with_its_key(certificate):
    """Seen: it sent https:// as plain HTTP, dropped the path, and had no key to give."""
    seen: list[tuple[str, str | None]] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            seen.append((self.path, self.headers.get("authorization")))
            page = b'{"fallback": null, "served_by": "student", "ranking": ["b", "a"], "scores": [2.0, 1.0]}'
            self.send_response(200)
            self.send_header("content-length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_) -> None:
            pass

    crt, key = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(crt, key)
    proxy = HTTPServer(("127.0.0.1", 0), Proxy)
    proxy.socket = context.wrap_socket(proxy.socket, server_side=True)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        url = f"https://127.0.0.1:{proxy.server_port}/search/"
        target = RouterTarget(url, 20_000, 10, Credentials(token="secret", ca=crt))
        assert list(target.send("router", REQUEST).scores) == [1, 2]
        assert seen == [("/search/rank", "Bearer secret")]
        with pytest.raises(RequestFailed):
            RouterTarget(url, 3000, 10).send("router", REQUEST)
    finally:
        proxy.shutdown()
        proxy.server_close()
    for wrong in ("grpc://127.0.0.1:8080", "http://127.0.0.1:port", "https://"):
        with pytest.raises(InputError, match=re.escape(wrong)):
            RouterTarget(wrong, 3000, 10)


def test_the_token_reaches_a_proxy_and_a_refusal_is_not_retried():
    seen: list[str | None] = []

    class Gate(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers.get("authorization"))
            self.send_response(401)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    gate = HTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=gate.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{gate.server_port}"
        with (
            Reranker([url, url], deadline_ms=60_000, credentials=Credentials(token="secret")) as ranker,
            pytest.raises(RerankError) as refused,
        ):
            ranker.rank("q", ["a"], [""])
    finally:
        gate.shutdown()
        gate.server_close()
    assert seen == ["Bearer secret"] and refused.value.bad_request


EXPERIMENT = """
default_model: student
experiments:
  - {name: exp, arms: [{name: student, model: student}]}
"""


def test_the_router_reaches_triton_over_tls_and_only_with_the_right_authority(certificate, length_server, tmp_path):
    crt, _ = certificate
    (tmp_path / "e.yaml").write_text(EXPERIMENT, encoding="utf-8")
    body = {"user_id": "u", "query": "q", "documents": [{"doc_id": "a", "title": "x"}, {"doc_id": "b", "title": "xxx"}]}
    answers = []
    for number, flags in enumerate((["--ca", str(crt)], [])):
        log = tmp_path / f"log-{number}"
        url = f"grpcs://{length_server.grpc}"
        with start_router(tmp_path / "e.yaml", url, log, "--deadline-ms", "20000", *flags) as router:
            answers.append(httpx.post(f"{router.url}/rank", json=body, timeout=60).json())
    trusted, unknown = answers
    assert (trusted["ranking"], trusted["served_by"], trusted["fallback"]) == (["b", "a"], "student", "")
    assert (unknown["ranking"], unknown["served_by"]) == (["a", "b"], "incoming") and unknown["fallback"]


def test_the_labellers_stream_goes_over_tls_with_its_token(certificate):
    """A real gRPC server under TLS that answers only calls with the token: the labeller's own questions pass."""
    crt, key = certificate
    seen: list[str | None] = []

    class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
        async def ModelReady(self, request, context):
            seen.append(dict(context.invocation_metadata()).get("authorization"))
            if seen[-1] != "Bearer secret":
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
            return service_pb2.ModelReadyResponse(ready=True)

        async def ModelMetadata(self, request, context):
            seen.append(dict(context.invocation_metadata()).get("authorization"))
            return service_pb2.ModelMetadataResponse(name="teacher", versions=["9", "10"])

        async def ModelConfig(self, request, context):
            seen.append(dict(context.invocation_metadata()).get("authorization"))
            config = service_pb2.ModelConfigResponse()
            for name, value in (("teacher_id", "t1"), ("score_token_id", "7"), ("ranker_card", "{}")):
                config.config.parameters[name].string_value = value
            return config

    async def ask(credentials: Credentials):
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
        files = grpc.ssl_server_credentials([(key.read_bytes(), crt.read_bytes())])
        port = server.add_secure_port("127.0.0.1:0", files)
        await server.start()
        try:
            url = f"grpcs://127.0.0.1:{port}"
            return await find_teacher([url], credentials, "teacher", "decoder", wait_seconds=0.0)
        finally:
            await server.stop(None)

    teacher = asyncio.run(ask(Credentials("secret", ca=crt)))
    assert (teacher.teacher_id, teacher.version) == ("t1", "10")
    assert seen == ["Bearer secret"] * 3
    with pytest.raises(InputError, match="UNAUTHENTICATED: no token"):
        asyncio.run(ask(Credentials(ca=crt)))
    with pytest.raises(InputError, match="UNAVAILABLE"):
        asyncio.run(ask(Credentials("secret")))
