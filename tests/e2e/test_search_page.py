"""The search page in headless Chromium: search, judge, reveal, at desktop and phone width."""

from __future__ import annotations

import csv
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from serving.temporary_server import start_triton
from tests.helpers.browser import browser, errors, needs_browser, overflow, set_width
from tests.helpers.graded_rankers import write_data, write_repository

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(address of the page, its judgements file) in front of a real tritonserver."""
    folder = tmp_path_factory.mktemp("page")
    data, judgements = write_data(folder / "data"), folder / "judged.csv"
    with start_triton(write_repository(folder / "repository")) as server:
        port = str(free_port())
        command = [
            sys.executable,
            "clients/search_page.py",
            "--data",
            str(data),
            "--url",
            server.grpc,
            "--port",
            port,
        ]
        process = subprocess.Popen(
            [*command, "--judgments", str(judgements)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stderr is not None
            printed = ""
            while not (address := re.search(r"search page: (http://\S+)", printed)):
                line = process.stderr.readline()
                assert line, f"the page did not start: {printed}"
                printed += line
            _wait(address[1])
            yield address[1], judgements
        finally:
            process.terminate()
            process.wait(15)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(address: str) -> None:
    for _ in range(100):
        try:
            httpx.get(address, trust_env=False)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"{address} does not answer")


def test_an_answer_has_two_rankings_and_a_bad_query_has_a_reason(page):
    address, _ = page
    found = httpx.get(f"{address}/search", params={"q": "query 7"}, trust_env=False).json()
    assert {side["arm"] for side in found["sides"]} == {"student", "baseline"}
    best = next(side for side in found["sides"] if side["arm"] == "student")["results"][0]
    assert best["title"] == "grade 4"
    assert httpx.get(f"{address}/search", params={"q": " "}, trust_env=False).status_code == 422
    assert httpx.get(f"{address}/search", params={"q": "zzz"}, trust_env=False).json()["found"] == 0
    wrong = {"query": "q", "left": "nobody", "better": "left"}
    assert httpx.post(f"{address}/judge", json=wrong, trust_env=False).status_code == 422


@needs_browser
def test_a_person_searches_judges_and_reveals(page):
    from selenium.webdriver.support.ui import WebDriverWait

    address, judgements = page
    judgements.unlink(missing_ok=True)
    with browser() as driver:
        for width in (1280, 400):
            set_width(driver, width)
            driver.get(address)
            driver.find_element("id", "query").send_keys("query 3\n")
            WebDriverWait(driver, 20).until(lambda d: len(d.find_elements("css selector", ".side li")) == 20)
            names = [e.text for e in driver.find_elements("css selector", ".name")]
            assert names == ["Left", "Right"]  # nobody knows who is who
            first = driver.find_element("css selector", ".side .title").text
            better = "left" if first == "grade 4" else "right"
            driver.find_element("css selector", f"[data-better={better}]").click()
            WebDriverWait(driver, 20).until(lambda d: d.find_element("css selector", ".name").text != "Left")
            names = [e.text for e in driver.find_elements("css selector", ".name")]
            assert names == (["student", "baseline"] if better == "left" else ["baseline", "student"])
            assert overflow(driver) == 0 and errors(driver) == []
        driver.save_screenshot(str(judgements.with_name("page.png")))
    with judgements.open() as stream:
        assert [row["verdict"] for row in csv.DictReader(stream)] == ["good", "good"]
