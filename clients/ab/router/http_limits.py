"""How much one caller may ask of the router: sizes, times, and how many at once."""

from __future__ import annotations

from dataclasses import dataclass

from ranking.limits import MAX_DOCUMENTS


@dataclass(kw_only=True)
class HttpLimits:
    """What a request may hold, how long it may take to arrive, and how many may be there at a time.

    Args:
        max_documents: pages with more documents are refused; a served model's own limit counts if it is lower
        max_body_mb: larger requests are refused
        max_header_kb: requests with a longer head (line and headers) are refused
        header_seconds: a connection that has not sent a whole head by then is closed
        receive_seconds: a body that is not there by then is refused; a connection is closed whose client reads less
            than 64 KiB of a waiting answer in so long
        idle_seconds: a connection is closed when no request followed an answer for so long; longer than the callers
            keep one (60 s is usual), since a request sent while it is being closed is lost
        max_in_flight: pages and events worked on at a time; beyond that a caller gets 503 at once
        max_buffered_mb: bodies held in memory while they arrive; beyond that large ones that began first get 503
        max_connections: open connections; beyond that the one is closed whose caller is longest waited for, and where
            there is none a caller gets 503, but for /health/live and /metrics
    """

    max_documents: int = MAX_DOCUMENTS
    max_body_mb: float = 4.0
    max_header_kb: float = 16.0
    header_seconds: float = 5.0
    receive_seconds: float = 10.0
    idle_seconds: float = 65.0
    max_in_flight: int = 256
    max_buffered_mb: float = 256.0
    max_connections: int = 2000

    def __post_init__(self) -> None:
        for name in (
            "max_documents", "max_body_mb", "max_header_kb", "header_seconds", "receive_seconds", "idle_seconds",
            "max_in_flight", "max_buffered_mb", "max_connections",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.max_buffered_mb < self.max_body_mb:
            raise ValueError(f"max_buffered_mb is {self.max_buffered_mb:g}: it must hold a body of max_body_mb")

    @property
    def max_values(self) -> int:
        """Commas, colons and brackets outside of texts that a body may hold: what all documents or events need."""
        return 8 * max(self.max_documents, MAX_EVENTS) + 1000


MAX_EVENTS = 1000  # in one request
