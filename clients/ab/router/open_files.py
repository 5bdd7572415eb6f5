"""How many files the process may have open: connections count among them, and the usual limit is 1024."""

from __future__ import annotations

import logging
import resource

logger = logging.getLogger("ab_router")

OTHER_FILES = 256  # the log, Triton's connections, and callers that are being refused or have not yet spoken TLS


def allow_connections(count: int) -> None:
    """Raise the process's limit of open files as far as `count` connections need. Warns where the system forbids it.

    Without room for one more file nothing is accepted: neither a page nor the probe that asks whether all is well.
    """
    wanted = count + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        logger.warning(
            "%d files may be open, %d connections (max_connections) need %d: raise the hard limit of open files "
            "(ulimit -Hn, LimitNOFILE), or give fewer connections",
            most, count, wanted,
        )  # fmt: skip
