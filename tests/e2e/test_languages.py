"""Chinese, Arabic, Thai and German from a click log to a served score: click pairs, BM25, vocabulary, router, log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest

from build.build_student import Config as BuildConfig
from build.build_student import main as build_student
from build.triton_config import ServingLimits
from clients.ab.log.reader import ReadCounts, read_folder
from clients.ab.router.local_router import LocalRouter, start_router
from clients.search_page import Documents
from ranking.bm25 import bm25_scores
from ranking.limits import FieldLimits
from ranking.schema import TABLES, read_table, write_table
from ranking.text import StudentFormat
from serving.temporary_server import start_triton
from training.clicks.click_pairs import ClickPairSettings, write_clicks
from training.clicks.privacy_gate import PrivacySettings
from training.evaluation.checkpoint_scores import score_pairs
from training.train_baseline import Config as TrainConfig
from training.train_baseline import train_baseline

# of each language six titles, and for each title another query that is about it
TITLES = {
    "Chinese": ["夜行列车", "红色皇后", "机器人医生", "冬天的岛", "秘密之城", "龙的梦"],
    "Arabic": ["قطار الليل", "الملكة الحمراء", "الطبيب الآلي", "جزيرة الشتاء", "مدينة الأسرار", "حلم التنين"],
    "Thai": ["รถไฟกลางคืน", "ราชินีสีแดง", "หมอหุ่นยนต์", "เกาะฤดูหนาว", "เมืองแห่งความลับ", "ความฝันของมังกร"],
    "German": ["Nachtzüge", "Rote Königin", "Roboterärztin", "Insel im Winter", "Die dunkle Straße", "Drachenträume"],
}
QUERIES = {
    "Chinese": ["坐列车的夜晚", "皇后穿红衣", "会看病的机器人", "下雪的岛", "藏着秘密的城", "看见龙的梦"],
    # with vowel marks and other forms of alef, as nobody types them twice alike
    "Arabic": ["قِطَار في الظلام", "ملكة الحمراء", "الالي يعالج", "جزيره تحت الثلج", "اسرار الأسرار", "التّنّين نائم"],
    "Thai": ["นั่งรถไฟตอนดึก", "ราชินีในวัง", "หุ่นยนต์รักษาคน", "เกาะที่มีหิมะ", "ความลับของเธอ", "ฝันเห็นมังกร"],
    "German": [
        "NACHTZÜGE fahren", "eine Königin", "Roboterärztin hilft uns", "verschneite Insel", "STRASSE",
        "drachenträume jede Nacht",
    ],
}  # fmt: skip
USERS = 8
PATIENT = ("--deadline-ms", "20000", "--log-wait-ms", "60000")  # a busy machine or disk changes nothing


def documents(language: str) -> list[dict[str, str]]:
    return [
        {"doc_id": f"{language}-{number}", "title": title, "summary": f"{title}. {QUERIES[language][number]}"}
        for number, title in enumerate(TITLES[language])
    ]


def events() -> pa.Table:
    """A log in which every user clicks the document whose title he typed, wherever it stands."""
    rows = []
    for language in TITLES:
        for number, query in enumerate(TITLES[language]):
            for user in range(USERS):
                page = documents(language)
                page = page[user % 6 :] + page[: user % 6]
                for position, document in enumerate(page, start=1):
                    clicked = document["doc_id"] == f"{language}-{number}"
                    rows.append(
                        {
                            **document, "request_id": f"{language}-{number}-{user}", "user_id": f"u{user}",
                            "timestamp": datetime(2026, 11, 1, user, tzinfo=UTC), "query": query,
                            "position": position, "clicked": clicked, "dwell_seconds": 60.0 * clicked, "arm": "",
                        }
                    )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=TABLES["events"].schema)


def judgments(queries: dict[str, list[str]], split: str) -> pa.Table:
    rows = [
        {
            **document, "query_id": f"{split}-{language}-{number}", "query": query,
            "grade": 4 * (document["doc_id"] == f"{language}-{number}"),
        }
        for language in queries
        for number, query in enumerate(queries[language])
        for document in documents(language)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=TABLES["judgments"].schema)


@dataclass
class Flow:
    """What the whole flow left behind: click pairs, checkpoint, and a running router before the served model."""

    data: Path
    clicks: list[dict]
    checkpoint: Path
    router: LocalRouter


@pytest.fixture(scope="module")
def flow(tmp_path_factory) -> Iterator[Flow]:
    folder = tmp_path_factory.mktemp("languages")
    data = folder / "data"
    (data / "judgments").mkdir(parents=True)
    write_table(folder / "events.parquet", "events", events())
    write_table(data / "judgments" / "train.parquet", "judgments", judgments(TITLES, "train"))
    write_table(data / "judgments" / "dev.parquet", "judgments", judgments(QUERIES, "dev"))
    nobodys = PrivacySettings(personal_data="keep")  # the queries are this file's own
    events_path = str(folder / "events.parquet")
    write_clicks(ClickPairSettings(events=events_path, out=data / "clicks.parquet", privacy=nobodys))
    train_baseline(
        TrainConfig(
            data=data, out=folder / "student", size="tiny-2", vocabulary_size=1200, limits=FieldLimits(16, 32, 48),
            epochs=2, learning_rate=1e-3, precision="fp32",
        )
    )  # fmt: skip
    build_student(
        BuildConfig(
            folder / "student", "student", "openvino", data, repository=folder / "repository", precision="fp32",
            serves_now="none", accept_worse="a test of scripts", serving=ServingLimits(threads=1),
        )
    )  # fmt: skip
    (folder / "e.yaml").write_text("default_model: student\nexperiments: []\n")
    with (
        start_triton(folder / "repository") as triton,
        start_router(folder / "e.yaml", triton.grpc, folder / "log", *PATIENT) as router,
    ):
        clicks = read_table(data / "clicks.parquet", "clicks").to_pylist()
        yield Flow(data, clicks, folder / "student", router)


@pytest.mark.parametrize("language", TITLES)
def test_click_pairs_keep_the_queries_of_a_language(flow, language):
    found = {row["doc_id"]: row for row in flow.clicks if row["doc_id"].startswith(language)}
    assert sorted(found) == [f"{language}-{number}" for number in range(6)]
    assert all(row["title"] == TITLES[language][int(doc_id[-1])] for doc_id, row in found.items())


@pytest.mark.parametrize("language", TITLES)
def test_bm25_finds_the_document_of_a_query_in_other_words(language):
    titles = TITLES[language]
    for number, query in enumerate(QUERIES[language]):
        scores = bm25_scores([query] * 6, titles, [""] * 6)
        assert scores[number] > 0 and int(scores.argmax()) == number, (query, scores)


@pytest.mark.parametrize("language", TITLES)
def test_the_search_page_finds_what_a_query_names(flow, language):
    """Seen: the page split text at spaces alone, so that no Chinese or Thai query found anything."""
    documents_found = Documents(flow.data)
    for number, query in enumerate(QUERIES[language]):
        best = documents_found.find(query, 3)[0]
        assert documents_found.titles[best] == TITLES[language][number]


@pytest.mark.parametrize("language", TITLES)
def test_the_vocabulary_knows_the_language_and_long_text_without_spaces_is_cut(flow, language):
    text = StudentFormat.of_checkpoint(flow.checkpoint)
    unknown = text.tokenizer.token_to_id("[UNK]")
    between = "" if language in ("Chinese", "Thai") else " "  # these two are written without spaces
    fields = [*TITLES[language], *QUERIES[language], between.join(TITLES[language] * 200)]
    for pair in text.encode(fields, fields, fields):
        assert unknown not in pair.ids and len(pair.ids) <= text.max_tokens()
    # marks that carry the meaning stay: with Thai vowels stripped, these two would be one
    assert text.tokenise_fields(["กิน"], 9) != text.tokenise_fields(["กน"], 9)


@pytest.mark.parametrize("language", TITLES)
def test_the_router_serves_the_checkpoints_scores_and_logs_the_text_as_it_came(flow, language):
    query, page = QUERIES[language][0], documents(language)
    body = {"user_id": f"{language} user", "query": query, "documents": page, "request_id": language}
    answer = httpx.post(f"{flow.router.url}/rank", json=body, timeout=60, trust_env=False).json()
    texts = {document["doc_id"]: document for document in page}
    shown = [texts[doc_id] for doc_id in answer["ranking"]]
    expected = score_pairs(flow.checkpoint, [query] * 6, [d["title"] for d in shown], [d["summary"] for d in shown])
    np.testing.assert_allclose(answer["scores"], expected, atol=1e-4)
    assert answer["served_by"] == "student" and np.std(expected) > 0
    records = read_folder(flow.router.output.parent, ReadCounts())
    logged = next(r for r in records if r["type"] == "exposure" and r["request_id"] == language)
    assert (logged["query"], logged["title"]) == (query, [d["title"] for d in shown])
