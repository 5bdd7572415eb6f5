"""A server whose answers are none: cut off, no HTTP, no JSON, other sizes than it says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def _json(text: str, binary: bytes = b"") -> bytes:
    sizes = f"Inference-Header-Content-Length: {len(text)}\r\n" if binary else ""
    return f"HTTP/1.1 200 OK\r\n{sizes}Content-Length: {len(text) + len(binary)}\r\n\r\n{text}".encode() + binary


_OUTPUT = '{"model_name": "student", "outputs": [{"name": "score", "datatype": "FP32", "shape": [2], %s}]}'
BROKEN_ANSWERS = {
    "cut off": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{",
    "closed": b"",
    "no HTTP": b"\x00\x01 nonsense\r\n\r\n",
    "a page for people": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>",
    "an error page": b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>",
    "no gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "nothing in it": _json("{}"),
    "a list": _json("[]"),
    "a size beyond the end": b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: 999\r\nContent-Length: 2\r\n\r\n{}",
    "a size that is no number": b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: x\r\nContent-Length: 2\r\n\r\n{}",
    "fewer bytes than scores": _json(_OUTPUT % '"parameters": {"binary_data_size": 8}', b"\0\0"),
    "words for scores": _json(_OUTPUT % '"data": ["a", "b"]'),
}


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """host:port of a server that gives every request this answer and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    caller, _ = listener.accept()
                except OSError:  # the test is over
                    return
                with caller, suppress(OSError):  # a caller may hang up first
                    caller.recv(1 << 16)
                    caller.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
