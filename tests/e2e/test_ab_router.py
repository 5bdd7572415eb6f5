"""The router in front of a real tritonserver, under load, while things break."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.ab.toy_rankers import set_delay, write_toy_repository
from clients.ab.log.compaction import compact
from clients.ab.log.reader import ReadCounts, read_folder
from clients.ab.router.local_router import start_router
from ranking.query_engine import QueryEngineSettings
from ranking.schema import read_table
from serving.temporary_server import TritonServer, start_triton

EXPERIMENT = """
default_model: baseline
experiments:
  - name: exp
    arms: [{name: baseline, model: baseline}, {name: student, model: student}]
"""
EXPLICIT = ("--model-control-mode=explicit", "--load-model=*")
DEADLINE_MS = 1000  # an arm may use 600 ms of it: a delay of 1 s is too late, a busy test machine is not
# where nothing is to be late: neither a busy machine nor a busy disk changes anything
PATIENT = ("--deadline-ms", "20000", "--log-wait-ms", "60000")
# alpha appears more and more often in titles, less and less in summaries: the two models rank in opposite orders
DOCUMENTS = [{"doc_id": f"d{i}", "title": "alpha " * i, "summary": "alpha " * (4 - i)} for i in range(5)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return write_toy_repository(tmp_path_factory.mktemp("rankers") / "repository", instances=4)


@pytest.fixture(scope="module")
def triton(repository):
    with start_triton(repository, *EXPLICIT) as server:
        yield server


def experiment_file(tmp_path: Path, text: str = EXPERIMENT) -> Path:
    path = tmp_path / "experiments.yaml"
    path.write_text(text)
    return path


@dataclass
class Load:
    """Eight closed-loop users and what they got. `answers` holds (time of sending, answer), in order of arrival.

    A user who waits half a minute for an answer counts it as a failure: a page that hangs does not go unseen.
    """

    url: str
    answers: list[tuple[float, dict]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    pause: float = 0.01
    _stopping: bool = False

    async def __aenter__(self) -> Load:
        self._client = httpx.AsyncClient(base_url=self.url, timeout=30)
        self._users = [asyncio.create_task(self._user(n)) for n in range(8)]
        return self

    async def __aexit__(self, *problem) -> None:
        self._stopping = True
        await asyncio.gather(*self._users)
        await self._client.aclose()

    async def _user(self, number: int) -> None:
        count = 0
        while not self._stopping:
            count += 1
            body = {"user_id": f"u{number}-{count % 25}", "query": "alpha", "documents": DOCUMENTS}
            started = time.monotonic()
            try:
                answer = await self._client.post("/rank", json=body)
                answer.raise_for_status()
                self.answers.append((started, answer.json()))
            except httpx.HTTPError as problem:
                self.failures.append(repr(problem))
                return
            await asyncio.sleep(self.pause)

    def since(self, start: float) -> list[dict]:
        return [answer for at, answer in self.answers if at >= start]

    async def served(self, arm: str, by: str, seconds: float = 60, share: float = 0.95) -> list[dict]:
        """Wait until, over a third of a second, nearly all pages of an arm are served by `by`; returns these."""
        deadline = time.monotonic() + seconds
        while True:
            start = time.monotonic()
            await asyncio.sleep(0.35)
            pages = [a for a in self.since(start) if a["arm"] == arm]
            wanted = [a for a in pages if a["served_by"] == by]
            if len(wanted) >= 5 and len(wanted) >= share * len(pages):
                return wanted
            assert time.monotonic() < deadline, f"{arm} is not served by {by}: {Counter(a['served_by'] for a in pages)}"


def control(server: TritonServer, model: str, action: str) -> None:
    url = f"http://{server.http}/v2/repository/models/{model}/{action}"
    with urllib.request.urlopen(urllib.request.Request(url, data=b"{}", method="POST"), timeout=30) as response:
        assert response.status == 200


def exposures(log: Path) -> list[dict]:
    return [r for r in read_folder(log, ReadCounts()) if r["type"] == "exposure"]


def metric_total(text: str, name: str, **labels: str) -> float:
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = [line for line in text.splitlines() if line.startswith(name + "{") and all(w in line for w in wanted)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_no_request_goes_unanswered_while_models_and_server_break(tmp_path):
    repository = write_toy_repository(tmp_path / "repository", instances=4)
    log = tmp_path / "log"
    flags = ("--deadline-ms", str(DEADLINE_MS), "--breaker-cooldown-seconds", "0.5")

    async def story(first: TritonServer, url: str) -> Load:
        async with Load(url) as load:
            await load.served("student", "student")
            await load.served("baseline", "baseline")

            await asyncio.to_thread(control, first, "student", "unload")
            pages = await load.served("student", "baseline")
            assert {a["fallback"] for a in pages} <= {"unavailable", "breaker_open"}
            assert pages[0]["ranking"] == ["d4", "d3", "d2", "d1", "d0"]
            await asyncio.to_thread(control, first, "student", "load")
            pages = await load.served("student", "student")
            assert pages[0]["ranking"] == ["d0", "d1", "d2", "d3", "d4"]

            set_delay(repository, "student", 1.0)
            pages = await load.served("student", "baseline")
            assert {a["fallback"] for a in pages} <= {"timeout", "breaker_open"}
            set_delay(repository, "student", 0.0)
            await load.served("student", "student")

            stubs = first.children()  # they outlive a server that is killed
            first.process.kill()
            for stub in stubs:
                with suppress(psutil.NoSuchProcess):
                    stub.kill()
            await load.served("student", "incoming")
            await load.served("baseline", "incoming")
            again = start_triton(repository, *EXPLICIT, f"--grpc-port={first.grpc.rsplit(':', 1)[1]}")
            await asyncio.to_thread(again.__enter__)  # the load must go on meanwhile
            try:
                await load.served("student", "student")
                await load.served("baseline", "baseline")
            finally:
                await asyncio.to_thread(again.__exit__, None, None, None)
        return load

    with (
        start_triton(repository, *EXPLICIT) as first,
        start_router(experiment_file(tmp_path), first.grpc, log, *flags) as router,
    ):
        load = asyncio.run(story(first, router.url))
        text = httpx.get(f"{router.url}/metrics", timeout=30).text

    assert not load.failures
    records = exposures(log)
    logged = {r["request_id"]: r for r in records}
    assert len(records) == len(logged) == len(load.answers)
    for _, answer in load.answers:
        record = logged[answer["request_id"]]
        same = ("arm", "served_by", "fallback")
        assert [record[k] for k in same] == [answer[k] for k in same] and record["documents"] == answer["ranking"]
    arms_of_users: dict[str, set] = {}
    for record in logged.values():
        arms_of_users.setdefault(record["user_id"], set()).add(record["arm"])
    assert all(len(arms) == 1 for arms in arms_of_users.values())  # a fallback changes no arm
    fallbacks = Counter(a["fallback"] for _, a in load.answers)
    for reason, count in fallbacks.items():
        assert metric_total(text, "ab_pages_total", fallback=reason) == count
    assert {"timeout", "unavailable", "breaker_open"} <= fallbacks.keys()


def test_a_router_killed_under_load_loses_no_exposure_that_left(tmp_path, triton):
    log = tmp_path / "log"
    experiment = experiment_file(tmp_path)

    async def until_killed(url: str, pid: int) -> Load:
        async with Load(url, pause=0.0) as load:
            while len(load.answers) < 300:
                await asyncio.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            while len(load.failures) < 8:  # each user meets the dead router
                await asyncio.sleep(0.01)
        return load

    answers: list[dict] = []
    for _ in range(2):  # a second router takes over the same folder
        with start_router(experiment, triton.grpc, log, "--log-wait-ms", "60000") as router:
            load = asyncio.run(until_killed(router.url, router.process.pid))
            assert router.process.wait(60) == -signal.SIGKILL
            answers += load.since(0)
    summary = compact(log, tmp_path / "out", QueryEngineSettings())
    days = [read_table(tmp_path / "out/exposures" / f"{day}.parquet", "exposures") for day in summary.days]
    assert {a["request_id"] for a in answers} <= {id_ for day in days for id_ in day["request_id"].to_pylist()}
    assert not summary.damaged
    # beyond the answers that arrived there are at most the eight in flight at each kill
    assert len(answers) <= summary.exposures <= len(answers) + 16


def test_clicks_and_shadow_scores_end_up_beside_their_page(tmp_path, triton):
    log = tmp_path / "log"
    shadowed = experiment_file(tmp_path, EXPERIMENT + "    shadow: 1.0\n")
    with (
        start_router(shadowed, triton.grpc, log, *PATIENT) as router,
        httpx.Client(base_url=router.url, timeout=30) as client,
    ):
        page = {"user_id": "u1", "query": "alpha", "documents": DOCUMENTS}
        answer = client.post("/rank", json=page).json()
        clicked = {"request_id": answer["request_id"], "doc_id": answer["ranking"][1]}
        events = [{**clicked, "type": "click"}, {**clicked, "type": "dwell", "dwell_seconds": 21.5}]
        assert client.post("/events", json={"events": events}).json() == {"accepted": 2}
        deadline = time.monotonic() + 60
        while not [r for r in read_folder(log, ReadCounts()) if r["type"] == "shadow"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    summary = compact(log, tmp_path / "out", QueryEngineSettings())
    (row,) = read_table(tmp_path / "out/exposures" / f"{summary.days[0]}.parquet", "exposures").to_pylist()
    assert (row["clicked_positions"], row["dwell_seconds"]) == ([2], 21.5)
    assert row["scores"] == [4.0, 3.0, 2.0, 1.0, 0.0] and row["model_version"] == "1"
    (shadow,) = read_table(tmp_path / "out/shadows" / f"{summary.days[0]}.parquet", "shadows").to_pylist()
    assert shadow["model"] != row["arm"] and shadow["failure"] == ""
    assert shadow["scores"] == row["scores"][::-1]  # the other model ranks the other way round
    definition = json.loads((tmp_path / "out/experiments.json").read_text())[row["config"]]["definition"]
    assert definition["name"] == "exp"


def test_nan_scores_are_never_shown(tmp_path, triton):
    with start_router(experiment_file(tmp_path), triton.grpc, tmp_path / "log", *PATIENT) as router:
        page = {"user_id": "u1", "query": "nan", "documents": DOCUMENTS}
        answer = httpx.post(f"{router.url}/rank", json=page, timeout=30).json()
    assert (answer["served_by"], answer["fallback"]) == ("incoming", "bad_scores")
    assert answer["ranking"] == [d["doc_id"] for d in DOCUMENTS]


def test_an_interleaved_page_holds_both_rankings_and_falls_back_whole(tmp_path, repository, triton):
    text = EXPERIMENT.replace("{name: student, model: student}", "{name: mixed, interleave: [student, baseline]}")
    text += "    forced: {u1: mixed}\n"
    page = {"user_id": "u1", "query": "alpha", "documents": DOCUMENTS}
    log = tmp_path / "log"
    with start_router(experiment_file(tmp_path, text), triton.grpc, log, *PATIENT) as router:
        # the coin is drawn from the request id: fixed ids, so that every run sees the same twelve coins
        pages = [page | {"request_id": f"page-{number}"} for number in range(12)]
        answers = [httpx.post(f"{router.url}/rank", json=page, timeout=30).json() for page in pages]
        control(triton, "student", "unload")
        try:
            broken = httpx.post(f"{router.url}/rank", json=page, timeout=30).json()
        finally:
            control(triton, "student", "load")
    assert {a["served_by"] for a in answers} == {"interleaved"}
    assert {a["model_version"] for a in answers} == {"student:1,baseline:1"}
    assert {a["ranking"][0] for a in answers} == {"d0", "d4"}  # the coin decides whose favourite is on top
    for record, answer in zip(exposures(log), answers):
        favourites = {"student": ["d0", "d1", "d2", "d3", "d4"], "baseline": ["d4", "d3", "d2", "d1", "d0"]}
        for place, team in enumerate(record["teams"]):
            for model in [team] if team else favourites:  # no team where both want the same document next
                left = [d for d in favourites[model] if d not in answer["ranking"][:place]]
                assert answer["ranking"][place] == left[0]
        assert record["teams"][-1] == "" and set(record["teams"][:-1]) == {"student", "baseline"}
    assert (broken["served_by"], broken["arm"], broken["fallback"]) == ("baseline", "mixed", "unavailable")
    assert exposures(log)[-1]["teams"] == []
