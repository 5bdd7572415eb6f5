"""Rerank clients of others, unmodified, against a running router with two arms on a real tritonserver.

Requests of search engines that cannot run here are sent as their documentation writes them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from benchmarks.ab.toy_rankers import write_toy_repository
from clients.ab.log.reader import ReadCounts, read_folder
from clients.ab.router.local_router import LocalRouter, start_router
from demo.engine_page import COOKIE, Config, make_app
from ranking.schema import write_table
from serving.temporary_server import start_triton

ROOT = Path(__file__).parents[2]
KEY = "a-key-of-thirty-two-random-bytes"
# of texts the student counts query words in the summary, which is the whole text; the baseline reads titles alone
EXPERIMENT = """
default_model: student
experiments:
  - name: exp
    arms: [{name: baseline, model: baseline}, {name: student, model: student}]
    forced: {in-baseline: baseline, in-student: student}
"""
QUERY = "alpha"
TEXTS = ["beta", "alpha alpha beta", "alpha", "alpha alpha alpha"]
ORDER = [3, 1, 2, 0]  # by how often the query's word stands in a text
SCORES = [1 / (1 + 2.718281828459045**-count) for count in (3, 2, 1, 0)]


def module(name: str):
    """A client library; without it the test is left out, with the extra that has it."""
    return pytest.importorskip(name, reason='pip install "disranker[integrations]"')


@pytest.fixture(scope="module")
def router(tmp_path_factory) -> Iterator[LocalRouter]:
    folder = tmp_path_factory.mktemp("clients")
    (folder / "e.yaml").write_text(EXPERIMENT)
    (folder / "keys").write_text(f"front {hashlib.sha256(KEY.encode()).hexdigest()} 10000\n")
    flags = ("--deadline-ms", "20000", "--log-wait-ms", "60000", "--api-keys", str(folder / "keys"))
    with (
        start_triton(write_toy_repository(folder / "repository")) as triton,
        start_router(folder / "e.yaml", triton.grpc, folder / "log", *flags) as running,
    ):
        yield running


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No telemetry, no price list from the network, no proxy between a client and the router."""
    switches = {"HAYSTACK_TELEMETRY_ENABLED": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1"}
    for name, value in {**switches, "LANGSMITH_TRACING": "false"}.items():
        monkeypatch.setenv(name, value)


def pages(router: LocalRouter) -> list[dict]:
    return [r for r in read_folder(router.output.parent, ReadCounts()) if r["type"] == "exposure"]


def test_coheres_own_library_in_both_versions_with_users_in_both_arms(router):
    cohere = module("cohere")
    for client in (cohere.Client(KEY, base_url=router.url), cohere.ClientV2(KEY, base_url=router.url)):
        for user, order in (("in-student", ORDER), ("in-baseline", [0, 1, 2, 3])):
            answer = client.rerank(
                model="rerank-v3.5", query=QUERY, documents=TEXTS,
                request_options={"additional_headers": {"X-User-Id": user}},
            )  # fmt: skip
            assert [entry.index for entry in answer.results] == order
            page = next(p for p in pages(router) if p["request_id"] == answer.id)
            assert (page["user_id"], page["arm"], page["fallback"]) == (user, user[3:], "")
        best = client.rerank(model="rerank-v3.5", query=QUERY, documents=TEXTS, top_n=2)
        assert [entry.relevance_score for entry in best.results] == pytest.approx(SCORES[:2])


def test_coheres_library_gets_its_own_exceptions(router):
    cohere = module("cohere")
    with pytest.raises(cohere.UnauthorizedError):
        cohere.ClientV2("wrong", base_url=router.url).rerank(model="m", query=QUERY, documents=TEXTS)
    with pytest.raises(cohere.UnprocessableEntityError) as told:
        cohere.ClientV2(KEY, base_url=router.url).rerank(model="m", query=" ", documents=TEXTS)
    assert "query: blank" in str(told.value.body)


def test_coheres_first_version_with_objects_and_rank_fields(router):
    cohere = module("cohere")
    documents = [{"title": "alpha alpha", "body": "beta"}, {"title": "beta", "body": "alpha"}]
    answer = cohere.Client(KEY, base_url=router.url).rerank(
        model="rerank-english-v3.0", query=QUERY, documents=documents, rank_fields=["body"], return_documents=True
    )
    assert [entry.index for entry in answer.results] == [1, 0]
    assert answer.results[0].document.body == "alpha"


def test_langchain_compresses_documents(router):
    documents = module("langchain_core.documents")
    rerank = module("langchain_cohere").CohereRerank(
        model="rerank-v3.5", top_n=3, client=module("cohere").ClientV2(KEY, base_url=router.url)
    )
    given = [documents.Document(text, metadata={"place": place}) for place, text in enumerate(TEXTS)]
    found = rerank.compress_documents(given, QUERY)
    assert [document.metadata["place"] for document in found] == ORDER[:3]
    assert [document.metadata["relevance_score"] for document in found] == pytest.approx(SCORES[:3])


def test_llama_index_reranks_nodes_by_coheres_and_by_jinas_form(router):
    schema = module("llama_index.core.schema")
    nodes = [
        schema.NodeWithScore(node=schema.TextNode(text=text, id_=str(i)), score=0.0) for i, text in enumerate(TEXTS)
    ]
    cohere = module("llama_index.postprocessor.cohere_rerank").CohereRerank(
        api_key=KEY, base_url=router.url, top_n=4, max_retries=1
    )
    jina = module("llama_index.postprocessor.jinaai_rerank").JinaRerank(
        api_key=KEY, base_url=f"{router.url}/v1", top_n=4
    )
    for reranker in (cohere, jina):
        found = reranker.postprocess_nodes(nodes, query_str=QUERY)
        assert [int(node.node.node_id) for node in found] == ORDER
        assert [node.score for node in found] == pytest.approx(SCORES)


def test_haystack_ranks_documents_by_coheres_and_by_jinas_form(router):
    haystack = module("haystack")
    secret = module("haystack.utils").Secret.from_token(KEY)
    given = [haystack.Document(content=text, id=str(place)) for place, text in enumerate(TEXTS)]
    cohere = module("haystack_integrations.components.rankers.cohere").CohereRanker(
        api_key=secret, api_base_url=router.url, top_k=4
    )
    jina = module("haystack_integrations.components.rankers.jina").JinaRanker(
        api_key=secret, base_url=f"{router.url}/v1/rerank", top_k=4, score_threshold=SCORES[2] - 1e-6
    )
    assert [int(document.id) for document in cohere.run(QUERY, given)["documents"]] == ORDER
    told = jina.run(QUERY, given)
    assert [int(document.id) for document in told["documents"]] == ORDER[:3]  # the threshold leaves the last one out
    assert told["meta"]["model"] == "disranker"


@pytest.mark.parametrize("provider", ["cohere", "jina_ai", "huggingface"])
def test_litellm_reranks_by_three_providers_forms(router, provider):
    litellm = module("litellm")
    answer = litellm.rerank(
        model=f"{provider}/any-model", query=QUERY, documents=TEXTS, top_n=4, api_base=router.url, api_key=KEY
    )
    assert [entry["index"] for entry in answer.results] == ORDER
    assert [entry["relevance_score"] for entry in answer.results] == pytest.approx(SCORES)


def post(router: LocalRouter, path: str, body: dict) -> httpx.Response:
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.post(f"{router.url}{path}", json=body, headers=headers, timeout=60, trust_env=False)


def test_an_engine_retrieves_the_router_ranks_the_page_shows_and_clicks_come_back(router, tmp_path):
    module("tantivy")
    texts = {"a": ("night", "alpha"), "b": ("train", "alpha alpha"), "c": ("夜行列车", "雨"), "d": ("moon", "beta")}
    rows = [
        {"query_id": "1", "doc_id": doc_id, "query": "q", "title": title, "summary": summary}
        for doc_id, (title, summary) in texts.items()
    ]
    write_table(tmp_path / "candidates.parquet", "candidates", pa.Table.from_pylist(rows))
    (tmp_path / "key").write_text(KEY + "\n")
    config = Config(data=tmp_path, router=router.url, key_file=tmp_path / "key", deadline_ms=20_000)
    with TestClient(make_app(config)) as client:
        client.cookies.set(COOKIE, "in-student")
        answer = client.get("/search", params={"q": 'alpha AND (beta:"x'}).json()
        assert [r["doc_id"] for r in answer["results"]] == ["b", "a", "d"] and answer["ranked"]
        click = {"request_id": answer["request_id"], "doc_id": "b"}
        assert client.post("/click", json=click).json() == {"accepted": 1}
        page = next(p for p in pages(router) if p["request_id"] == answer["request_id"])
        assert (page["user_id"], page["arm"], page["documents"][0]) == ("in-student", "student", "b")
        assert client.get("/search", params={"q": "列车"}).json()["results"][0]["doc_id"] == "c"
        assert client.get("/search", params={"q": "!!!"}).json()["found"] == 0
        assert "the router ranks them" in client.get("/").text
    silent = Config(data=tmp_path, router="http://127.0.0.1:1")
    with TestClient(make_app(silent)) as client:
        told = client.get("/search", params={"q": "moon"}).json()
        assert (told["ranked"], told["results"][0]["doc_id"]) == (False, "d") and client.cookies.get(COOKIE)
        assert client.post("/click", json=click).status_code == 502


# What the engines send, by their documentation: Elasticsearch's `cohere` and `jinaai` inference services, the request
# template of its `custom` service as docs/integrations.md has it, OpenSearch's connector likewise, and TEI's clients.
RECORDED = {
    "elasticsearch cohere v1": (
        "/v1/rerank",
        {"model": "rerank-english-v3.0", "query": QUERY, "documents": TEXTS, "return_documents": True, "top_n": 4},
    ),
    "elasticsearch cohere v2": ("/v2/rerank", {"query": QUERY, "documents": TEXTS, "model": "rerank-v3.5", "top_n": 4}),
    "elasticsearch jinaai": (
        "/v1/rerank",
        {"model": "jina-reranker-v2-base-multilingual", "query": QUERY, "documents": TEXTS, "return_documents": False},
    ),
    "opensearch": ("/v1/rerank", {"documents": TEXTS, "query": QUERY, "model": "disranker", "top_n": 4}),
    "open-webui": ("/v1/rerank", {"model": "x", "query": QUERY, "documents": TEXTS, "top_n": 4}),
    "tei": ("/rerank", {"query": QUERY, "texts": TEXTS, "raw_scores": False, "return_text": False, "truncate": True}),
}


@pytest.mark.parametrize("engine", RECORDED)
def test_recorded_requests_of_search_engines_are_ranked(router, engine):
    path, body = RECORDED[engine]
    answer = post(router, path, body)
    assert answer.status_code == 200, answer.text
    results = answer.json() if engine == "tei" else answer.json()["results"]
    assert [entry["index"] for entry in results] == ORDER
    assert [entry["score" if engine == "tei" else "relevance_score"] for entry in results] == pytest.approx(SCORES)


def filled(template: str, values: dict[str, object]) -> dict:
    """The body that an engine makes of a request template: `${name}` or `${parameters.name}` by the JSON value."""

    def value(match: re.Match[str]) -> str:
        given = values[match[2]]
        quoted = template[match.start() - 1] == '"' and isinstance(given, str)
        return json.dumps(given)[1:-1] if quoted else json.dumps(given)

    return json.loads(re.sub(r"\$\{(parameters\.)?(\w+)\}", value, template))


def test_the_definitions_of_the_docs_make_requests_that_the_router_ranks(router):
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    blocks = [json.loads(block) for block in re.findall(r"```json\n(?:[A-Z]+ \S+\n)(.*?)```", page, flags=re.S)]
    custom = next(block for block in blocks if block.get("service") == "custom")["service_settings"]
    connector = next(block for block in blocks if "actions" in block)
    action = connector["actions"][0]
    asked = {
        custom["url"]: filled(custom["request"], {"query": QUERY, "input": TEXTS}),
        action["url"]: filled(
            action["request_body"], {"query": QUERY, "documents": TEXTS, "top_n": 4, **connector["parameters"]}
        ),
    }
    for url, body in asked.items():
        answer = post(router, httpx.URL(url).path, body).json()
        assert [entry["index"] for entry in answer["results"]] == ORDER
    # the paths by which Elasticsearch reads the answer
    parser = custom["response"]["json_parser"]
    assert parser == {"reranked_index": "$.results[*].index", "relevance_score": "$.results[*].relevance_score"}


def test_the_extra_pins_what_these_tests_import():
    versions = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for package in (
        "cohere", "langchain-cohere", "llama-index-postprocessor-cohere-rerank",
        "llama-index-postprocessor-jinaai-rerank", "cohere-haystack", "jina-haystack", "litellm",
    ):  # fmt: skip
        assert importlib.metadata.version(package) == versions[package]
