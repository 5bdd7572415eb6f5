"""deploy/nginx.conf in a real nginx before a real tritonserver: what is let through, and what is not."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest
import tritonclient.grpc as triton
import yaml
from tritonclient.utils import InferenceServerException

from benchmarks.ab.toy_rankers import write_toy_repository
from build import running_server
from build.releases import reload
from build.running_server import ADMIN_HEADER, RunningServer, read_admin_key
from clients.triton.reranker import Reranker
from ranking.errors import InputError
from serving.temporary_server import TritonServer, free_ports, start_triton

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef"
pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx (apt: nginx-light)")


@dataclass
class Served:
    """A guarded server behind the balancer. http, grpc: of the balancer; key_file: what releases.py is given."""

    server: TritonServer
    http: str
    grpc: str
    key_file: Path


def guards() -> list[str]:
    """The students' flags against strangers, as compose.yaml's shell makes them of the key."""
    script = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["students-1"]["command"][2]
    (words,) = re.findall(r'GUARDED="([\w,:-]+)=\$\$KEY"', script)
    flags = re.findall(r"(--(?:http|grpc)-restricted-\w+)=\$\$GUARDED", script)
    assert len(flags) == 2
    return [f"{flag}={words}={KEY}" for flag in flags]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("balancer")
    repository = write_toy_repository(folder / "repository")
    (folder / "key").write_text(KEY + "\n")
    with (
        start_triton(repository, "--model-control-mode=explicit", "--load-model=*", *guards()) as server,
        socket.socket() as kept,  # the second replica is gone: nobody listens there, and nobody else can
    ):
        kept.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{kept.getsockname()[1]}"
        replaced = {
            "students-1:8000": server.http, "students-1:8001": server.grpc,
            "students-2:8000": dead, "students-2:8001": dead,
        }  # fmt: skip
        with balancer(replaced) as (http, grpc):
            yield Served(server, http, grpc, folder / "key")


@contextmanager
def balancer(replaced: dict[str, str]) -> Iterator[tuple[str, str]]:
    """nginx with deploy/nginx.conf, its upstreams replaced, as an account without rights: its HTTP and gRPC address."""
    identity = {"user": 65534, "group": 65534} if os.getuid() == 0 else {}
    http, grpc = free_ports(2)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="balancer-") as name:  # pytest's folders are closed to others
        folder = Path(name)
        folder.chmod(0o777)
        text = (ROOT / "deploy" / "nginx.conf").read_text()
        own = {"listen 8000;": f"listen 127.0.0.1:{http};", "listen 8001 http2;": f"listen 127.0.0.1:{grpc} http2;"}
        for old, new in (replaced | own | {"/tmp/": f"{folder}/"}).items():
            assert old in text, old
            text = text.replace(old, new)
        (folder / "nginx.conf").write_text(text)
        command = ["nginx", "-c", f"{folder}/nginx.conf", "-e", "stderr"]
        checked = subprocess.run([*command, "-t"], capture_output=True, text=True, **identity)
        assert checked.returncode == 0 and "test is successful" in checked.stderr, checked.stderr
        with (folder / "log").open("wb") as stream:
            process = subprocess.Popen([*command, "-g", "daemon off;"], stderr=stream, **identity)
        try:
            for port in (http, grpc):
                deadline = time.monotonic() + 60
                while socket.socket().connect_ex(("127.0.0.1", port)):
                    assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                    time.sleep(0.02)
            yield f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        finally:
            process.terminate()
            process.wait(60)


def status_of(call: Callable[[], object]) -> str:
    with pytest.raises(InferenceServerException) as refused:
        call()
    return f"{refused.value.status()} {refused.value.message()}"


def test_clients_rank_through_the_balancer_although_a_replica_is_gone(served):
    for url in (f"grpc://{served.grpc}", f"http://{served.http}"):
        with Reranker([url], deadline_ms=60_000) as ranker:
            for _ in range(6):
                assert list(ranker.rank("a", ["b", "a a"], ["a", "b"]).scores) == [1, 0], url
    with triton.InferenceServerClient(served.grpc) as client:
        assert client.get_model_config("student").config.name == "student"  # which limits a page has, the router asks
        assert client.is_model_ready("student") and client.get_model_metadata("student").name == "student"
    for path in (
        "/v2",
        "/v2/health/ready",
        "/v2/models/student",
        "/v2/models/student/ready",
        "/v2/models/student/config",
    ):
        assert httpx.get(f"http://{served.http}{path}", timeout=30).status_code == 200, path


@pytest.mark.parametrize(
    "method, path",
    [
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/student/unload"),
        ("POST", "/v2/repository/models/student/load"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("POST", "/v2/systemsharedmemory/region/r/register"),
        ("POST", "/v2/cudasharedmemory/region/r/register"),
        ("GET", "/v2/logging"),
        ("POST", "/v2/logging"),
        ("POST", "/v2/trace/setting"),
        ("POST", "/v2/models/student/trace/setting"),
        ("GET", "/v2/models/stats"),
        ("POST", "/v2/models/student/generate"),
        ("GET", "/metrics"),
        ("POST", "/v2/models/student"),
        ("GET", "/v2/models/student/infer"),
        # paths that one server tidies up and the other does not
        ("POST", "/v2/models/student/infer/../../../repository/index"),
        ("POST", "/v2/models/student/infer/%2e%2e/%2e%2e/%2e%2e/repository/index"),
        ("POST", "//v2/repository/index"),
        ("POST", "/v2/repository/index#/v2/models/student/infer"),
        ("POST", "/v2/repository/index?/v2/models/student/infer"),
        ("POST", "http://127.0.0.1/v2/repository/index"),
    ],
)
def test_everything_else_over_http_is_refused_as_it_was_written(served, method, path):
    """Seen: the balancer sent on whatever came."""
    host, port = served.http.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as caller:
        caller.sendall(
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nAdmin-Key: {KEY}\r\nConnection: close\r\n"
            "Content-Length: 2\r\n\r\n{}".encode()
        )
        answer = caller.makefile("rb").readline()
    assert answer.split()[1] in (b"403", b"400"), answer
    assert served.server.model_is_ready("student")


def test_everything_else_over_grpc_is_refused_with_and_without_the_key(served):
    for headers in ({}, {ADMIN_HEADER: KEY}):
        with triton.InferenceServerClient(served.grpc) as client:
            for call in (
                partial(client.get_model_repository_index, headers=headers),
                partial(client.unload_model, "student", headers=headers),
                partial(client.get_system_shared_memory_status, headers=headers),
                partial(client.register_system_shared_memory, "r", "/r", 8, headers=headers),
                partial(client.get_log_settings, headers=headers),
                partial(client.update_trace_settings, headers=headers),
                partial(client.get_inference_statistics, headers=headers),
            ):
                assert "PERMISSION_DENIED" in status_of(call)
    assert served.server.model_is_ready("student")


def test_the_server_itself_changes_nothing_without_the_key(served):
    """Seen: whoever reached a replica could load and unload models, map memory, and write log files where he liked."""
    with triton.InferenceServerClient(served.server.grpc) as client:
        for headers in ({}, {ADMIN_HEADER: "wrong"}, {"admin-key": KEY}):
            for call in (
                partial(client.get_model_repository_index, headers=headers),
                partial(client.unload_model, "student", headers=headers),
                partial(client.get_system_shared_memory_status, headers=headers),
                partial(client.update_log_settings, {"log_file": "/tmp/x"}, headers=headers),
                partial(client.get_trace_settings, headers=headers),
            ):
                assert "restricted" in status_of(call)
    for path in ("repository/index", "repository/models/student/unload", "logging"):
        assert httpx.post(f"http://{served.server.http}/v2/{path}", json={}, timeout=30).status_code == 403
    index = f"http://{served.server.http}/v2/repository/index"
    assert httpx.post(index, json={}, headers={"admin-key": KEY}, timeout=30).status_code == 200
    assert served.server.model_is_ready("student")


def test_releases_has_the_key_and_is_obeyed(served, tmp_path):
    without = RunningServer(served.server.grpc)
    with pytest.raises(InputError, match=r"baseline does not load anew on .*restricted.*--admin-key-file"):
        reload(tmp_path, "baseline", [without])
    server = RunningServer(served.server.grpc, admin_key=read_admin_key(served.key_file))
    server.unload("baseline")
    server.wait_until_gone("baseline", {1})
    assert not server.is_ready("baseline") and server.versions("student", "READY") == [1]
    server.load("baseline")
    assert server.is_ready("baseline")
    for content in ("", "two words", "a,b", "a=b"):
        (tmp_path / "key").write_text(content)
        with pytest.raises(InputError, match="one key without spaces"):
            read_admin_key(tmp_path / "key")


def test_a_server_that_does_not_answer_holds_no_release_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(running_server, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = RunningServer(f"127.0.0.1:{silent.getsockname()[1]}")
        assert "DEADLINE_EXCEEDED" in status_of(lambda: server.versions("student", "READY"))
