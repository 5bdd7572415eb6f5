"""One page, from the router's answer to the batch that a decoder trains on: log, compaction, privacy gate, tokens."""

from __future__ import annotations

import httpx
import numpy as np

from clients.ab.log.compaction import compact
from clients.ab.router.local_router import start_router
from ranking.query_engine import QueryEngineSettings
from ranking.schema import read_table
from ranking.text import TeacherFormat, normalise
from tests.helpers.stub_ranker import StubRanker
from tests.helpers.tiny_teacher import LIMITS, make_tokenizer
from training.clicks.click_pairs import ClickPairSettings, write_clicks
from training.trainer.text_batches import TextBatches
from training.trainer.token_store import TokenStore

EXPERIMENT = """
default_model: baseline
experiments:
  - name: exp
    arms: [{name: baseline, model: baseline}, {name: mixed, interleave: [baseline, student]}]
"""
LISTED = 20  # people look at ten of them
ALL_USERS = {"bot_rate_quantile": 1.0, "bot_volume_quantile": 1.0}


def page(user: int, query: str, **more) -> dict:
    """A page whose documents come in another order for every user, with a snippet made for its query."""
    places = np.random.default_rng(user).permutation(LISTED)
    documents = [{"doc_id": f"d{i}", "title": f"title {i}", "summary": f"{query}: snippet {i}"} for i in places]
    return {"user_id": f"u{user}", "query": query, "documents": documents, **more}


def test_a_served_page_reaches_a_training_batch(tmp_path):
    experiment, log, data = tmp_path / "experiment.yaml", tmp_path / "log", tmp_path / "data"
    experiment.write_text(EXPERIMENT)
    salt = tmp_path / "salt"
    salt.write_text("a secret of the shop, made once")
    flags = ("--salt-file", str(salt), "--allow-forced-arm", "--deadline-ms", "20000")
    with (
        StubRanker() as ranker,
        start_router(experiment, ranker.url, log, *flags) as router,
        httpx.Client(base_url=router.url, timeout=60) as client,
    ):

        def visit(body: dict, likes: str) -> str:
            """Ask for a page and stay on one document if it is among the first ten; the page's request id."""
            answer = client.post("/rank", json=body).raise_for_status().json()
            if likes in answer["ranking"][:10]:
                about = {"request_id": answer["request_id"], "doc_id": likes}
                events = [{**about, "type": "click"}, {**about, "type": "dwell", "dwell_seconds": 60.0}]
                client.post("/events", json={"events": events}).raise_for_status()
            return answer["request_id"]

        ours = [visit(page(user, "Red  Tent"), f"d{user % 5}") for user in range(60)]
        visit(page(7, "my own rash"), "d1")
        visit(page(8, "mail jane.doe@example.org"), "d2")
        visit(page(9, "red tent", arm="mixed"), "d3")  # somebody tries the arm
    compact(log, data, QueryEngineSettings())

    events = {
        row["request_id"]: row
        for row in read_table(next((data / "events").iterdir()), "events").to_pylist()
        if row["clicked"]
    }
    followed = next(request for request in ours if request in events)
    clicked = events[followed]
    assert clicked["summary"].startswith("Red  Tent: snippet") and clicked["user_id"] != "u0"

    report = write_clicks(ClickPairSettings(events=str(data / "events"), out=tmp_path / "clicks.parquet", **ALL_USERS))
    assert report["pages"]["forced_left_out"] == 1 and report["pages"]["interleaved"] > 0
    assert report["pages"]["read"] == 63 and report["pages"]["without_exposure"] == 0
    assert report["privacy"]["rare_queries"] == 1 and report["privacy"]["personal_by_kind"] == {"EMAIL_ADDRESS": 1}
    assert set(report["position_bias"]["positions_unseen"]) >= set(range(11, LISTED + 1))
    pairs = read_table(tmp_path / "clicks.parquet", "clicks").to_pylist()
    assert {row["query"] for row in pairs} == {"red tent"}
    (pair,) = [row for row in pairs if row["doc_id"] == clicked["doc_id"]]
    assert (pair["title"], pair["summary"]) == (clicked["title"], clicked["summary"])

    tokenizer = make_tokenizer()
    text = TeacherFormat(tokenizer.backend_tokenizer, tokenizer.eos_token, LIMITS)
    encoded = text.encode(*([row[name] for row in pairs] for name in ("query", "title", "summary")))
    batches = TextBatches(
        TokenStore.of_pairs(encoded), None, batch_texts=8, forward_tokens=4096, pad_id=tokenizer.pad_token_id, seed=0
    )
    learnt = [
        tokenizer.decode(row[mask > 0])
        for batch in batches
        for forward in batch["forwards"]
        for row, mask in zip(forward["input_ids"], forward["weights"])
    ]
    assert len(learnt) == len(pairs)
    assert sum(clicked["title"] in one and normalise(clicked["summary"]) in one for one in learnt) == 1
