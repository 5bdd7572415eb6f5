"""The router's HTTP side with no Triton behind it: bad input, fallbacks to the incoming order, reload, what is stored.

Real servers: tests/e2e/test_ab_router.py.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import resource
import signal
import socket
import ssl
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi.testclient import TestClient

from clients.ab.log.reader import ReadCounts, read_folder
from clients.ab.router.api_keys import ApiKeys, NotAuthorised
from clients.ab.router.http_app import create_app
from clients.ab.router.http_limits import HttpLimits
from clients.ab.router.local_router import start_router
from clients.ab_router import Config
from ranking.errors import InputError
from tests.helpers.collector import collector
from tests.helpers.readme import settings_of
from tests.helpers.stub_ranker import EXPERIMENT

ROOT = Path(__file__).parents[4]
PAGE = {"user_id": "u1", "query": "alpha beta", "documents": [{"doc_id": d, "title": f"t{d}"} for d in "abc"]}


KEPT = socket.socket()  # bound and never listening: nobody answers there, and nobody else can take the port
KEPT.bind(("127.0.0.1", 0))
NOBODY = f"127.0.0.1:{KEPT.getsockname()[1]}"
PATIENT = ("--log-wait-ms", "60000")  # a busy disk must not let an answer leave before its page is on it


@pytest.fixture
def start(tmp_path):
    """A function (settings) -> TestClient of a started router whose Triton is not there."""

    def make(text: str = EXPERIMENT, **settings) -> TestClient:
        (tmp_path / "e.yaml").write_text(text)
        config = Config(
            experiment=tmp_path / "e.yaml", url=NOBODY, log=tmp_path / "log", reload_seconds=0.05,
            raw_ids="salt_file" not in settings, log_wait_ms=60_000.0, **settings,
        )  # fmt: skip
        return clients.enter_context(TestClient(create_app(config, config, "the router")))

    with ExitStack() as clients:
        yield make


def test_the_command_that_help_shows_is_one_that_starts():
    """Seen: it ended in "give --salt-file FILE, or --raw-ids"."""
    shown = subprocess.run([sys.executable, "clients/ab_router.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    _, settings = settings_of(" ".join(shown.stdout.partition("example: ")[2].split()))
    assert (ROOT / settings.experiment).is_file() and settings.salt_file and not settings.raw_ids


def records(tmp_path, kind: str = "exposure") -> list[dict]:
    return [r for r in read_folder(tmp_path / "log", ReadCounts()) if r["type"] == kind]


def test_without_triton_every_page_is_answered_in_the_incoming_order_and_logged_before(start, tmp_path):
    documents = [{**document, "prior": prior} for document, prior in zip(PAGE["documents"], (3, None, 0.5))]
    page = {**PAGE, "documents": documents}
    answer = start().post("/rank", json={**page, "platform": "ios", "segments": {"country": "nz"}}).json()
    assert answer["ranking"] == ["a", "b", "c"] and answer["scores"] is None
    assert (answer["served_by"], answer["fallback"], answer["logged"]) == ("incoming", "unavailable", True)
    (record,) = records(tmp_path)
    assert record["arm"] == answer["arm"] in ("baseline", "student")
    assert record["documents"] == ["a", "b", "c"] and record["scores"] == []
    assert (record["platform"], record["segments"]) == ("ios", '{"country": "nz"}')
    assert (record["title"], record["query_length"]) == (["ta", "tb", "tc"], 10)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "Invalid JSON"),
        (b"\xff\xfe", 400, "Invalid JSON"),
        (b"[]", 422, "Input should be an object"),
        (b'{"user_id": "\\ud800", "query": "q", "documents": [{"doc_id": "a"}]}', 400, "Invalid JSON"),
        ({"user_id": None}, 422, "user_id"),
        ({"user_id": ""}, 422, "user_id: blank: no visible character"),
        ({"user_id": " \t"}, 422, "user_id"),
        ({"user_id": 7}, 422, "user_id: Input should be a valid string"),
        ({"query": "\u200b "}, 422, "query: blank: no visible character"),
        ({"documents": []}, 422, "documents: List should have at least 1 item"),
        ({"documents": [{"doc_id": "a"}, {"doc_id": "a"}]}, 422, "doc_id 'a' is given twice"),
        ({"documents": [{"doc_id": "a"}, {"title": "t"}]}, 422, "documents[1].doc_id: Field required"),
        ({"documents": [{"doc_id": str(i)} for i in range(9)]}, 422, "9 are given, 8 are allowed"),
        ({"documents": [{"doc_id": "a", "prior": "7"}]}, 422, "documents[0].prior: Input should be a valid number"),
        ({"documents": [{"doc_id": "a", "prior": 1e31}]}, 422, "documents[0].prior: Input should be less than"),
        ({"docs": []}, 422, "docs: Extra inputs are not permitted"),
        ({"arm": "student"}, 403, "--allow-forced-arm"),
        ({"documents": [{"doc_id": "a", "title": "x" * 1_100_000}]}, 413, "larger than 1048576 bytes"),
    ],
)
def test_bad_input_gets_a_4xx_with_the_field_and_the_reason(start, tmp_path, body, status, reason):
    client = start(max_documents=8, max_body_mb=1)
    content = body if isinstance(body, bytes) else json.dumps({**PAGE, **body}).encode()
    answer = client.post("/rank", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status and reason in answer.json()["detail"]
    assert not records(tmp_path)
    assert f'ab_refused_total{{status="{status}"}} 1.0' in client.get("/metrics").text


def test_a_probe_may_ask_for_the_head_alone(start):
    """Seen: 405, so that what probes with HEAD (`wget --spider`, `curl -I`, some monitors) took the router for gone."""
    client = start()
    for path in ("/health", "/health/live", "/health/ready"):
        answer = client.head(path)
        assert answer.status_code == 200 and not answer.content and int(answer.headers["content-length"]) > 0
    assert "head" not in client.get("/openapi.json").json()["paths"]["/health"]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        ({"type": "hover"}, "type"),
        ({"type": "dwell"}, "dwell_seconds belongs to type dwell"),
        ({"type": "click", "dwell_seconds": 3}, "dwell_seconds belongs to type dwell"),
        ({"type": "dwell", "dwell_seconds": -1}, "events[0].dwell_seconds"),
        ({"type": "dwell", "dwell_seconds": 1e9}, "events[0].dwell_seconds"),
        ({"doc_id": ""}, "events[0].doc_id"),
    ],
)
def test_bad_events_are_refused(start, tmp_path, event, reason):
    answer = start().post("/events", json={"events": [{"request_id": "r", "doc_id": "a", "type": "click", **event}]})
    assert answer.status_code == 422 and reason in answer.json()["detail"]
    assert not records(tmp_path, "event")


def test_a_compressed_body_is_refused_by_name(start):
    """Seen: 400, Invalid JSON, or 422 for too many values, as the compressed bytes would have it."""
    client, body = start(), gzip.compress(json.dumps(PAGE).encode())
    for path in ("/rank", "/v1/rerank"):
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        answer = client.post(path, content=body, headers=headers)
        assert answer.status_code == 415 and "content encoding is 'gzip'" in answer.json()["detail"]
    headers["content-encoding"] = "identity"
    assert client.post("/rank", content=json.dumps(PAGE), headers=headers).status_code == 200


def test_events_are_on_disk_when_they_are_accepted(start, tmp_path):
    events = [
        {"request_id": "r", "doc_id": "a", "type": "click", "timestamp": 1700000000.5},
        {"request_id": "r", "doc_id": "a", "type": "dwell", "dwell_seconds": 12},
    ]
    assert start().post("/events", json={"events": events}).json() == {"accepted": 2}
    logged = [(r["event"], r["dwell_seconds"], r["timestamp"]) for r in records(tmp_path, "event")]
    assert logged == [("click", 0.0, 1700000000.5), ("dwell", 12.0, None)]


def test_a_user_keeps_the_arm_over_restarts_and_forced_pages_are_marked(start, tmp_path):
    first, second = start(), start()
    for user in (f"user-{i}" for i in range(20)):
        arms = {client.post("/rank", json={**PAGE, "user_id": user}).json()["arm"] for client in (first, second)}
        assert len(arms) == 1
    assert first.post("/rank", json={**PAGE, "user_id": "tester"}).json()["arm"] == "student"
    assert [r["forced"] for r in records(tmp_path) if r["user_id"] == "tester"] == [True]


def test_an_arm_can_be_forced_where_the_router_allows_it(start, tmp_path):
    client = start(allow_forced_arm=True)
    for arm in ("student", "baseline"):
        assert client.post("/rank", json={**PAGE, "arm": arm}).json()["arm"] == arm
    assert client.post("/rank", json={**PAGE, "arm": "nobody"}).status_code == 422
    assert all(r["forced"] for r in records(tmp_path))


def test_a_given_request_id_is_kept_and_a_made_one_is_unique(start):
    client = start()
    assert client.post("/rank", json={**PAGE, "request_id": "mine"}).json()["request_id"] == "mine"
    assert len({client.post("/rank", json=PAGE).json()["request_id"] for _ in range(20)}) == 20


def wait_until(true, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_edits_are_taken_up_while_running_and_a_bad_one_is_told(start, tmp_path):
    client = start()
    assert 'ab_coverage{experiment="exp"} 1.0' in client.get("/metrics").text
    (tmp_path / "e.yaml").write_text(EXPERIMENT.replace("name: exp", "name: later"))
    wait_until(lambda: client.post("/rank", json=PAGE).json()["experiment"] == "later")
    # seen: the coverage of an experiment that is gone was told of for ever
    assert (
        "ab_coverage{" in client.get("/metrics").text
        and 'ab_coverage{experiment="exp"}' not in client.get("/metrics").text
    )
    (tmp_path / "e.yaml").write_text("default_model: [")
    wait_until(lambda: client.get("/health").json()["status"] == "degraded")
    assert "not YAML" in client.get("/health").json()["experiment_file_error"]
    wait_until(lambda: "ab_experiment_file_error 1.0" in client.get("/metrics").text)
    assert client.post("/rank", json=PAGE).json()["experiment"] == "later"
    (tmp_path / "e.yaml").write_text(EXPERIMENT + "kill_switch: true\n")
    wait_until(lambda: client.post("/rank", json=PAGE).json()["experiment"] == "")
    assert [r["definition"]["name"] for r in records(tmp_path, "config")] == ["exp", "later", "exp"]


def test_guardrails_ramp_down_a_failing_arm_and_the_log_says_why(start, tmp_path):
    rails = "    guardrails: {max_error_share: 0.5, min_pages: 20, ramp_factor: 0.0}\n"
    client = start(EXPERIMENT.replace("    forced", rails + "    forced"))
    for i in range(60):
        client.post("/rank", json={**PAGE, "user_id": f"user-{i}"})
    wait_until(lambda: client.get("/health").json()["experiments"]["exp"] == 0.0)
    assert "fell back" in client.get("/health").json()["ramp_downs"]["exp"]
    assert client.post("/rank", json=PAGE).json()["experiment"] == ""
    assert client.post("/rank", json={**PAGE, "user_id": "tester"}).json()["arm"] == "student"
    wait_until(lambda: [(r["arm"], r["after"]) for r in records(tmp_path, "ramp")] == [("student", 0.0)])


def test_a_killed_arm_keeps_its_users_and_is_no_breach(start, tmp_path):
    rails = "    guardrails: {max_error_share: 0.5, min_pages: 1}\n"
    text = EXPERIMENT.replace("model: student}", "model: student, killed: true}").replace(
        "    forced", rails + "    forced"
    )
    client = start(text)
    answers = [client.post("/rank", json={**PAGE, "user_id": f"user-{i}"}).json() for i in range(30)]
    time.sleep(0.2)
    assert {a["fallback"] for a in answers if a["arm"] == "student"} == {"killed"}
    assert {a["fallback"] for a in answers if a["arm"] == "baseline"} <= {"unavailable", "breaker_open"}
    assert client.get("/health").json()["experiments"] == {"exp": 1.0}


def test_stored_ids_and_queries_are_hashed_and_texts_left_out_on_request(start, tmp_path):
    (tmp_path / "salt").write_text("a secret of more than 16 bytes")
    open_arm = start().post("/rank", json=PAGE).json()["arm"]
    private = start(salt_file=tmp_path / "salt", queries="hash", log_text=False)
    page = {**PAGE, "segments": {"mail": "someone@example.org"}}
    assert private.post("/rank", json=page).json()["arm"] == open_arm  # the raw id decides
    raw = b"".join(p.read_bytes() for p in sorted((tmp_path / "log").glob("*.ablog"))[-1:])
    assert b"alpha" not in raw and b'"u1"' not in raw and b'"title"' not in raw
    # seen: with a salt, forced ids in the definition and segment values were still stored as they came
    assert b"tester" not in raw and b"someone@" not in raw and b'"forced":{"' in raw
    path = sorted((tmp_path / "log").glob("*.ablog"))[-1]
    assert path.stat().st_mode & 0o007 == 0 and (tmp_path / "log").stat().st_mode & 0o007 == 0
    assert len(records(tmp_path)[-1]["user_id"]) == 32


def test_a_log_that_cannot_be_written_costs_no_answer_and_is_told(start, monkeypatch):
    client = start()

    def full(descriptor, block):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clients.ab.log.writer.os.write", full)
    answer = client.post("/rank", json=PAGE)
    assert answer.status_code == 200 and answer.json()["logged"] is False
    event = {"request_id": "r", "doc_id": "a", "type": "click"}
    assert client.post("/events", json={"events": [event]}).status_code == 503
    health = client.get("/health").json()
    assert health["status"] == "degraded" and "No space left" in health["log_error"] and health["log_failures"] == 2


def test_with_keys_a_caller_needs_one_and_has_a_rate_of_its_own(start, tmp_path):
    """Seen: there was no authentication; whoever reached the port could ask and write into the log."""
    keys = tmp_path / "keys"
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("one", "two")}
    keys.write_text(f"# callers\nfront {digests['one']} 1\nother {digests['two']} 1000\n")
    client = start(api_keys=keys)

    def ask(key: str | None, path: str = "/rank"):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return client.post(path, json=PAGE, headers=headers)

    for key in (None, "three", digests["one"]):
        for path in ("/rank", "/events"):
            refused = ask(key, path)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    assert ask("one").status_code == 200
    refused = next(answer for answer in iter(lambda: ask("one"), None) if answer.status_code != 200)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1" and "front sends more" in refused.json()["detail"]
    assert {ask("two").status_code for _ in range(6)} == {200}
    assert client.get("/health").status_code == client.get("/metrics").status_code == 200
    assert not any(name in path.read_text() for name in ("one ", "two ") for path in [keys])

    keys.write_text("front notahash 5\n")  # a bad edit locks nobody out, and is told
    wait_until(lambda: "row 1" in client.get("/health").json()["api_keys_error"])
    assert ask("two").status_code == 200 and "ab_experiment_file_error 1.0" in client.get("/metrics").text
    keys.write_text(f"front {digests['one']} 1\n")
    wait_until(lambda: ask("two").status_code == 401)


def test_half_a_keys_file_locks_nobody_out(tmp_path):
    """Seen: a look that met the file while it was written took up the lines that were there, for a second."""
    line = "{name} {digest} 1000\n"
    lines = [line.format(name=n, digest=hashlib.sha256(n.encode()).hexdigest()) for n in ("one", "two", "three")]
    path = tmp_path / "keys"
    path.write_text("".join(lines[:2]))
    keys = ApiKeys(path)
    path.write_text(lines[0])
    keys.reload()
    assert keys.admit("Bearer two") == "two"
    path.write_text("".join(lines))
    keys.reload()
    with pytest.raises(NotAuthorised):
        keys.admit("Bearer three")
    keys.reload()
    assert keys.admit("Bearer three") == "three"


def certificate(folder: Path) -> tuple[Path, Path]:
    """(certificate, key) of 127.0.0.1, made in the folder."""
    crt, key = folder / "crt.pem", folder / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", crt, "-days", "2"]
    subprocess.run([*make, "-subj", "/CN=r", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return crt, key


def test_over_tls_and_when_stopped_not_ready_comes_before_the_end(tmp_path):
    """Seen: the router spoke no TLS; at SIGTERM it closed its port at once, and a balancer's next requests failed."""
    crt, key = certificate(tmp_path)
    (tmp_path / "e.yaml").write_text(EXPERIMENT)
    flags = ("--tls-certificate", str(crt), "--tls-key", str(key), "--drain-seconds", "120", *PATIENT)
    trusted = ssl.create_default_context(cafile=str(crt))
    with start_router(tmp_path / "e.yaml", NOBODY, tmp_path / "log", *flags) as router:
        assert router.url.startswith("https://")
        with httpx.Client(base_url=router.url, verify=trusted, timeout=30) as client:
            assert client.get("/health/ready").status_code == client.get("/health/live").status_code == 200
            router.process.terminate()
            wait_until(lambda: client.get("/health/ready").status_code == 503)
            assert client.get("/health/live").status_code == 200  # alive, and not ready
            answer = client.post("/rank", json=PAGE)
            assert answer.status_code == 200 and answer.json()["logged"] is True
            # seen: a front end's open connections were closed under the requests that it was sending over them
            assert answer.headers["connection"] == "close"
        router.process.terminate()  # once more: the drain is over
        assert router.process.wait(60) == -signal.SIGTERM


def test_the_last_spans_and_lines_leave_before_a_stopped_router_ends(tmp_path, monkeypatch):
    """Seen: SIGTERM ended the process before its telemetry did: the spans of up to five seconds were lost each time."""
    (tmp_path / "e.yaml").write_text(EXPERIMENT)
    with collector() as taken:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", taken.url)
        telling = ("--tracing", "--log-format", "json", *PATIENT)
        with start_router(tmp_path / "e.yaml", NOBODY, tmp_path / "log", *telling) as router:
            for _ in range(3):
                assert httpx.post(f"{router.url}/rank", json=PAGE, timeout=30).status_code == 200
        assert [span.name for span in taken.spans].count("POST /rank") == 3
        assert router.output.read_text().count('"page ranked"') == 3 and router.process.returncode == -signal.SIGTERM


def test_a_tls_connection_without_a_handshake_is_closed_like_one_without_a_head(tmp_path):
    """Seen: it was kept for 60 s, and counted among no connections."""
    crt, key = certificate(tmp_path)
    (tmp_path / "e.yaml").write_text(EXPERIMENT)
    flags = ("--tls-certificate", str(crt), "--tls-key", str(key), "--header-seconds", "1")
    with start_router(tmp_path / "e.yaml", NOBODY, tmp_path / "log", *flags) as router:
        address = urlsplit(router.url)
        with socket.create_connection((address.hostname, address.port), timeout=30) as silent:
            assert silent.recv(1) == b""
        trusted = ssl.create_default_context(cafile=str(crt))
        assert httpx.get(f"{router.url}/health/live", verify=trusted, timeout=30).status_code == 200


def test_over_tls_too_an_answer_that_nobody_reads_ends_its_connection(tmp_path):
    """Seen: TLS took the whole answer out of the buffer that the router watches: the idle time had to end first."""
    crt, key = certificate(tmp_path)
    (tmp_path / "e.yaml").write_text(EXPERIMENT)
    body = json.dumps({"query": "q", "return_documents": True, "documents": ["x" * 1_000_000] * 3})
    flags = ("--tls-certificate", str(crt), "--tls-key", str(key), "--receive-seconds", "2")
    trusted = ssl.create_default_context(cafile=str(crt))
    with start_router(tmp_path / "e.yaml", NOBODY, tmp_path / "log", *flags) as router, ExitStack() as callers:
        address, files = urlsplit(router.url), Path(f"/proc/{router.process.pid}/fd")
        assert httpx.post(f"{router.url}/rank", json=PAGE, verify=trusted, timeout=30).status_code == 200
        before = len(list(files.iterdir()))
        for last in ("close", "keep-alive") * 3:
            plain = socket.socket()
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plain.connect((address.hostname, address.port))
            caller = callers.enter_context(trusted.wrap_socket(plain, server_hostname=address.hostname))
            head = f"POST /v1/rerank HTTP/1.1\r\nHost: r\r\nConnection: {last}\r\nContent-Length: {len(body)}\r\n"
            caller.sendall((head + "Content-Type: application/json\r\n\r\n" + body).encode())
        assert len(list(files.iterdir())) > before
        page = f"{router.url}/metrics"
        wait_until(lambda: "ab_unread_answers_total 6.0" in httpx.get(page, verify=trusted, timeout=30).text)
        wait_until(lambda: len(list(files.iterdir())) <= before)


@pytest.mark.parametrize(("hard", "allowed", "warned"), [(4096, 2256, False), (512, 512, True)])
def test_the_limit_of_open_files_is_raised_to_what_the_connections_need(tmp_path, hard, allowed, warned):
    """Seen: of 2000 connections that --max-connections allows, the usual soft limit of 1024 files let half in."""
    (tmp_path / "e.yaml").write_text(EXPERIMENT)
    limited = ["sh", "-c", f'ulimit -Sn 256; ulimit -Hn {hard}; exec "$@"', "sh", sys.executable]
    command = [*limited, str(ROOT / "clients/ab_router.py")]
    with start_router(tmp_path / "e.yaml", NOBODY, tmp_path / "log", command=command) as router:
        assert resource.prlimit(router.process.pid, resource.RLIMIT_NOFILE) == (allowed, hard)
        assert ("files may be open" in router.output.read_text()) == warned


def test_an_idle_connection_outlives_those_that_a_front_end_keeps(tmp_path):
    """Seen: connections were closed after 5 idle seconds, and a request that met the closing got no answer."""
    assert HttpLimits().idle_seconds > 60  # what nginx and most balancers keep
    (tmp_path / "e.yaml").write_text(EXPERIMENT)
    for idle, pauses in (("60", (0, 6)), ("1", (0,))):
        with start_router(tmp_path / "e.yaml", NOBODY, tmp_path / "log", "--idle-seconds", idle) as router:
            connection = HTTPConnection(urlsplit(router.url).netloc, timeout=30)
            with closing(connection):
                for pause in pauses:
                    time.sleep(pause)
                    connection.request("GET", "/health/live")
                    with connection.getresponse() as answer:
                        assert answer.status == 200 and answer.read()
                if idle == "1":
                    assert connection.sock.recv(1) == b""  # closed when its second was over


def test_the_openapi_document_describes_bodies_and_answers(start):
    document = start().get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert {"RankRequest", "Document", "RankAnswer", "EventsRequest", "Event", "EventsAnswer"} <= schemas.keys()
    body = document["paths"]["/rank"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/RankRequest"}
    text = json.dumps(document)
    assert all(ref.split('"')[0] in schemas for ref in text.split('"#/components/schemas/')[1:])


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--experiment", "absent.yaml"], "absent.yaml: cannot be read"),
        (["--experiment", "clients/experiments/example.yaml", "--raw-ids", "--log", "README.md/l"], "write the log"),
        # seen: without a salt, which was the default, e-mail addresses as user ids lay in the log
        (["--experiment", "clients/experiments/example.yaml"], "give --salt-file FILE"),
        (["--experiment", "clients/experiments/example.yaml", "--arm-share", "1.5"], "arm_share is 1.5"),
        # seen: it listened on 4464
        (["--experiment", "clients/experiments/example.yaml", "--raw-ids", "--port", "70000"], "port is 70000"),
    ],
)
def test_a_bad_start_is_one_line_and_an_exit_code(flags, reason):
    done = subprocess.run(
        [sys.executable, "clients/ab_router.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode in (1, 2)
    assert reason in done.stderr and "Traceback" not in done.stderr


def test_a_router_beside_a_demo_that_does_not_start_is_bad_input_and_no_traceback(tmp_path):
    with pytest.raises(InputError, match=r"did not start:[^$]*absent\.yaml: cannot be read"):
        start_router(tmp_path / "absent.yaml", NOBODY, tmp_path / "log").__enter__()
