"""The rerank client against a server that speaks TLS and one that stands behind a token, as a proxy would have it."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from clients.triton.connection import Credentials
from clients.triton.reranker import AsyncReranker, Reranker, RerankError
from serving.local_server import start_triton

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


def test_grpc_over_tls_needs_the_right_authority(certificate, tmp_path):
    version = tmp_path / "repository" / "student" / "1"
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
    with start_triton(tmp_path / "repository", *flags) as server:
        url, trusted = f"grpcs://{server.grpc}", Credentials(ca=crt)

        async def ask():
            async with AsyncReranker([url], deadline_ms=20000, credentials=trusted) as ranker:
                return await ranker.rank("q", ["a", "bbb"], ["", ""])

        with Reranker([url], deadline_ms=20000, credentials=trusted) as ranker:
            ranking = ranker.rank("q", ["a", "bbb"], ["", ""])
        assert list(ranking.order) == list(asyncio.run(ask()).order) == [1, 0]
        for other, credentials in ((url, Credentials()), (f"grpc://{server.grpc}", Credentials())):
            with Reranker([other], deadline_ms=3000, credentials=credentials) as ranker, pytest.raises(RerankError):
                ranker.rank("q", ["a"], [""])


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
            Reranker([url, url], deadline_ms=5000, credentials=Credentials(token="secret")) as ranker,
            pytest.raises(RerankError) as refused,
        ):
            ranker.rank("q", ["a"], [""])
    finally:
        gate.shutdown()
        gate.server_close()
    assert seen == ["Bearer secret"] and refused.value.bad_request
