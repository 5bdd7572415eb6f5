"""Whatever `POST /rank` accepts, compaction, the tables, prepare_clicks and the Triton front accept, in all Unicode.

No server is started: the router's request model and log record, the log, the compaction, the checks and the front's
validation are called as the programs call them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import HTTPException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.ab.log.compaction import compact
from clients.ab.log.writer import ExposureLog
from clients.ab.router.api import RankRequest
from clients.ab.router.http_requests import parse_body
from ranking.limits import MAX_FIELD_BYTES, MAX_ID_CHARACTERS
from ranking.query_engine import QueryEngineSettings
from ranking.schema import TABLES, read_table
from ranking.text import normalise
from ranking.visible import SEPARATORS, UNDRAWN
from training.clicks.log_tables import open_view, parquet_files
from training.clicks.normalised_queries import number_queries
from training.sources.row_readers import text_field

ROOT = Path(__file__).resolve().parents[2]

any_character = st.characters(exclude_categories=[])  # halves of surrogate pairs too
odd_character = st.sampled_from([chr(code) for first, last in SEPARATORS + UNDRAWN for code in {first, last}])
some_text = st.one_of(
    st.text(any_character, max_size=8), st.text(odd_character, max_size=4), st.text(max_size=8), st.just("boots")
)
document = st.fixed_dictionaries({"doc_id": some_text, "title": some_text, "summary": some_text})
page = st.fixed_dictionaries(
    {
        "user_id": some_text,
        "query": some_text,
        "documents": st.lists(document, min_size=1, max_size=3),
        "request_id": st.one_of(st.none(), some_text),
        "platform": some_text,
        "segments": st.dictionaries(some_text, some_text, max_size=2),
    }
)


@pytest.fixture(scope="module")
def front() -> Iterator[types.ModuleType]:
    """The file by which the Triton model reads a request, with Triton's module replaced by one that holds tensors."""
    stub: Any = types.ModuleType("triton_python_backend_utils")
    stub.get_input_tensor_by_name = lambda request, name: request[name]
    stub.TritonModelException = stub.TritonError = Exception
    sys.modules["triton_python_backend_utils"] = stub
    sys.path.insert(0, str(ROOT / "serving" / "front"))
    try:
        path = ROOT / "serving" / "front" / "request_fields.py"
        spec = importlib.util.spec_from_file_location("request_fields", path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        yield module
    finally:
        sys.path.remove(str(ROOT / "serving" / "front"))
        del sys.modules["triton_python_backend_utils"]


class Tensor:
    def __init__(self, texts: list[str]):
        self._values = np.array([text.encode("utf-8") for text in texts], object)

    def as_numpy(self) -> np.ndarray:
        return self._values


def accepted(body: dict[str, Any], escaped: bool) -> RankRequest | None:
    """The request as the router reads it from JSON, None if it is refused. escaped: \\uXXXX instead of UTF-8."""
    text = json.dumps(body, ensure_ascii=escaped)
    try:
        return parse_body(RankRequest, text.encode("utf-8", "surrogatepass"))
    except HTTPException:
        return None


def exposure(request: RankRequest, number: int) -> dict[str, Any]:
    """What the router logs of a page (PageService._exposure), with the order of the caller."""
    return {
        "request_id": request.request_id or f"made {number}", "user_id": request.user_id, "experiment": "", "arm": "",
        "served_by": "incoming", "fallback": "", "model_version": "", "latency_ms": 1.0, "query": request.query,
        "query_length": len(request.query), "platform": request.platform,
        "segments": json.dumps(request.segments, ensure_ascii=False, sort_keys=True), "forced": False,
        "documents": [d.doc_id for d in request.documents], "scores": [], "teams": [], "config": "",
        "title": [d.title for d in request.documents], "summary": [d.summary for d in request.documents],
    }  # fmt: skip


def check_every_door(requests: list[RankRequest], front: types.ModuleType) -> None:
    for request in requests:
        count = len(request.documents)
        tensors = {
            "query": Tensor([request.query]),
            "title": Tensor([d.title for d in request.documents]),
            "summary": Tensor([d.summary for d in request.documents]),
        }
        fields = front.read_fields(tensors, 1000)
        assert fields[:2] == ([request.query] * count, [d.title for d in request.documents])
        assert text_field(request.query, "query") == request.query
    with tempfile.TemporaryDirectory() as folder:
        log = ExposureLog(Path(folder) / "log")
        for number, request in enumerate(requests):
            assert log.write("exposure", exposure(request, number))
            shown = request.documents[-1].doc_id
            assert log.write(
                "event",
                {
                    "request_id": request.request_id or f"made {number}",
                    "doc_id": shown,
                    "event": "click",
                    "dwell_seconds": 0.0,
                },
            )
        log.close()
        found = compact(Path(folder) / "log", Path(folder) / "data", QueryEngineSettings())
        names = {request.request_id or f"made {number}" for number, request in enumerate(requests)}
        assert found.exposures == len(names) and not found.damaged and not found.rejected
        rows: dict[str, list[dict[str, Any]]] = {"exposures": [], "events": []}
        for table, kept in rows.items():
            for file in sorted((Path(folder) / "data" / table).glob("*.parquet")):
                kept += read_table(file, table).to_pylist()
        last = {request.request_id or f"made {number}": request for number, request in enumerate(requests)}
        assert {row["request_id"]: row["query"] for row in rows["exposures"]} == {n: r.query for n, r in last.items()}
        assert {(row["request_id"], row["doc_id"]) for row in rows["events"]} == {
            (name, document.doc_id) for name, request in last.items() for document in request.documents
        }
        limits = QueryEngineSettings(duckdb_memory_gb=1.0, duckdb_threads=1)
        with closing(limits.open_engine(Path(folder) / "spill")) as engine:
            table = TABLES["events"]
            files = parquet_files(str(Path(folder) / "data" / "events"))
            assert open_view(engine, "events", table, files, rejects=None) == (len(rows["events"]), 0)
            spellings, _ = number_queries(engine, "events")
            assert spellings == len({r.query for r in last.values()})
            numbered = engine.rows("SELECT count(*) FROM spellings")
            assert numbered == [(spellings,)]  # no accepted query is blank once it is normalised


def test_what_the_router_accepts_every_later_door_accepts(front):
    made = Counter()

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(pages=st.lists(st.tuples(page, st.booleans()), min_size=20, max_size=40))
    def check(pages: list[tuple[dict[str, Any], bool]]) -> None:
        requests = [request for body, escaped in pages if (request := accepted(body, escaped))]
        made.update(pages=len(pages), accepted=len(requests))
        if requests:
            check_every_door(requests, front)

    check()
    assert made["accepted"] > 10, made  # about one page in seven is; with none, nothing would be shown


def one(**changes: Any) -> dict[str, Any]:
    return {"user_id": "u", "query": "q", "documents": [{"doc_id": "d"}], "request_id": "r", **changes}


@pytest.mark.parametrize("blank", ["", " ", "\u200b", "\u3164", "\u2800", "\u00ad\ufe0f", "\U000e0041", "\u0000"])
def test_the_router_refuses_a_blank_query_or_id(blank):
    for body in (
        one(query=blank), one(user_id=blank), one(request_id=blank), one(documents=[{"doc_id": blank}]),
        one(segments={blank: "x"}),
    ):  # fmt: skip
        assert accepted(body, escaped=True) is None


def test_texts_at_the_limits_pass_every_door_and_longer_ones_none(front):
    for character in ("a", "é", "北", "🙂"):
        longest = character * (MAX_FIELD_BYTES // len(character.encode()))
        documents = [{"doc_id": character * MAX_ID_CHARACTERS, "title": longest, "summary": longest}]
        segments = {f"\u0001{i}".ljust(MAX_ID_CHARACTERS, "\u0001"): "\u0001" * MAX_ID_CHARACTERS for i in range(16)}
        body = one(query=longest, documents=documents, segments=segments)
        request = accepted(body, escaped=False)
        assert request is not None
        check_every_door([request], front)
        assert accepted(one(query=longest + character), escaped=False) is None
        assert accepted(one(documents=[{"doc_id": "d", "title": longest + character}]), escaped=False) is None
        with pytest.raises(ValueError, match="bytes long"):
            text_field(longest + character, "query")
        with pytest.raises(front.BadRequest, match="bytes"):
            front.decode("query", Tensor([longest + character]).as_numpy())


def test_a_null_character_inside_visible_text_is_kept_by_tables_and_a_space_to_a_model(front):
    request = accepted(one(query="a\0b", documents=[{"doc_id": "d\0"}, {"doc_id": "d"}]), escaped=True)
    assert request is not None and normalise(request.query) == "a b"
    check_every_door([request], front)
