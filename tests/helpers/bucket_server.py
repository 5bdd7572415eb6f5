"""An S3 server on this machine, for tests: moto's, in this process, with one bucket."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs as pafs

VARIABLES = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def bucket_server() -> Iterator[str]:
    """Yields `s3://bucket`; meanwhile the environment leads this process and its children there."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer  # takes a second to import

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
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
        server.stop()
