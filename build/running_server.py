"""A running tritonserver in explicit control mode: load, unload, and which versions it has."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from ranking.errors import InputError

ADMIN_HEADER = "triton-grpc-protocol-admin-key"  # Triton puts its own words before the key's name
ANSWER_SECONDS = 10.0  # for every question but a load: a server that does not answer must not hold a release for ever
STILL_ALIVE = ("READY", "UNLOADING")


def read_admin_key(path: Path | None) -> str | None:
    """The key in a file of --admin-key-file; None without a file. InputError if it holds no such key."""
    if path is None:
        return None
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"--admin-key-file {path}: cannot be read: {problem}") from problem
    if not key or not key.isprintable() or set(key) & set(" ,="):
        raise InputError(f"--admin-key-file {path}: one key without spaces, commas and = is expected")
    return key


class RunningServer:
    """One server whose models are changed. Every call raises InferenceServerException if the server refuses.

    url: "host:port" of its gRPC; load_seconds: how long a load, or the last requests of an old version, may take;
    admin_key: what the server asks for before it changes anything, if it does.
    """

    def __init__(self, url: str, load_seconds: float = 300.0, admin_key: str | None = None):
        self.url, self.load_seconds = url, load_seconds
        self._headers = {ADMIN_HEADER: admin_key} if admin_key else {}

    @cached_property
    def _client(self) -> triton.InferenceServerClient:
        return triton.InferenceServerClient(self.url)

    def load(self, model: str) -> None:
        """Load what the model's config.pbtxt says now; returns once it serves."""
        self._call(self._client.load_model, model, seconds=self.load_seconds)

    def unload(self, model: str) -> None:
        """Ask the server to unload a model; it first finishes the model's requests."""
        self._call(self._client.unload_model, model, seconds=self.load_seconds)

    def is_ready(self, model: str) -> bool:
        """Whether the model serves."""
        return self._call(self._client.is_model_ready, model)

    def versions(self, model: str, *states: str) -> list[int]:
        """Versions of a model in one of these states, ascending. The files may be ahead of them."""
        models = self._call(self._client.get_model_repository_index).models
        return sorted(int(m.version) for m in models if m.name == model and m.version and m.state in states)

    def wait_until_gone(self, model: str, old: set[int]) -> None:
        """Wait until these versions have finished their requests and are unloaded. InputError after load_seconds."""
        end = time.monotonic() + self.load_seconds
        while alive := sorted(old & set(self.versions(model, *STILL_ALIVE))):
            if time.monotonic() > end:
                raise InputError(
                    f"{model} version {alive} still works on requests after {self.load_seconds:g} s; "
                    "give it more (--load-timeout-seconds)"
                )
            time.sleep(0.02)

    def _call(self, method: Callable[..., Any], *arguments: Any, seconds: float = ANSWER_SECONDS) -> Any:
        return method(*arguments, headers=self._headers, client_timeout=seconds)


def reason(problem: InferenceServerException) -> str:
    """What a server said, in one line; and what to do where it asked for a key."""
    said = " ".join(str(problem.message()).split())
    return said + " (give --admin-key-file)" if "restricted" in said else said
