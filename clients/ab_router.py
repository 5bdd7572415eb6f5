"""The A/B router: ranks each page by its user's arm, always answers, and logs what was shown before the answer leaves.

    python clients/ab_router.py --experiment clients/experiments/example.yaml --log runs/ab/log --salt-file runs/salt

POST /rank, POST /events, GET /health, /health/live, /health/ready, /metrics, /docs (docs/ab-router.md); for clients of
other services POST /v1/rerank, /v2/rerank, /rerank, GET /v1/models, /info (docs/integrations.md).
PageService.rank in clients/ab/router/page_service.py is the main path; services with an HTTP server of their own call
it directly.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import signal
import ssl
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from clients.ab.router.http_app import create_app
from clients.ab.router.http_limits import HttpLimits
from clients.ab.router.http_protocol import limited_protocol
from clients.ab.router.open_files import allow_connections
from clients.ab.router.page_service import ServiceSettings, page_logger
from clients.ab.router.rerank_api import RerankSettings
from ranking.errors import InputError
from ranking.program import run
from ranking.telemetry import TelemetrySettings

logger = logging.getLogger("ab_router")

_CLOSE = (b"connection", b"close")


@dataclass(kw_only=True)
class Config(ServiceSettings, HttpLimits, RerankSettings, TelemetrySettings):
    """Rank search pages by arm of an experiment, with fallbacks, and log every exposure.

    Args:
        host: address to listen on; 0.0.0.0 to serve other machines
        port: port to listen on; 0 picks a free one and prints it
        tls_certificate: PEM file of the certificate that the router shows its callers; with it the router speaks HTTPS
        tls_key: PEM file of that certificate's key
        drain_seconds: after SIGTERM, how long `/health/ready` says 503 while every request is still answered, with
            `Connection: close`
        stop_seconds: after that, how long requests under way may take to end
    """

    host: str = "127.0.0.1"
    port: int = 8080
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    drain_seconds: float = 3.0
    stop_seconds: float = 5.0

    def __post_init__(self) -> None:
        ServiceSettings.__post_init__(self)
        HttpLimits.__post_init__(self)
        RerankSettings.__post_init__(self)
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}: a number from 0 to 65535 is needed")
        if self.drain_seconds < 0 or self.stop_seconds <= 0:
            raise ValueError("drain_seconds must be 0 or more, and stop_seconds above 0")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together: give both or none")

    def check(self) -> None:
        """Read every file and folder that a start needs. InputError names the one that is wrong."""
        super().check()
        for path in (self.tls_certificate, self.tls_key):
            if path is not None and not path.is_file():
                raise InputError(f"{path}: no such file")
        if self.tls_certificate and self.tls_key:
            try:
                ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self.tls_certificate, self.tls_key)
            except (ssl.SSLError, OSError) as problem:
                raise InputError(f"{self.tls_certificate} with {self.tls_key}: {problem}") from problem


class _Settings(uvicorn.Config):
    """uvicorn's settings with two that it lacks: in how many seconds TLS must have begun, and ended."""

    handshake_seconds = 60.0
    shutdown_seconds = 30.0

    def get_loop_factory(self) -> Callable[[], asyncio.AbstractEventLoop]:
        """Makes event loops; those of a TLS router listen with these limits."""
        make = super().get_loop_factory() or asyncio.new_event_loop

        def make_limited() -> asyncio.AbstractEventLoop:
            loop = make()
            # uvicorn lets nobody pass these on to its one call of create_server
            limited = partial(
                loop.create_server,
                ssl_handshake_timeout=self.handshake_seconds,
                ssl_shutdown_timeout=self.shutdown_seconds,
            )
            loop.create_server = limited  # type: ignore[method-assign]
            return loop

        return make_limited if self.is_ssl else make


class _Server(uvicorn.Server):
    """Says where it listens once it does: with --port 0 nobody could know. And drains before it stops.

    terminated: whether a SIGTERM ended it, which the program raises again once its last spans and log lines have left.
    """

    def __init__(self, settings: uvicorn.Config, app: FastAPI, drain_seconds: float):
        super().__init__(settings)
        self.terminated = False
        self._app, self._drain_seconds = app, drain_seconds
        self._stop_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First say that no more requests should come, then stop; a second signal stops at once."""
        self.terminated = self.terminated or sig == signal.SIGTERM
        if sig == signal.SIGTERM and self._stop_at is None and self.started:
            self._stop_at = time.monotonic() + self._drain_seconds
            self._app.state.service.draining = True
            self._close_connections()
            return
        super().handle_exit(sig, frame)
        if sig == signal.SIGTERM:
            self._captured_signals.remove(sig)  # uvicorn would raise it again at its own end

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end now. From the first signal on every answer closes its connection."""
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            self.should_exit = True
        over = await super().on_tick(counter)
        if self._stop_at is not None:
            self._close_connections()  # uvicorn makes the headers anew every second
        return over

    def _close_connections(self) -> None:
        # else requests that are sent over those that are kept open would be lost when the port closes
        if _CLOSE not in self.server_state.default_headers:
            self.server_state.default_headers = [*self.server_state.default_headers, _CLOSE]

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            logger.info("listening on %s://%s:%d", "https" if self.config.is_ssl else "http", host, port)


def main(config: Config) -> int:
    """Serve until interrupted. Returns 1 if the server could not start."""
    config.check()  # a bad file, folder or salt is one line here rather than a trace from the server
    if config.log_format == "json":
        page_logger.setLevel(logging.INFO)
    with config.telemetry("disranker-router"):
        server = _serve(config)
    if server.terminated:
        signal.raise_signal(signal.SIGTERM)
    return 0 if server.started else 1


def _serve(config: Config) -> _Server:
    # the log's thread must not wait five milliseconds, Python's default, for its turn after the disk has answered
    sys.setswitchinterval(0.0005)
    if config.api_keys is None and config.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("anybody who reaches %s may ask: give --api-keys, or let only a front end reach it", config.host)
    app = create_app(config, config, __doc__ or "", config)
    settings = _Settings(
        app,
        config.host,
        config.port,
        log_config=None,
        access_log=False,
        ws="none",
        http=limited_protocol(config, lambda: app.state.service.metrics),
        timeout_keep_alive=math.ceil(config.idle_seconds),
        log_level="warning",
        timeout_graceful_shutdown=math.ceil(config.stop_seconds),
        ssl_certfile=config.tls_certificate,
        ssl_keyfile=config.tls_key,
    )
    settings.handshake_seconds, settings.shutdown_seconds = config.header_seconds, config.receive_seconds
    allow_connections(config.max_connections)
    server = _Server(settings, app, config.drain_seconds)
    # what is loaded by now stays: off the collector's lists, it makes no collection of garbage long
    gc.collect()
    gc.freeze()
    with suppress(KeyboardInterrupt):
        server.run()
    return server


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python clients/ab_router.py --experiment clients/experiments/example.yaml --salt-file runs/salt",
    )
