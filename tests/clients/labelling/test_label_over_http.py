"""Labelling over HTTP: each dialect's form, faults that must lose and double nothing, the budget, the key, resuming."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clients.label_over_http import Config, main
from clients.labelling import http_teacher
from clients.labelling.http_costs import Prices
from clients.labelling.http_dialects import DIALECTS, BadAnswer
from clients.labelling.http_endpoint import HttpEndpoint, _retry_after
from clients.labelling.http_teacher import AnswerLog, CharacterLimits, logit
from clients.labelling.work_queue import Tally
from ranking.errors import InputError
from ranking.labels import LabelSet, read_labels
from tests.helpers.stub_reranker import HOSTILE, reranker, stub_score

FAULTS = {
    "408": 0.04,
    "429": 0.08,
    "500": 0.08,
    "503": 0.04,
    "slow": 0.02,
    "short": 0.1,
    "garbled": 0.05,
    "twice": 0.05,
}


def config(candidates, out, stub, **changes) -> Config:
    settings = {"model": stub.model, "documents": 5, "shard_rows": 64, "key_variable": ""} | changes
    return Config(candidates=candidates, out=out, dialect=stub.dialect, url=[stub.url], **settings)


def expected_scores(candidates) -> np.ndarray:
    rows = pq.read_table(candidates).to_pylist()
    return np.array([stub_score(row["query"], f"{row['title']} {row['summary']}") for row in rows], np.float32)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_under_faults_every_pair_is_labelled_once_with_its_own_score(dialect, write_candidates, tmp_path):
    candidates = write_candidates(200)
    with reranker(dialect, FAULTS, slow_seconds=4.0) as stub:  # on a busy machine a good answer takes a while, too
        assert main(config(candidates, tmp_path / "labels", stub, deadline_ms=2000, retries=30)) == 0
    labels = read_labels(tmp_path / "labels")
    assert labels.column("teacher_score").to_numpy().tolist() == expected_scores(candidates).tolist()
    # a short answer's scores are kept, so nothing that was answered is asked again
    assert len(stub.answered) == 200 and set(stub.answered.values()) == {1}
    assert not list((tmp_path / "labels").glob("answers-*"))


def test_a_hostile_service_costs_neither_the_run_nor_a_label(write_candidates, tmp_path):
    """Seen: deep brackets, a score of a thousand digits and a false gzip ended the labeller; an endless answer filled
    its memory, and one that came drop by drop held a connection for ever."""
    candidates = write_candidates(60)
    with reranker("tei", dict.fromkeys(HOSTILE, 0.08)) as stub:
        assert main(config(candidates, tmp_path / "labels", stub, deadline_ms=1500, retries=30)) == 0
    labels = read_labels(tmp_path / "labels")
    assert labels.column("teacher_score").to_numpy().tolist() == expected_scores(candidates).tolist()


def test_a_service_cannot_ask_for_a_pause_without_end():
    for asked, seconds in (("inf", 3600.0), ("1e12", 3600.0), ("-5", 0.0), ("nan", 0.0), ("0.5", 0.5), ("x", None)):
        assert _retry_after(httpx.Response(429, headers={"retry-after": asked})) == seconds


def test_a_run_that_is_cut_off_again_and_again_pays_for_no_answer_twice_and_ends_with_the_same_bytes(
    write_candidates, tmp_path
):
    candidates = write_candidates(300)
    prices = {"prices": Prices(per_1000_requests=1000.0), "in_flight": 2}
    with reranker("tei") as stub:
        assert main(config(candidates, tmp_path / "whole", stub, **prices)) == 0
    with reranker("tei") as stub:
        runs = 0
        while runs < 20:  # each run can pay for nine requests and is then cut off in the middle of its shards
            runs += 1
            try:
                assert main(config(candidates, tmp_path / "parts", stub, budget=9.0, **prices)) == 0
                break
            except InputError as problem:
                assert "the budget of 9 is spent: 9 requests" in str(problem)
            with (tmp_path / "parts" / "answers-00000.jsonl").open("a") as stream:
                stream.write('{"positions": [1, 2], "sco')  # as a kill in the middle of a write leaves it
        assert runs > 5
    assert set(stub.answered.values()) == {1} and len(stub.answered) == 300
    assert stub.requests <= 9 * runs
    for name in sorted(path.name for path in (tmp_path / "whole").glob("labels-*")):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_one_document_that_the_service_will_not_take_costs_its_neighbours_nothing(write_candidates, tmp_path):
    candidates = write_candidates(64)
    with reranker("tei", poison="document 17 ") as stub:
        assert main(config(candidates, tmp_path / "labels", stub)) == 3
    found = LabelSet.load(tmp_path / "labels")
    assert (found.labels, found.rejects) == (63, 1)
    (reject,) = pq.read_table(tmp_path / "labels/rejects.parquet").to_pylist()
    assert (reject["row"], reject["cause"]) == (18, "teacher")
    assert "HTTP 413" in reject["reason"]


def test_a_server_that_does_not_say_what_it_serves_is_not_asked(write_candidates, tmp_path, caplog):
    """Seen: the other one's answer stood for both, and scores of any model went into the same labels."""
    candidates = write_candidates(40)
    with reranker("tei") as stub, reranker("tei", nameless=True) as nameless:
        settings = vars(config(candidates, tmp_path / "labels", stub)) | {"url": [nameless.url, stub.url]}
        assert main(Config(**settings)) == 0
        assert nameless.requests == 0 and len(stub.answered) == 40
        assert f"{nameless.url} is not asked" in caplog.text
        with pytest.raises(InputError, match="does not say what it serves"):
            main(Config(**(settings | {"url": [nameless.url], "out": tmp_path / "other"})))


def test_a_server_that_says_what_it_serves_byte_by_byte_is_given_up(write_candidates, tmp_path, monkeypatch):
    """Seen: the program waited for the end of it, a day at ten bytes a second, and a signal did not end it."""
    monkeypatch.setattr(http_teacher, "IDENTIFY_SECONDS", 0.5)
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            caller, _ = listener.accept()
            with caller, contextlib.suppress(OSError):
                caller.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                while not over.wait(0.1):
                    caller.sendall(b" ")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        url = [f"http://127.0.0.1:{listener.getsockname()[1]}"]
        with pytest.raises(InputError, match=r"does not say what it serves: no answer within 0\.5 s"):
            main(Config(candidates=write_candidates(8), out=tmp_path / "labels", dialect="tei", url=url))
        over.set()
        thread.join()


def test_a_server_that_comes_back_with_another_model_ends_the_run(write_candidates, tmp_path, monkeypatch):
    """What was there before is kept; the other model's scores must not stand beside it."""
    with reranker("tei", {"503": 0.3}) as stub:

        def identity(path: str) -> dict[str, str]:
            return {"model_id": "one" if stub.requests < 10 else "other", "model_sha": "", "model_dtype": "float32"}

        monkeypatch.setattr(stub, "identity", identity)
        with pytest.raises(InputError, match=r"came back with .*other.* in place of .*one"):
            main(config(write_candidates(400), tmp_path / "labels", stub, in_flight=1))
        assert stub.requests < 40


def test_a_pause_of_nothing_is_not_taken_at_its_word_twice(write_candidates, tmp_path):
    """Seen: `retry-after: 0` was met with requests as fast as they went, each of which the budget paid for."""
    with reranker("tei", {"429": 1.0}, retry_after="0") as stub, pytest.raises(InputError, match="HTTP 429"):
        main(config(write_candidates(16), tmp_path / "labels", stub, in_flight=1, give_up_seconds=2.0))
    assert 3 <= stub.requests <= 12


def test_a_server_that_takes_nothing_keeps_no_pair_from_the_others(write_candidates, tmp_path):
    """Seen: it held what it had drawn through every pause, and the run ended although the other server was well."""
    with reranker("tei") as stub, reranker("tei", {"503": 1.0}) as full:
        settings = vars(config(write_candidates(200), tmp_path / "labels", stub, give_up_seconds=5.0))
        assert main(Config(**(settings | {"url": [full.url, stub.url]}))) == 0
    assert len(stub.answered) == 200


def test_requests_that_meet_one_refusal_together_wait_for_it_once(caplog):
    """Seen: eight under way made a pause of one second, as the service asked for, one of half a minute."""
    endpoint = HttpEndpoint("u", *[None] * 2, Tally(), *[None] * 4, in_flight=8, documents=1)
    for _ in range(8):
        endpoint._lost([], "HTTP 429", 1.0)
    assert 0.5 < endpoint._open_at - time.monotonic() <= 1.0
    endpoint._open_at = 0.0
    endpoint._lost([], "HTTP 429", 0.0)  # asked again too early, it is not taken at its word a second time
    assert 0.3 < endpoint._open_at - time.monotonic() < 0.7
    assert caplog.messages == ["u takes nothing: HTTP 429"]


def test_why_a_service_takes_nothing_is_told(write_candidates, tmp_path):
    """Seen: "the teacher fails on 16 of 16 pairs; last: " and nothing behind it."""
    with reranker("tei", {"400": 1.0}) as stub, pytest.raises(InputError, match=r"last: .*HTTP 400 .*asked to fail"):
        main(config(write_candidates(200), tmp_path / "labels", stub))


def test_a_redirect_is_named_and_not_asked_again(write_candidates, tmp_path):
    """Seen: "unusable answer: Expecting value", once for every retry of every pair."""
    with reranker("tei", {"302": 1.0}) as stub, pytest.raises(InputError, match=r"on to another address \(HTTP 302\)"):
        main(config(write_candidates(16), tmp_path / "labels", stub, in_flight=1))
    assert stub.requests == 1


def test_a_stopped_run_leaves_a_service_that_does_not_answer(write_candidates, tmp_path):
    """Seen: it waited --give-up-seconds, 15 minutes, for shards that nobody could finish."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one that comes late must not end all tests
    with reranker("tei", {"503": 1.0}) as stub:

        def stop_once_asked() -> None:
            while not stub.requests:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=stop_once_asked, daemon=True).start()
        try:
            assert main(config(write_candidates(16), tmp_path / "labels", stub, deadline_ms=2000)) == 130
        finally:
            signal.signal(signal.SIGTERM, before)


def test_a_key_or_an_address_that_can_be_none_is_refused(write_candidates, tmp_path, monkeypatch):
    """Seen: tracebacks."""
    candidates = write_candidates(16)
    with reranker("cohere", key="right") as stub:
        monkeypatch.setenv("CO_API_KEY", "schlüssel")
        with pytest.raises(InputError, match="CO_API_KEY holds characters that no key has"):
            main(config(candidates, tmp_path / "a", stub, key_variable=None))
        with pytest.raises(ValueError, match="--url"):
            Config(candidates=candidates, out=tmp_path / "a", dialect="tei", url=["http://[::1"])


def test_the_key_comes_from_the_environment_and_a_refused_key_ends_the_run(write_candidates, tmp_path, monkeypatch):
    candidates = write_candidates(16)
    with reranker("cohere", key="right") as stub:
        asked = {"key_variable": None, "give_up_seconds": 5.0}
        monkeypatch.delenv("CO_API_KEY", raising=False)
        with pytest.raises(InputError, match="CO_API_KEY is not set"):
            main(config(candidates, tmp_path / "a", stub, **asked))
        monkeypatch.setenv("CO_API_KEY", "wrong")
        with pytest.raises(InputError, match="refuses requests: HTTP 401"):
            main(config(candidates, tmp_path / "a", stub, **asked))
        monkeypatch.setenv("CO_API_KEY", "right")
        assert main(config(candidates, tmp_path / "a", stub, **asked)) == 0


def test_the_pace_is_kept(write_candidates, tmp_path):
    with reranker("jina") as stub:
        began = time.monotonic()  # not the first request's arrival: that may be late, and the next ones not
        assert main(config(write_candidates(40), tmp_path / "labels", stub, requests_per_minute=600)) == 0
        assert stub.requests >= 10 and time.monotonic() - began >= (stub.requests - 1) * 0.1 - 0.01


def test_a_server_of_another_model_limits_or_scale_is_another_teacher(write_candidates, tmp_path):
    candidates = write_candidates(16)
    ids = set()
    with reranker("tei") as stub, reranker("tei", model="other") as other:
        for number, changes in enumerate(
            ({}, {"limits": CharacterLimits(summary=10)}, {"revision": "2"}, {"url": [other.url]})
        ):
            main(Config(**(vars(config(candidates, tmp_path / str(number), stub)) | changes)))
            ids.add(LabelSet.load(tmp_path / str(number)).teacher_id)
        assert len(ids) == 4
        with pytest.raises(InputError, match="serve different models"):
            main(Config(**(vars(config(candidates, tmp_path / "x", stub)) | {"url": [stub.url, other.url]})))
        with pytest.raises(InputError, match="two teachers' scores do not mix"):
            main(config(candidates, tmp_path / "0", stub, revision="3"))


def test_the_dry_run_counts_requests_and_money_without_asking(write_candidates, tmp_path, capsys):
    candidates = write_candidates(64)  # 8 queries of 8 documents: two requests of at most 5 each
    settings = {"dialect": "cohere", "url": ["http://nowhere.invalid"], "documents": 5, "dry_run": True}
    prices = Prices(per_1000_requests=2.0, per_million_tokens=10.0)
    asked = Config(candidates=candidates, out=tmp_path, prices=prices, requests_per_minute=8, **settings)
    assert main(asked) == 0
    rows = pq.read_table(candidates).to_pylist()
    tokens = sum(len(row[name]) for row in rows for name in ("query", "title", "summary")) / 4
    printed = capsys.readouterr().out.split()
    assert printed[printed.index("requests") + 1] == "16"
    assert printed[printed.index("time") + 3] == f"{16 / 8 / 60:.2f}"
    assert printed[printed.index("cost") + 2] == f"{16 * 0.002 + tokens * 1e-5:.2f}"


def test_the_dry_run_counts_nothing_of_a_shard_of_bad_rows(write_candidates, tmp_path, capsys):
    """Seen: a traceback."""
    rows = pq.read_table(write_candidates(48)).to_pylist()
    for row in rows[16:32]:
        row["query"] = " "
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "candidates.parquet")
    settings = {"dialect": "cohere", "url": ["http://nowhere.invalid"], "shard_rows": 16, "dry_run": True}
    assert main(Config(candidates=tmp_path / "candidates.parquet", out=tmp_path, **settings)) == 0
    assert "pairs     32\nrequests  4 of" in capsys.readouterr().out


def test_a_probability_becomes_its_logit_and_what_is_none_is_refused():
    assert logit(0.5) == 0.0
    assert logit(0.9) == pytest.approx(np.log(9))
    assert logit(1.0) == -logit(0.0) == pytest.approx(np.log(1e7), rel=1e-6)
    with pytest.raises(BadAnswer, match="--scale raw"):
        logit(1.5)


def test_an_answer_for_a_document_that_was_not_asked_is_no_answer():
    for entries, reason in (
        ([{"index": 2, "score": 1.0}], "document 2 of 2"),
        ([{"index": 0, "score": 1.0}, {"index": 0, "score": 1.0}], "two scores"),
        ([{"index": 0, "score": "high"}], "'high'"),
        ([{"index": 0}], "not the expected form"),
    ):
        with pytest.raises(BadAnswer, match=reason):
            DIALECTS["tei"].scores(entries, 2)


def test_an_answer_log_keeps_float32_scores_exactly(tmp_path):
    log, scores = AnswerLog(tmp_path), {3: float(np.float32(0.1)), 7: float(np.float32(-1e-8))}
    log.add(5, scores)
    assert log.read(5) == scores
    with (tmp_path / "answers-00005.jsonl").open("a") as stream:
        stream.write('{"positions": [9], "sco')  # as a kill leaves it
    log.add(5, {1: 0.5})
    assert log.read(5) == scores | {1: 0.5}
    log.drop(5)
    assert log.read(5) == {}
