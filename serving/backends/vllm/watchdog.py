"""Ends what a dead model process leaves behind. Run by the vLLM backend as `python -I watchdog.py SERVER_PID`.

Lines on stdin: `engine PID PID ...` (vLLM's processes, whenever they are new), `bye` (an orderly end). If stdin closes with
no `bye`, the model process was killed or crashed: vLLM's processes would live on and hold their memory, and the server,
which does not notice, would let every caller wait for ever. So both are ended, and whoever runs the server sees it exit.

Standard library only: this process lives as long as the server and should stay small.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

PATIENCE_SECONDS = 10.0


def main() -> None:
    server = int(sys.argv[1])
    engine: list[int] = []
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "bye":
            return
        engine = [int(pid) for pid in rest]
    for pid in engine:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # it may be what died first
        os.kill(server, signal.SIGTERM)
        print("[vllm] the model process has died; the server is told to end", file=sys.stderr)
        time.sleep(PATIENCE_SECONDS)
        os.kill(server, signal.SIGKILL)  # it may wait for ever for answers that the dead process owes


if __name__ == "__main__":
    main()
