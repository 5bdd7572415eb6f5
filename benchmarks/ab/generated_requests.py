"""Thousands of requests made up from the router's own OpenAPI page, good ones and bad ones, against a running router.

python -m benchmarks.ab.generated_requests --requests 10000

A real tritonserver serves toy rankers behind it. What is told at the end: answers by status, requests whose answer the
page does not document, the pauses of the router's event loop, and its memory: both from the 500th request on.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from benchmarks.ab.toy_rankers import write_toy_repository
from clients.ab.router.local_router import start_router
from ranking.program import run
from serving.temporary_server import start_triton

EXPERIMENT = """
default_model: baseline
experiments:
  - {name: bench, arms: [{name: baseline, model: baseline}, {name: student, model: student}]}
"""
WARM_UP = 500  # requests before the memory is taken for the first time: caches and buffers have their size by then

_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=30)  # half surrogate pairs too
_LONG = st.builds(lambda text, times: text * times, st.text(min_size=1, max_size=3), st.integers(1000, 40_000))
_LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _TEXT, st.integers(10**30, 10**40))
_ANYTHING = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4), max_leaves=12
)


@dataclass(frozen=True)
class MadeUpRequest:
    """One request. body: None where the method takes none."""

    method: str
    path: str
    body: bytes | None
    content_type: str | None


@dataclass
class Tally:
    """What came of the requests. wrong: requests whose status the page does not document, at most ten of them."""

    requests: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def values_of(schema: dict[str, Any], page: dict[str, Any]) -> SearchStrategy[Any]:
    """Values that a schema of the OpenAPI page allows, and now and then something else in their place."""
    # about one value in forty is anything at all; hypothesis likes the ends of a range, so that neither is the one
    rarely = st.integers(0, 39)
    proper = _proper_values(schema, page)
    return rarely.flatmap(lambda draw: _ANYTHING if draw == 7 else proper)


def _plain_values(schema: dict[str, Any], page: dict[str, Any]) -> SearchStrategy[Any]:
    """Values without any surprise: what the page needs and no more, texts that differ."""
    if "$ref" in schema:
        return _plain_values(page["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], page)
    if "properties" in schema:
        wanted = schema.get("required", ())
        return st.fixed_dictionaries(
            {k: _plain_values(v, page) for k, v in schema["properties"].items() if k in wanted}
        )
    if schema.get("type") == "array":
        return st.lists(_plain_values(schema["items"], page), min_size=1, max_size=20)
    return st.sampled_from(schema["enum"]) if "enum" in schema else st.uuids().map(str)


def _proper_values(schema: dict[str, Any], page: dict[str, Any]) -> SearchStrategy[Any]:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return _proper_values(page["components"]["schemas"][name], page)
    if "anyOf" in schema:
        return st.one_of([values_of(option, page) for option in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    kind = schema.get("type")
    if kind == "string":
        return st.one_of(_TEXT, st.text("ab 1", min_size=1, max_size=8), st.text("ab 1", min_size=1, max_size=8), _LONG)
    if kind in ("number", "integer"):
        low, high = schema.get("minimum", 0), schema.get("maximum", 1e10)
        return st.one_of(st.floats(low, high), st.integers(int(low), int(high)), st.floats())
    if kind == "boolean":
        return st.booleans()
    if kind == "array":
        item = values_of(schema["items"], page)
        return st.one_of(st.lists(item, min_size=1, max_size=4), st.lists(item, max_size=12))
    if kind == "object" and "properties" in schema:
        needed = {k: values_of(v, page) for k, v in schema["properties"].items() if k in schema.get("required", ())}
        others = {k: values_of(v, page) for k, v in schema["properties"].items() if k not in needed}
        return st.fixed_dictionaries(needed, optional=others)
    if kind == "object":
        return st.dictionaries(_TEXT, values_of(schema.get("additionalProperties", {}), page), max_size=5)
    return _LEAVES


def _bodies(schema: dict[str, Any], page: dict[str, Any]) -> SearchStrategy[bytes]:
    proper = values_of(schema, page).map(lambda value: json.dumps(value).encode())
    plain = _plain_values(schema, page).map(lambda value: json.dumps(value).encode())
    cut = st.tuples(proper, st.integers(0, 400)).map(lambda pair: pair[0][: pair[1]])
    many = st.tuples(st.sampled_from([b"0,", b'"",', b"[", b'{"a":', b"{},"]), st.integers(1, 300_000)).map(
        lambda pair: b'{"user_id":"u","query":"q","documents":[' + pair[0] * pair[1] + b"0]}"
    )
    kinds = [many, *[proper] * 8, *[plain] * 5, cut, st.binary(max_size=200)]
    return st.sampled_from(range(len(kinds))).flatmap(lambda number: kinds[number])


def requests_of(page: dict[str, Any]) -> SearchStrategy[MadeUpRequest]:
    """Requests to every path and method of an OpenAPI page; seven in ten carry a body where there is one to make up."""
    with_body, without = [], []
    media = st.sampled_from(["application/json"] * 12 + ["application/json; charset=utf-8", "text/plain", "", None])
    for path, methods in page["paths"].items():
        for method, operation in methods.items():
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                body = _bodies(schema, page)
                with_body.append(st.builds(MadeUpRequest, st.just(method), st.just(path), body, media))
            else:
                without.append(st.builds(MadeUpRequest, st.just(method), st.just(path), st.none(), st.none()))
    return st.integers(0, 9).flatmap(lambda draw: st.one_of(with_body) if draw < 9 else st.one_of(without))


def send_made_up(page: dict[str, Any], client: httpx.Client, count: int, after: Callable[[Tally], None]) -> Tally:
    """Send `count` made-up requests one after the other, calling `after` after each. They are the same at every run."""
    tally = Tally()

    @seed(16)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate], print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(requests_of(page))
    def one(made: MadeUpRequest) -> None:
        headers = {} if made.content_type is None else {"content-type": made.content_type}
        try:
            answer = client.request(made.method, made.path, content=made.body, headers=headers)
            status = str(answer.status_code)
        except httpx.WriteError:  # a refused body whose rest nobody reads
            status = "closed"
        tally.requests += 1
        tally.statuses[status] += 1
        documented = {"200", "closed", *page["paths"][made.path][made.method]["responses"]}
        if status not in documented and len(tally.wrong) < 10:
            tally.wrong.append(f"{status} for {made.method} {made.path} {(made.body or b'')[:200]!r}")
        after(tally)

    one()
    return tally


@dataclass
class Config:
    """Send made-up requests to a router and see that it stays well.

    Args:
        requests: how many
        out: also write the figures here as JSON
    """

    requests: int = 10_000
    out: Path | None = None


def main(config: Config) -> int:
    """Send, measure, print. Returns 1 for an answer that is not documented, a 5xx other than 503, or a long pause."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "e.yaml").write_text(EXPERIMENT)
        repository = write_toy_repository(folder / "repository", instances=2)
        with (
            start_triton(repository) as triton,
            start_router(folder / "e.yaml", triton.grpc, folder / "log", "--deadline-ms", "1000") as router,
            httpx.Client(base_url=router.url, timeout=60, trust_env=False) as client,
        ):
            process = psutil.Process(router.process.pid)
            memory: dict[str, float] = {}
            pauses: dict[str, int] = {}

            def watch(tally: Tally) -> None:
                if tally.requests == WARM_UP:
                    memory["before"] = process.memory_info().rss / (1 << 20)
                    pauses.update(_long_pauses(client))

            page = client.get("/openapi.json").json()
            tally = send_made_up(page, client, config.requests, watch)
            time.sleep(2)
            memory["after"] = process.memory_info().rss / (1 << 20)
            pauses = {limit: count - pauses.get(limit, 0) for limit, count in _long_pauses(client).items()}
    figures = {**asdict(tally), "statuses": dict(sorted(tally.statuses.items())), "memory_mib": memory}
    figures["pauses_longer_than"] = pauses
    print(json.dumps(figures, indent=2))
    if config.out:
        config.out.write_text(json.dumps(figures, indent=2) + "\n")
    failed = [status for status in tally.statuses if status.startswith("5") and status != "503"]
    return 1 if tally.wrong or failed or pauses["50 ms"] else 0


def _long_pauses(client: httpx.Client) -> dict[str, int]:
    """How many pauses of the router's event loop were longer than each limit so far."""
    text = client.get("/metrics").text
    buckets = dict(re.findall(r'^ab_loop_pause_seconds_bucket{le="(\S+)"} (\S+)', text, re.M))
    return {f"{float(le) * 1000:g} ms": int(float(buckets["+Inf"]) - float(buckets[le])) for le in ("0.025", "0.05")}


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.ab.generated_requests --requests 10000")
