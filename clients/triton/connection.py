"""One connection to a Triton server: URL scheme, TLS files, bearer token, deadlines; sync and asyncio, gRPC and HTTP.

    connection = TritonConnection("grpcs://search.example:8001", Credentials(token="...", ca=Path("ca.pem")))
    client = connection.async_client(deadline_ms=200)
    await client.infer(**connection.infer_arguments("student", request_tensors(...), deadline_ms=200))

clients/triton/scoring.py asks models for scores over it; the labeller opens its stream with stream_channel().
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
from numpy.typing import NDArray
from tritonclient.utils import np_to_triton_dtype

from ranking import tracing
from ranking.errors import InputError

TOKEN_VARIABLE = "DISRANKER_TOKEN"
SCHEMES = ("grpc", "grpcs", "http", "https")

# Without pings only the kernel notices that a peer vanished, after a quarter of an hour. They are sent during calls
# only, and seldom: Triton's gRPC server hangs up on the third ping within five minutes in which it had nothing to say.
_KEEPALIVE = [("grpc.keepalive_timeout_ms", 5_000), ("grpc.keepalive_permit_without_calls", 0)]
_CALL_KEEPALIVE = [("grpc.keepalive_time_ms", 10_000), *_KEEPALIVE]
_STREAM_KEEPALIVE = [("grpc.keepalive_time_ms", 120_000), *_KEEPALIVE]
_CHANNEL_OPTIONS = [
    # gRPC waits up to two minutes before it tries a lost server again; its return must be noticed at once
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel would else inherit the back-off of a dead one
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]


@dataclass(frozen=True)
class Credentials:
    """What a server may ask for. token: bearer token; ca, certificate, key: PEM files for TLS, each optional."""

    token: str | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def headers(self) -> dict[str, str]:
        """HTTP headers, or gRPC metadata, that carry the token; empty without one."""
        return {"authorization": f"Bearer {self.token}"} if self.token else {}

    def tls_context(self) -> ssl.SSLContext:
        """What an HTTP client needs for TLS with these files."""
        context = ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
        if self.certificate:
            context.load_cert_chain(self.certificate, self.key)
        return context

    def absolute(self) -> Credentials:
        """The same with absolute paths, for a process that runs in another folder."""
        ca, certificate, key = (path and path.absolute() for path in (self.ca, self.certificate, self.key))
        return Credentials(self.token, ca, certificate, key)


@dataclass(kw_only=True)
class TritonAccess:
    """Settings of every program that asks Triton; their Config inherits them, beside its own `url`.

    Args:
        token_file: file that holds the bearer token for Triton; the variable DISRANKER_TOKEN if not given. A command
            line is no place for a token: every account of the machine can read it
        ca: PEM file of the authority that signed Triton's certificates, for grpcs:// and https://
        certificate: PEM file of the certificate that this client shows to Triton
        key: PEM file of that certificate's key
    """

    token_file: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def credentials(self) -> Credentials:
        """The credentials; InputError names a file that is missing, or a certificate without its key."""
        for name in ("ca", "certificate", "key", "token_file"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise InputError(f"--{name.replace('_', '-')} {path}: no such file")
        if (self.certificate is None) != (self.key is None):
            raise InputError("--certificate and --key belong together: give both or none")
        return Credentials(self._token(), self.ca, self.certificate, self.key)

    def _token(self) -> str | None:
        if self.token_file is None:
            return os.environ.get(TOKEN_VARIABLE) or None
        return read_token(self.token_file, "--token-file")


def read_token(path: Path, flag: str) -> str:
    """The bearer token that a file holds. InputError, which names the flag that gave the file, if it holds none."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"{flag} {path}: cannot be read: {problem}") from problem
    if not token or not token.isprintable() or " " in token:
        raise InputError(f"{flag} {path}: one token without spaces is expected")
    return token


class TritonConnection:
    """The way to one server. InputError names what is wrong with the URL.

    url: scheme://host:port, scheme grpc, grpcs, http or https; without a scheme gRPC is meant.
    """

    def __init__(self, url: str, credentials: Credentials | None = None):
        parts = urlsplit(url if "://" in url else f"grpc://{url}")
        if parts.scheme not in SCHEMES:
            raise InputError(f"{url}: the scheme is grpc, grpcs, http or https")
        try:
            port = parts.port
        except ValueError as problem:
            raise InputError(f"{url}: {problem}") from problem
        if not parts.hostname or port is None:
            raise InputError(f"{url}: host and port are needed, e.g. grpc://localhost:8001")
        self.scheme, self.address = parts.scheme, parts.netloc + parts.path.rstrip("/")
        self.credentials = credentials or Credentials()

    def __str__(self) -> str:
        return f"{self.scheme}://{self.address}"

    @property
    def is_grpc(self) -> bool:
        """Whether the protocol is gRPC, with or without TLS."""
        return self.scheme.startswith("grpc")

    @property
    def is_secure(self) -> bool:
        """Whether the connection is under TLS."""
        return self.scheme.endswith("s")

    def sync_client(self, deadline_ms: float, connections: int = 1) -> Any:
        """A blocking tritonclient. Over HTTP deadline_ms is the socket's, since a request cannot have its own, and as
        many requests as there are connections can be in flight."""
        if self.is_grpc:
            import tritonclient.grpc as protocol

            return protocol.InferenceServerClient(self.address, **self._grpc_client_options())
        import tritonclient.http as http_protocol

        seconds = deadline_ms / 1000
        return http_protocol.InferenceServerClient(
            self.address,
            concurrency=connections,
            connection_timeout=seconds,
            network_timeout=seconds,
            ssl=self.is_secure,
            ssl_context_factory=self.credentials.tls_context if self.is_secure else None,
        )

    def async_client(self, deadline_ms: float) -> Any:
        """A tritonclient for asyncio; make it inside the running loop. deadline_ms: to connect, over HTTP."""
        if self.is_grpc:
            import tritonclient.grpc.aio as protocol

            return protocol.InferenceServerClient(self.address, **self._grpc_client_options())
        import tritonclient.http.aio as http_protocol

        return http_protocol.InferenceServerClient(
            self.address,
            conn_timeout=deadline_ms / 1000,
            ssl=self.is_secure,
            ssl_context=self.credentials.tls_context() if self.is_secure else None,
        )

    def stream_channel(self) -> grpc.aio.Channel:
        """A gRPC channel for asyncio, for callers that speak Triton's streaming API. InputError if the URL is HTTP."""
        if not self.is_grpc:
            raise InputError(f"{self}: streaming needs gRPC: give grpc://host:port or grpcs://host:port")
        if not self.is_secure:
            return grpc.aio.insecure_channel(self.address, options=_CHANNEL_OPTIONS + _STREAM_KEEPALIVE)
        options = _CHANNEL_OPTIONS + _STREAM_KEEPALIVE
        return grpc.aio.secure_channel(self.address, self._channel_credentials, options=options)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The gRPC metadata of each call made over stream_channel()."""
        return tuple(self.credentials.headers().items())

    def infer_inputs(self, tensors: dict[str, NDArray[Any]]) -> list[Any]:
        """tritonclient's input objects for tensors by name; they may be sent any number of times."""
        if self.is_grpc:
            import tritonclient.grpc as protocol
        else:
            import tritonclient.http as protocol
        inputs = []
        for name, values in tensors.items():
            tensor = protocol.InferInput(name, list(values.shape), np_to_triton_dtype(values.dtype))
            tensor.set_data_from_numpy(values)
            inputs.append(tensor)
        return inputs

    def infer_arguments(self, model: str, inputs: list[Any], deadline_ms: float, version: str = "") -> dict[str, Any]:
        """Keyword arguments of a client's infer(): the request with its deadline, its credentials and its trace.

        The trace goes along twice: as a header for the server's own spans, and, since models see no headers, as a
        parameter for the front model's.
        """
        traced = tracing.sampled_headers()
        return {
            "model_name": model,
            "model_version": version,
            "inputs": inputs,
            "headers": self.credentials.headers() | traced,
            **({"parameters": traced} if traced else {}),
            # microseconds: the server drops a request that is still queued at the deadline, since nobody waits for it
            "timeout": max(1, int(deadline_ms * 1000)),
            **({"client_timeout": deadline_ms / 1000} if self.is_grpc else {}),
        }

    def _grpc_client_options(self) -> dict[str, Any]:
        security = {"creds": self._channel_credentials} if self.is_secure else {}
        return {"channel_args": _CHANNEL_OPTIONS + _CALL_KEEPALIVE, **security}

    @cached_property
    def _channel_credentials(self) -> grpc.ChannelCredentials:
        given = self.credentials
        ca, key, certificate = (
            path.read_bytes() if path else None for path in (given.ca, given.key, given.certificate)
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)
