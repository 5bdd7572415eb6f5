"""The search page in headless Chromium: search, judge, reveal, at desktop and phone width."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from ranking.schema import read_table
from serving.temporary_server import free_ports, start_triton
from tests.helpers.ab_logs import log_of
from tests.helpers.browser import browser, errors, needs_browser, overflow, set_width
from tests.helpers.graded_rankers import write_data, write_repository
from training.prepare_data import Config as PrepareConfig
from training.prepare_data import main as prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(address of the page, its file of judgments) in front of a real tritonserver."""
    folder = tmp_path_factory.mktemp("page")
    with (
        start_triton(write_repository(folder / "repository")) as server,
        started_page(folder, "--url", server.grpc, "--deadline-ms", "30000") as address,
    ):
        yield address, folder / "judged.csv"


@contextmanager
def started_page(folder: Path, *words: str) -> Iterator[str]:
    """The address of a page, which keeps what is said in the folder. words: further flags."""
    command = [sys.executable, "clients/search_page.py", "--data", str(write_data(folder / "data"))]
    command += ["--port", str(free_ports(1)[0]), "--judgments", str(folder / "judged.csv")]
    command += ["--grades", str(folder / "grades.jsonl"), *words]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        printed = ""
        while not (address := re.search(r"search page: (http://\S+)", printed)):
            line = process.stderr.readline()
            assert line, f"the page did not start: {printed}"
            printed += line
        _wait(f"{address[1]}/next")
        yield address[1]
    finally:
        process.terminate()
        process.wait(60)


def get(address: str, **parameters: str) -> httpx.Response:
    return httpx.get(address, params=parameters, trust_env=False, timeout=60)


def _wait(address: str) -> None:
    """Until the page answers there."""
    for _ in range(600):
        with suppress(httpx.TransportError):
            if get(address).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"{address} does not answer")


def test_an_answer_has_two_rankings_and_a_bad_query_has_a_reason(page):
    address, _ = page
    found = get(f"{address}/search", q="query 7").json()
    assert {side["arm"] for side in found["sides"]} == {"student", "baseline"}
    best = next(side for side in found["sides"] if side["arm"] == "student")["results"][0]
    assert best["title"] == "grade 4"
    assert get(f"{address}/search", q=" ").status_code == 422
    assert get(f"{address}/search", q="zzz").json()["found"] == 0
    wrong = {"query": "q", "left": "nobody", "better": "left"}
    assert httpx.post(f"{address}/judge", json=wrong, trust_env=False, timeout=60).status_code == 422


@needs_browser
def test_a_person_searches_judges_and_reveals(page):
    from selenium.webdriver.support.ui import WebDriverWait

    address, judgments = page
    judgments.unlink(missing_ok=True)
    with browser() as driver:
        for width in (1280, 400):
            set_width(driver, width)
            driver.get(address)
            driver.find_element("id", "query").send_keys("query 3\n")
            WebDriverWait(driver, 60).until(lambda d: len(d.find_elements("css selector", ".side li")) == 20)
            names = [e.text for e in driver.find_elements("css selector", ".name")]
            assert names == ["Left", "Right"]  # nobody knows who is who
            first = driver.find_element("css selector", ".side .title").text
            better = "left" if first == "grade 4" else "right"
            driver.find_element("css selector", f"[data-better={better}]").click()
            WebDriverWait(driver, 60).until(lambda d: d.find_element("css selector", ".name").text != "Left")
            names = [e.text for e in driver.find_elements("css selector", ".name")]
            assert names == (["student", "baseline"] if better == "left" else ["baseline", "student"])
            assert overflow(driver) == 0 and errors(driver) == []
        driver.save_screenshot(str(judgments.with_name("page.png")))
    with judgments.open() as stream:
        assert [row["verdict"] for row in csv.DictReader(stream)] == ["good", "good"]


@needs_browser
def test_a_click_on_a_grade_reaches_a_prepared_dataset(page, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    address, judgments = page
    grades = judgments.with_name("grades.jsonl")
    graded: dict[tuple[str, str], int] = {}
    with browser() as driver:
        set_width(driver, 400)
        driver.get(address)
        for query in (f"query {number}" for number in range(10, 16)):
            box = driver.find_element("id", "query")
            box.clear()
            box.send_keys(query + "\n")
            WebDriverWait(driver, 60).until(lambda d, q=query: d.execute_script("return shown && shown.query") == q)
            for place, grade in ((0, 4), (5, 1), (9, 0)):
                row = driver.find_elements("css selector", ".side:first-child li")[place]
                doc_id = driver.execute_script("return shown.sides[0].results[arguments[0]].doc_id", place)
                row.find_elements("css selector", ".grades button")[grade].click()
                WebDriverWait(driver, 60).until(lambda d, r=row: r.find_elements("css selector", ".given"))
                graded[query, doc_id] = grade
        assert errors(driver) == []
    prepare(PrepareConfig(source=f"table:{grades}", out=tmp_path / "data"))
    tables = [read_table(path, "judgments") for path in (tmp_path / "data" / "judgments").glob("*.parquet")]
    rows = [row for table in tables for row in table.to_pylist()]
    assert {(row["query"], row["doc_id"]): row["grade"] for row in rows} == graded and len(graded) == 18


@needs_browser
def test_a_query_that_cannot_be_ranked_is_skipped(tmp_path):
    """Seen: one that no document has a word of, or that the models do not answer, was the rater's next for ever."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.expected_conditions import alert_is_present
    from selenium.webdriver.support.ui import WebDriverWait

    log = log_of(tmp_path / "log", {"qerry": 30, " query\t3\n": 20})
    with started_page(tmp_path, "--url", "127.0.0.1:1", "--log", str(log)) as address, browser() as driver:
        driver.get(address)
        wait = WebDriverWait(driver, 60)
        for reason in ("one reason", "another"):
            wait.until(
                lambda d: d.find_element("id", "next").is_enabled() and d.find_element("id", "next").is_displayed()
            )
            driver.find_element("id", "next").click()
            query = get(f"{address}/next").json()["query"]
            wait.until(lambda d, q=query: d.execute_script("return shown && shown.query") == q)
            buttons = driver.find_elements("css selector", "#judge button")
            assert [button.text for button in buttons if button.is_displayed()] == ["Skip s"]
            ActionChains(driver).send_keys("s").perform()
            wait.until(alert_is_present())
            driver.switch_to.alert.send_keys(reason)
            driver.switch_to.alert.accept()
            wait.until(lambda d: d.find_element("id", "note").text == "Skipped.")
        wait.until(lambda d: d.find_element("id", "progress").text == "2 of 2 queries.")
    with (tmp_path / "judged.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["query"] for row in rows} == {"qerry", "query 3"} and [row["verdict"] for row in rows] == ["", ""]
