"""The router's rerank paths: forms, users, errors, log. Unmodified clients: tests/e2e/test_rerank_clients.py."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import ExitStack

import pytest
from fastapi.testclient import TestClient

from clients.ab.log.reader import ReadCounts, read_folder
from clients.ab.router.http_app import create_app
from clients.ab.router.rerank_api import RerankRequest, cohere_answer, document_id, reranked
from clients.ab_router import Config
from tests.helpers.stub_ranker import EXPERIMENT, StubRanker

TEXTS = ["first text", "second text", "third text"]
PATHS = ["/v1/rerank", "/v2/rerank", "/rerank"]


@pytest.fixture(scope="module")
def ranker():
    with StubRanker() as stub:
        yield stub


@pytest.fixture
def start(tmp_path, ranker):
    """A function (settings) -> TestClient of a started router; its models give the documents the scores 0, 1, 2."""

    def make(url: str = ranker.url, **settings) -> TestClient:
        (tmp_path / "e.yaml").write_text(EXPERIMENT)
        config = Config(
            experiment=tmp_path / "e.yaml", url=url, log=tmp_path / "log", raw_ids=True, deadline_ms=20_000,
            log_wait_ms=60_000, **settings,
        )  # fmt: skip
        return clients.enter_context(TestClient(create_app(config, config, "the router", config)))

    with ExitStack() as clients:
        yield make


def records(tmp_path) -> list[dict]:
    return [r for r in read_folder(tmp_path / "log", ReadCounts()) if r["type"] == "exposure"]


def logistic(score: float) -> float:
    return 1 / (1 + math.exp(-score))


@pytest.mark.parametrize("version", ["1", "2"])
def test_coheres_form_best_first_with_scores_in_0_to_1(start, tmp_path, version):
    body = {"model": "rerank-v3.5", "query": "alpha", "documents": TEXTS, "top_n": 2, "max_tokens_per_doc": 4096}
    answer = start().post(f"/v{version}/rerank", json=body).json()
    assert [(r["index"], r["relevance_score"]) for r in answer["results"]] == [
        (2, pytest.approx(logistic(2))), (1, pytest.approx(logistic(1)))
    ]  # fmt: skip
    assert answer["meta"]["api_version"] == {"version": version} and "document" not in answer["results"][0]
    (record,) = records(tmp_path)
    assert record["request_id"] == answer["id"] and record["scores"] == [2, 1, 0]  # logged whole, and raw
    assert record["documents"][:2] == [r["doc_id"] for r in answer["results"]]


def test_jinas_form_gives_documents_back_as_they_came(start):
    documents = ["plain", {"text": "of an object", "page": 7}, {"title": "T", "summary": "S", "id": 12}]
    body = {"model": "jina-reranker-v2", "query": {"text": "alpha"}, "documents": documents, "return_documents": True}
    answer = start().post("/v1/rerank", json=body).json()
    assert [r["document"] for r in answer["results"]] == [documents[2], documents[1], {"text": "plain"}]
    assert answer["results"][0]["doc_id"] == "12"


@pytest.mark.parametrize("value", ["NaN", "-Infinity", '[{"deep": 1e999}]'])
def test_a_document_that_json_cannot_give_back_is_refused(start, value):
    """Seen: NaN in a field came back as NaN, and the answer was no JSON."""
    client, headers = start(), {"content-type": "application/json"}
    body = '{"query": "alpha", "return_documents": %s, "documents": ["a", {"text": "b", "price": ' + value + "}]}"
    answer = client.post("/v1/rerank", content=body % "true", headers=headers)
    assert answer.status_code == 422 and "documents[1]: holds NaN or Infinity" in answer.json()["detail"]
    assert client.post("/v1/rerank", content=body % "false", headers=headers).status_code == 200


def test_teis_form_is_a_bare_list_and_raw_scores_are_logits(start):
    client = start()
    body = {"query": "alpha", "texts": TEXTS, "truncate": True}
    answer = client.post("/rerank", json={**body, "return_text": True})
    assert answer.json()[0] == {"index": 2, "score": pytest.approx(logistic(2)), "text": TEXTS[2]}
    assert answer.headers["x-request-id"] and answer.headers["x-served-by"] == "baseline"
    raw = client.post("/rerank", json={**body, "raw_scores": True}).json()
    assert raw == [{"index": 2, "score": 2.0}, {"index": 1, "score": 1.0}, {"index": 0, "score": 0.0}]
    as_jina = client.post("/rerank", json={"query": "alpha", "documents": TEXTS, "raw_scores": True}).json()
    assert [r["relevance_score"] for r in as_jina["results"]] == [2, 1, 0]


def test_where_a_model_gives_probabilities_they_are_the_relevance_scores():
    request = RerankRequest(query="q", documents=TEXTS)
    page = request.page("u", "r")
    ids = [document.doc_id for document in page.documents]
    answer = {
        "request_id": "r", "ranking": ids[::-1], "scores": [4.0, 2.0, 1.0], "probabilities": [0.75, 0.5, 0.5],
        "experiment": "", "arm": "", "served_by": "student", "fallback": "", "model_version": "1", "logged": True,
    }  # fmt: skip
    told = cohere_answer(request, reranked(request, page, answer), answer, "2", "m")
    assert [entry["relevance_score"] for entry in told["results"]] == [0.75, 0.5, 0.5]
    assert [entry["index"] for entry in told["results"]] == [2, 1, 0] and told["meta"][
        "relevance_score"
    ] == "calibrated"
    raw = RerankRequest(query="q", documents=TEXTS, raw_scores=True)
    assert [entry.score for entry in reranked(raw, page, answer)] == [4.0, 2.0, 1.0]


def test_a_user_has_the_arm_that_rank_gives_him_by_header_or_body(start, tmp_path):
    client = start()
    page = {"query": "q", "documents": [{"doc_id": "a"}]}
    for user in [f"user-{i}" for i in range(12)] + ["tester", "用户1"]:
        arm = client.post("/rank", json={**page, "user_id": user}).json()["arm"]
        body = {"query": "q", "documents": TEXTS}
        by_body = client.post("/v2/rerank", json={**body, "user": user}).json()
        by_header = client.post("/v2/rerank", json=body, headers={"X-User-Id": user.encode()}).json()
        assert by_body["meta"]["arm"] == by_header["meta"]["arm"] == arm != ""
    assert {r["user_id"] for r in records(tmp_path)} >= {"tester", "用户1"}
    both = client.post("/v2/rerank", json={**body, "user": "user-1"}, headers={"x-user-id": "tester"}).json()
    assert both["meta"]["arm"] == "student"  # tester's


@pytest.mark.parametrize("user", [{}, {"user": None}, {"user": ""}, {"user": "\u200b"}])
def test_without_a_user_the_default_model_ranks_outside_the_experiment(start, tmp_path, user):
    client = start()
    answers = [client.post("/v2/rerank", json={"query": "q", "documents": TEXTS, **user}).json() for _ in range(3)]
    assert {(a["meta"]["experiment"], a["meta"]["arm"], a["meta"]["served_by"]) for a in answers} == {
        ("", "", "baseline")
    }
    logged = records(tmp_path)
    assert {(r["experiment"], r["arm"], r["config"]) for r in logged} == {("", "", "")}
    assert len({r["user_id"] for r in logged}) == 3
    assert 'experiment="exp"' not in client.get("/metrics").text.split("ab_page_seconds")[0]


def test_the_same_text_has_the_same_id_on_every_page_and_twice_on_one_page_is_allowed(start, tmp_path):
    client = start()
    for documents in (["same", "other", "same"], ["another", "same"]):
        client.post("/v2/rerank", json={"query": "q", "documents": documents})
    same = document_id("", "same")
    first, second = records(tmp_path)
    assert sorted(first["documents"]) == sorted([same, f"{same}#2", document_id("", "other")])
    assert same in second["documents"]


def test_rank_fields_choose_what_is_read(start, tmp_path):
    document = {"title": "T", "body": "B", "author": "A", "text": "not read"}
    body = {"query": "q", "documents": [document], "rank_fields": ["author", "title", "body"]}
    assert start().post("/v1/rerank", json=body).status_code == 200
    (record,) = records(tmp_path)
    assert (record["title"], record["summary"]) == (["T"], ["A\nB"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "Invalid JSON"),
        ({"query": " "}, 422, "query: blank"),
        ({"documents": []}, 422, "documents: List should have at least 1 item"),
        ({"documents": [], "texts": None}, 422, "documents"),
        ({"documents": ["a", 7]}, 422, "documents[1]: a text or an object"),
        ({"documents": ["a", {"body": "b"}]}, 422, "documents[1]: has none of title, text, summary"),
        ({"documents": [{"text": ["b"]}]}, 422, "documents[0].text: text is needed, not list"),
        ({"documents": [{"text": "b", "prior": "high"}]}, 422, "documents[0].prior"),
        ({"documents": [{"text": "b", "id": ["a"]}]}, 422, "documents[0].id: text or a whole number"),
        ({"documents": [{"text": "b", "id": 10**30}]}, 422, "documents[0].id: text or a whole number"),
        ({"documents": ["x"] * 9}, 422, "9 are given, 8 are allowed"),
        ({"top_n": 0}, 422, "top_n"),
        ({"top_n": "3"}, 422, "top_n"),
        ({"texts": ["a"]}, 422, "one list of documents is needed"),
        ({"truncation_direction": "Left"}, 422, "truncation_direction"),
        ({"query": "refuse me"}, 422, "this page is wrong"),
    ],
)
def test_errors_have_the_form_of_the_path(start, path, body, status, reason):
    content = body if isinstance(body, bytes) else json.dumps({"query": "q", "documents": TEXTS, **body}).encode()
    answer = start(max_documents=8).post(path, content=content, headers={"content-type": "application/json"})
    told = answer.json()
    name = {"/v1/rerank": "detail", "/v2/rerank": "message", "/rerank": "error"}[path]
    assert answer.status_code == status and reason in told[name]
    others = {"/v1/rerank": {"message"}, "/v2/rerank": set(), "/rerank": {"error_type"}}[path]
    assert set(told) == {name} | others
    assert told.get("error_type", "Validation") == "Validation"


def test_where_no_model_answers_the_order_stays_and_the_answer_says_so(start, tmp_path):
    client = start(url="127.0.0.1:1")
    answer = client.post("/v2/rerank", json={"query": "q", "documents": TEXTS, "user": "u"})
    told = answer.json()
    assert [(r["index"], r["relevance_score"]) for r in told["results"]] == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert told["meta"]["fallback"] and "no model ranked" in told["meta"]["warnings"][0]
    assert (answer.headers["x-served-by"], answer.headers["x-fallback"]) == ("incoming", told["meta"]["fallback"])
    assert records(tmp_path)[0]["scores"] == []


def test_keys_are_asked_for_in_each_form_and_clicks_find_their_page(start, tmp_path):
    (tmp_path / "keys").write_text(f"front {hashlib.sha256(b'one').hexdigest()} 1000\n")
    client = start(api_keys=tmp_path / "keys")
    body = {"query": "q", "documents": TEXTS, "user": "u"}
    refused = {path: client.post(path, json=body) for path in PATHS}
    assert {answer.status_code for answer in refused.values()} == {401}
    assert (
        refused["/rerank"].json()["error_type"] == "Unauthorized" and "key" in refused["/v2/rerank"].json()["message"]
    )
    assert client.get("/v1/models").status_code == client.get("/info").status_code == 401
    client.headers["authorization"] = "Bearer one"
    answer = client.post("/v2/rerank", json=body).json()
    click = {"request_id": answer["id"], "doc_id": answer["results"][0]["doc_id"], "type": "click"}
    assert client.post("/events", json={"events": [click]}).json() == {"accepted": 1}
    assert click["doc_id"] in records(tmp_path)[0]["documents"]


def test_models_and_info_say_what_scores_and_users_mean(start):
    client = start(rerank_model_name="films")
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["films"]
    info = client.get("/info").json()
    assert (info["model_id"], info["max_client_batch_size"], info["auto_truncate"]) == ("films", 1000, True)
    assert "calibrated probability" in info["relevance_score"] and info["without_user"].startswith("baseline ranks")
    assert "x-user-id" in info["user"]


def test_names_of_fields_are_limited_and_a_repeated_one_is_read_once(start):
    """Seen: 8000 times the same name joined a text of 200 kB to 1.6 GB before its length was looked at."""
    client = start()
    many = {"query": "q", "rank_fields": ["a"] * 101, "documents": [{"a": "text"}]}
    answer = client.post("/v1/rerank", json=many)
    assert answer.status_code == 422 and "at most 100 items" in answer.json()["message"]
    long = {"query": "q", "rank_fields": ["n" * 513], "documents": [{"a": "text"}]}
    assert client.post("/v1/rerank", json=long).status_code == 422
    repeated = {"query": "q", "rank_fields": ["a", "b"] * 50, "documents": [{"a": "one", "b": "two"}]}
    answer = client.post("/v1/rerank", json=repeated)
    assert answer.json()["results"][0]["doc_id"] == document_id("", "one\ntwo")


def test_equal_documents_get_ids_in_a_time_that_grows_with_their_number(monkeypatch):
    """Seen: 1000 equal documents blocked the router for half a second. Counted in ids looked up, not in seconds."""
    looked_up = []

    class Counted(set):
        def __contains__(self, doc_id: object) -> bool:
            looked_up.append(doc_id)
            return super().__contains__(doc_id)

    monkeypatch.setattr("clients.ab.router.rerank_api.set", Counted, raising=False)
    page = RerankRequest(query="q", documents=["same"] * 1000).page("u", "r")
    first = document_id("", "same")
    assert [d.doc_id for d in page.documents] == [first, *(f"{first}#{n}" for n in range(2, 1001))]
    assert 1000 <= len(looked_up) <= 3000


def test_a_copys_id_that_a_document_has_already_is_passed_over():
    documents = [{"id": doc_id, "text": "t"} for doc_id in ("a", "a#2", "a", "a", "a#2")]
    page = RerankRequest(query="q", documents=documents).page("u", "r")
    assert [d.doc_id for d in page.documents] == ["a", "a#2", "a#3", "a#4", "a#2#2"]


def test_a_header_user_is_checked_like_one_in_a_body(start):
    client = start(user_header="x-customer")
    answer = client.post("/v2/rerank", json={"query": "q", "documents": TEXTS}, headers={"x-customer": "u" * 513})
    assert answer.status_code == 422 and "header x-customer: longer than 512" in answer.json()["message"]


def test_a_callers_number_of_chunks_reaches_the_models_that_read_several(start):
    """A model that reads documents in one piece has no such input and would refuse the page."""
    with StubRanker(max_chunks=8) as stub:
        client = start(stub.url)
        for user in ("tester", ""):  # the student's, and outside the experiment the baseline's
            for path, fields in (("/v1/rerank", {"documents": TEXTS}), ("/rerank", {"texts": TEXTS})):
                body = {"query": "a", "max_chunks_per_doc": 3, **fields} | ({"user": user} if user else {})
                assert client.post(path, json=body).status_code == 200
        body = {"user_id": "tester", "query": "a", "documents": [{"doc_id": "1"}]}
        assert client.post("/rank", json=body | {"max_chunks": 2}).status_code == 200
        assert client.post("/rank", json=body).status_code == 200
        assert client.post("/rank", json=body | {"max_chunks": 0}).status_code == 422
    assert stub.chunks == [("student", 3)] * 2 + [("baseline", None)] * 2 + [("student", 2), ("student", None)]


def test_an_interleaved_page_stays_as_it_is_where_a_client_sorts_by_score():
    """Seen: each score was by the model that placed its document: clients that sort undid the interleaving."""
    request = RerankRequest(query="q", documents=TEXTS)
    page = request.page("u", "r")
    answer = {
        "ranking": [page.documents[place].doc_id for place in (1, 0, 2)], "scores": [-3.0, 4.0, 1.0],
        "probabilities": None, "served_by": "interleaved",
    }  # fmt: skip
    ranked = reranked(request, page, answer)
    assert [entry.index for entry in ranked] == [1, 0, 2]
    assert [entry.score for entry in ranked] == [pytest.approx(logistic(score)) for score in (4, 1, -3)]
    assert [entry.score for entry in reranked(request, page, answer | {"probabilities": [0.2, 0.9, 0.4]})] == [
        0.9,
        0.4,
        0.2,
    ]
