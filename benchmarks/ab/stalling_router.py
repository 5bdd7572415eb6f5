"""The A/B router with a disk that stands when it is told to: a file named in STALL_FILE holds the seconds of a sync.

For benchmarks/ab/soak.py, since no disk at hand stands on demand. Everything else is clients/ab_router.py.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from clients.ab_router import Config, main
from ranking.program import run

_sync = os.fdatasync


def _slow_sync(fd: Any) -> None:
    with suppress(FileNotFoundError):  # no stall now
        time.sleep(float(Path(os.environ["STALL_FILE"]).read_text() or 0))
    _sync(fd)


if __name__ == "__main__":
    os.fdatasync = _slow_sync
    run(main, Config, example="STALL_FILE=/tmp/stall python -m benchmarks.ab.stalling_router --experiment e.yaml")
