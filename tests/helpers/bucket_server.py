"""An S3 server on this machine, for tests: moto's, in this process, with one bucket; it can fail and be slow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from threading import Thread
from time import sleep

import pyarrow.fs as pafs

VARIABLES = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass
class StoreFaults:
    """What is wrong with the store. error_rate: share of requests that get a 500; delay: seconds before each answer."""

    error_rate: float = 0.0
    delay: float = 0.0
    errors: int = 0
    _draw: Random = field(default_factory=lambda: Random(7))

    def before(self, application):
        """A WSGI application with these faults."""

        def answer(environ, start_response):
            sleep(self.delay)
            if self._draw.random() >= self.error_rate:
                return application(environ, start_response)
            self.errors += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))  # else the connection is cut
            body = b"<Error><Code>InternalError</Code><Message>failed by the test</Message></Error>"
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            start_response("500 Internal Server Error", headers)
            return [body]

        return answer


@contextmanager
def bucket_server(faults: StoreFaults | None = None) -> Iterator[str]:
    """Yields `s3://bucket`; meanwhile the environment leads this process and its children there."""
    from moto.core.base_backend import BackendDict  # takes a second to import
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    class Quiet(MotoRequestHandler):
        def log_request(self, *_) -> None:
            pass

    BackendDict.reset()  # servers of one process share what they hold
    application = (faults or StoreFaults()).before(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    Thread(target=server.serve_forever, daemon=True).start()
    host, port = server.server_address[:2]
    before = {name: os.environ.get(name) for name in (*VARIABLES, "AWS_ENDPOINT_URL")}
    os.environ.update(VARIABLES | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"})
    try:
        maker = pafs.S3FileSystem(endpoint_override=f"http://{host}:{port}", allow_bucket_creation=True)
        maker.create_dir("bucket")
        yield "s3://bucket"
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        server.shutdown()
