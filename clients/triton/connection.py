"""How a light client reaches Triton: URL schemes, TLS files, a bearer token; sync and asyncio, gRPC and HTTP."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ranking.errors import InputError

Scheme = Literal["grpc", "grpcs", "http", "https"]


@dataclass(frozen=True)
class Connection:
    """How to reach the servers.

    token: sent as `authorization: Bearer ...`; ca, certificate, key: PEM files for TLS (grpcs, https), each optional.
    """

    token: str | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"} if self.token else {}


def split_url(url: str) -> tuple[Scheme, str]:
    """("grpc", "host:port") of a URL. InputError names what is wrong with it."""
    parts = urlsplit(url if "://" in url else f"grpc://{url}")
    if parts.scheme not in ("grpc", "grpcs", "http", "https"):
        raise InputError(f"{url}: the scheme is grpc, grpcs, http or https")
    if not parts.hostname or parts.port is None:
        raise InputError(f"{url}: host and port are needed, e.g. grpc://localhost:8001")
    return parts.scheme, parts.netloc + parts.path.rstrip("/")  # type: ignore[return-value]


def sync_client(scheme: Scheme, address: str, deadline: float, connection: Connection):
    if scheme in ("grpc", "grpcs"):
        import tritonclient.grpc as grpc_protocol

        return grpc_protocol.InferenceServerClient(address, **_grpc_options(scheme, connection))
    import tritonclient.http as http_protocol

    tls = scheme == "https"
    return http_protocol.InferenceServerClient(
        address,
        connection_timeout=deadline,
        network_timeout=deadline,
        ssl=tls,
        ssl_context_factory=(lambda: _tls_context(connection)) if tls else None,
    )


def async_client(scheme: Scheme, address: str, deadline: float, connection: Connection):
    if scheme in ("grpc", "grpcs"):
        import tritonclient.grpc.aio as grpc_protocol

        return grpc_protocol.InferenceServerClient(address, **_grpc_options(scheme, connection))
    import tritonclient.http.aio as http_protocol

    tls = scheme == "https"
    return http_protocol.InferenceServerClient(
        address, conn_timeout=deadline, ssl=tls, ssl_context=_tls_context(connection) if tls else None
    )


def _grpc_options(scheme: Scheme, connection: Connection) -> dict[str, Any]:
    if scheme == "grpc":
        return {}
    paths = {
        "root_certificates": connection.ca,
        "private_key": connection.key,
        "certificate_chain": connection.certificate,
    }
    return {"ssl": True, **{name: str(path) for name, path in paths.items() if path}}


def _tls_context(connection: Connection):
    context = ssl.create_default_context(cafile=str(connection.ca) if connection.ca else None)
    if connection.certificate:
        context.load_cert_chain(connection.certificate, connection.key)
    return context
