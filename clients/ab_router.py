"""The A/B router: ranks each page by its user's arm, always answers, and logs what was shown before the answer leaves.

    python clients/ab_router.py --experiment clients/experiments/example.yaml --url 127.0.0.1:8001 --log runs/ab/log

POST /rank, POST /events, GET /health, GET /metrics, GET /docs (docs/ab-router.md). PageService.rank in
clients/ab/router/page_service.py is the main path; services with an HTTP server of their own call it directly.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from dataclasses import dataclass

import uvicorn

from clients.ab.router.http_app import HttpLimits, create_app
from clients.ab.router.page_service import ServiceSettings
from ranking.program import run

logger = logging.getLogger("ab_router")


@dataclass(kw_only=True)
class Config(ServiceSettings, HttpLimits):
    """Rank search pages by arm of an experiment, with fallbacks, and log every exposure.

    Args:
        host: address to listen on; 0.0.0.0 to serve other machines
        port: port to listen on; 0 picks a free one and prints it
    """

    host: str = "127.0.0.1"
    port: int = 8080

    def __post_init__(self) -> None:
        ServiceSettings.__post_init__(self)
        HttpLimits.__post_init__(self)


class _Server(uvicorn.Server):
    """Says where it listens once it does: with --port 0 nobody could know."""

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            logger.info("listening on http://%s:%d", host, port)


def main(config: Config) -> int:
    """Serve until interrupted. Returns 1 if the server could not start."""
    config.check()  # a bad file, folder or salt is one line here rather than a trace from the server
    # the log's thread must not wait five milliseconds, Python's default, for its turn after the disk has answered
    sys.setswitchinterval(0.0005)
    settings = uvicorn.Config(
        create_app(config, config, __doc__ or ""),
        config.host,
        config.port,
        log_config=None,
        access_log=False,
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=10,
    )
    server = _Server(settings)
    with suppress(KeyboardInterrupt):
        server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    run(main, Config, example="python clients/ab_router.py --experiment clients/experiments/example.yaml")
