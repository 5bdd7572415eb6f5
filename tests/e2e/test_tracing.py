"""One request as one trace: router, Triton's own spans, tokenise and encode, in a collector of the test's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

from build.build_student import Config, main
from build.triton_config import ServingLimits
from clients.ab.router.local_router import LocalRouter, start_router
from serving.temporary_server import start_triton
from tests.helpers.collector import arrows, collector, picture, tree
from tests.helpers.tiny_student import make_judged, make_student

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
EXPERIMENT = "default_model: student\nexperiments: []\n"
REQUEST = "one-of-four-pages"
ROUTER, TRITON, FRONT = "disranker-router", "triton-inference-server", "disranker-student"
# (parent, span, service) of every span of the page
ARROWS = {
    ("", "POST /rank", ROUTER),
    *(("POST /rank", name, ROUTER) for name in ("receive", "assign", "infer", "log", "answer")),
    ("infer", "InferRequest", TRITON),
    ("InferRequest", "student", TRITON),
    ("student", "compute", TRITON),
    ("student", "tokenise", FRONT),
    ("student", "encode", FRONT),
    ("student", "student_encoder", TRITON),
    ("student_encoder", "compute", TRITON),
}
PAGE = {
    "user_id": "nobody's own name",
    "query": "a very private query",
    "documents": [{"doc_id": f"d{i}", "title": "night train", "summary": "moon " * i} for i in range(48)],
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("traced")
    limits = ServingLimits(max_documents=60, threads=1)
    main(
        Config(
            make_student(folder / "student", seed=1), "student", "openvino", make_judged(folder / "data"),
            repository=folder / "repository", precision="fp32", serving=limits, promote=True,
        )
    )  # fmt: skip
    return folder / "repository"


def triton_flags(address: str) -> tuple[str, ...]:
    """As docs/operations.md has them."""
    text = OPERATIONS.read_text(encoding="utf-8")
    flags = re.findall(r"--trace-config[= ](\S+)", text)
    return tuple(f"--trace-config={flag.replace('http://collector:4318', address)}" for flag in flags)


def test_a_request_is_one_trace_from_the_router_to_the_encoder(repository, tmp_path, monkeypatch, write_docs):
    (tmp_path / "e.yaml").write_text(EXPERIMENT)
    with collector() as taken:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", taken.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        flags = triton_flags(taken.url)
        assert any("opentelemetry" in flag for flag in flags)
        with start_triton(repository, *flags, environment={"DISRANKER_TRACING": "1"}) as server:
            asked = ("--deadline-ms", "20000", "--tracing", "--log-format", "json")
            with start_router(tmp_path / "e.yaml", server.grpc, tmp_path / "log", *asked) as router:
                for _ in range(3):  # the first ones meet a server that has never worked
                    answer = ask(router)
                again = ask(router, {"request_id": REQUEST}, {"traceparent": CALLER})
                assert answer.json()["served_by"] == again.json()["served_by"] == "student"
                trace = CALLER.split("-")[1]
                # Triton's exporter at times keeps the last spans until another request ends: traffic goes on
                spans = taken.wait(lambda so_far: arrows(so_far, trace) == ARROWS, meanwhile=lambda: ask(router))
            printed = router.output.read_text()
    # the caller's trace goes on, and it is told whose span its answer came from
    rows = tree(spans, trace)
    assert rows[0][1].parent == CALLER.split("-")[2]
    assert again.headers["traceparent"] == f"00-{trace}-{rows[0][1].span}-01"
    assert answer.headers["traceparent"].split("-")[1] not in ("", trace)
    inside = {one.span: one for _, one in rows}
    for _, one in rows[1:]:
        assert inside[one.parent].start <= one.start + 1_000_000
        # Triton ends its span once the answer has left, which its caller, a front model too, may have by then
        is_request = one.name == "InferRequest" or "REQUEST_END" in one.events
        assert one.end <= inside[one.parent].end + (1_000_000_000 if is_request else 1_000_000)
    said = json.dumps([one.attributes for one in spans])
    assert "private" not in said and "nobody" not in said and REQUEST in said
    line = next(one for one in map(json.loads, printed.splitlines()) if one.get("request_id") == REQUEST)
    assert line["trace_id"] == trace and line["served_by"] == "student" and "private" not in printed
    shown = picture(spans, trace)
    text = OPERATIONS.read_text(encoding="utf-8")
    if write_docs:
        OPERATIONS.write_text(re.sub(r"```trace\n.*?```", f"```trace\n{shown}\n```", text, flags=re.S), "utf-8")
    else:
        documented = re.search(r"```trace\n(.*?)\n```", text, re.S)
        assert documented and _without_times(documented[1]) == _without_times(shown)


def ask(router: LocalRouter, more: dict[str, str] | None = None, headers: dict[str, str] | None = None):
    """The page once more."""
    return httpx.post(f"{router.url}/rank", json=PAGE | (more or {}), headers=headers, timeout=60, trust_env=False)


def _without_times(shown: str) -> list[str]:
    return [re.sub(r"[-0-9.]+ +[-0-9.]+ ", "", line).strip() for line in shown.splitlines()]
