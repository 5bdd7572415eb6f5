"""Candidates and labels on s3:// (moto's server): a kill -9, errors and a slow store leave no trace there either."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from ranking.labels import read_labels
from ranking.object_store import Remote
from tests.helpers.bucket_server import StoreFaults, bucket_server

ROWS, SHARD = 1000, ("--shard-rows", "100")


@pytest.fixture(scope="module")
def faults() -> StoreFaults:
    return StoreFaults()


@pytest.fixture(scope="module")
def bucket(faults):
    with bucket_server(faults) as url:
        yield url


def test_a_kill_and_errors_of_teacher_and_store_lose_and_double_nothing(
    bucket, faults, label, stub, start_stub, write_candidates, tmp_path, monkeypatch
):
    candidates = write_candidates(ROWS)
    code, text = label.run(candidates, tmp_path / "undisturbed", "--url", stub.url, *SHARD)
    assert code == 0, text
    store, root = pafs.FileSystem.from_uri(f"{bucket}/candidates.parquet")
    with store.open_output_stream(root) as stream:
        stream.write(candidates.read_bytes())

    monkeypatch.setenv("DISRANKER_PUBLISH_SECONDS", "0.1")
    faulty = start_stub("--latency", "0.1", "--capacity", "16", "--error-rate", "0.05")
    faults.error_rate, faults.delay = 0.1, 0.02
    out, flags = f"{bucket}/labels", ("--url", faulty.url, "--in-flight", "16", *SHARD)
    process = label(f"{bucket}/candidates.parquet", out, *flags)
    until = time.monotonic() + 120
    while published(out) < 3 and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert 3 <= published(out) < ROWS // 100

    code, text = label.run(f"{bucket}/candidates.parquet", out, *flags)
    assert code == 0, text
    assert faults.errors > 5
    faults.error_rate = faults.delay = 0.0
    copy = Remote(out, tmp_path / "copy")
    copy.fetch()
    assert read_labels(copy.local).equals(read_labels(tmp_path / "undisturbed"))
    assert len(read_labels(copy.local)) == ROWS


def published(url: str) -> int:
    """Shards whose record is in the bucket."""
    store, root = pafs.FileSystem.from_uri(url)
    found = store.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    return sum(Path(each.path).match("labels-*.json") for each in found)
