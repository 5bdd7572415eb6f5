"""What people see, in headless Chromium at 1280 and 400 pixels: nothing overflows, no script fails, and everybody can
read our own pages (axe-core). `pytest tests/e2e/test_screens.py --write-docs` puts the screens into docs/screens/."""

from __future__ import annotations

import io
import itertools
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from benchmarks.ab.toy_rankers import write_toy_repository
from clients import ab_report, search_page
from clients.ab.router.local_router import start_router
from demo import engine_page
from ranking.schema import TABLES, write_table
from serving.temporary_server import start_triton
from tests.helpers.ab_logs import exposures, log_of, save
from tests.helpers.axe import violations
from tests.helpers.browser import browser, errors, needs_browser, overflow, set_width

ROOT = Path(__file__).parents[2]
SCREENS = ROOT / "docs" / "screens"
WIDTHS = {1280: 900, 400: 800}
LARGEST_SCREEN = 150_000  # bytes
EXPERIMENT = """
default_model: student
experiments:
  - name: shoes
    arms: [{name: baseline, model: baseline}, {name: student, model: student}]
"""
QUERIES = ["waterproof hiking boots", "trail running shoes", "light tent for two", "warm sleeping bag"]
THINGS = {
    "Hiking boots": "Ankle-high {} boots for long hiking days, waterproof when the trail is wet.",
    "Running shoes": "Low {} shoes with a rough sole for trail running in any weather.",
    "Tent": "A {} tent with a waterproof floor, light enough to carry and up in five minutes, for two.",
    "Sleeping bag": "A warm {} bag for nights around zero, light enough for a trail of many days.",
    "Rain jacket": "A {} jacket for hiking and running in heavy rain, warm and waterproof, two pockets.",
}
KINDS = ["Waterproof leather", "Light summer", "Robust winter", "Everyday", "Ultralight"]


@dataclass
class Pages:
    """Addresses of what is looked at."""

    report: str
    search: str
    judging: str
    site: str


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The application on a free port of 127.0.0.1."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        until = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < until and thread.is_alive(), "the page did not start"
            time.sleep(0.05)
        try:
            yield address
        finally:
            server.should_exit = True
            thread.join(30)


def static_site(folder: Path) -> Starlette:
    """The docs site as a server has it: from files, a browser would not let its search read its index."""
    return Starlette(routes=[Mount("/", StaticFiles(directory=folder))])


def write_shop(folder: Path) -> Path:
    """A dataset folder of 25 outdoor articles for four queries."""
    articles = [
        (f"d{number}", f"{kind} {thing.lower()}", text.format(kind.lower()))
        for number, (kind, (thing, text)) in enumerate(itertools.product(KINDS, THINGS.items()))
    ]
    rows = [(f"q{q}", doc_id, query, *text) for q, query in enumerate(QUERIES) for doc_id, *text in articles]
    columns = dict(zip(TABLES["candidates"].schema.names, map(list, zip(*rows))))
    write_table(folder / "candidates.parquet", "candidates", pa.table(columns))
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Iterator[Pages]:
    folder = tmp_path_factory.mktemp("screens")
    (folder / "e.yaml").write_text(EXPERIMENT)
    data = write_shop(folder / "data")
    save(folder / "ab", exposures())
    ab_report.main(ab_report.Config(events=folder / "ab", out=folder / "report.html"))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder / "site")]
    subprocess.run(command, cwd=ROOT, check=True)
    with ExitStack() as stack:
        triton = stack.enter_context(start_triton(write_toy_repository(folder / "repository")))
        flags = ("--deadline-ms", "20000")
        router = stack.enter_context(start_router(folder / "e.yaml", triton.grpc, folder / "log", *flags))
        engine = engine_page.Config(data=data, router=router.url, deadline_ms=20_000)
        judging = search_page.Config(
            data=data, url=triton.grpc, judgments=folder / "judged.csv", grades=folder / "grades.jsonl",
            log=log_of(folder / "asked", dict(zip(QUERIES, (40, 20, 10, 8)))), deadline_ms=20_000,
        )  # fmt: skip
        yield Pages(
            (folder / "report.html").as_uri(),
            stack.enter_context(served(engine_page.make_app(engine))),
            stack.enter_context(served(search_page.make_app(judging))),
            stack.enter_context(served(static_site(folder / "site"))),
        )


@pytest.fixture(scope="module")
def driver(pages) -> Iterator:
    with browser() as opened:
        yield opened


def until(driver, selector: str, count: int = 1) -> list:
    """The page's elements, once there are so many."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60).until(lambda d: len(d.find_elements("css selector", selector)) >= count)
    return driver.find_elements("css selector", selector)


def check(driver, name: str, width: int, write: bool) -> None:
    """Nothing overflows, no script fails, axe-core finds nothing; the screen goes into docs/ where it is asked for."""
    if write:
        from PIL import Image

        screen = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
        SCREENS.mkdir(exist_ok=True)
        screen.quantize(128, dither=Image.Dither.NONE).save(SCREENS / f"{name}-{width}.png", optimize=True)
    found = [f"wider than the window by {wide} pixels"] if (wide := overflow(driver)) else []
    found += errors(driver) + violations(driver)
    assert not found, f"{name} at {width}: " + "\n".join(found)


@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_report(pages, driver, width, write_docs):
    set_width(driver, width, WIDTHS[width])
    driver.get(pages.report)
    until(driver, "svg", 4)
    check(driver, "report", width, write_docs)


@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_search_page(pages, driver, width, write_docs):
    set_width(driver, width, WIDTHS[width])
    driver.get(pages.search)
    examples = until(driver, "#examples button", len(QUERIES))
    assert {button.text for button in examples} == set(QUERIES)
    check(driver, "search-empty", width, False)
    next(button for button in examples if button.text == QUERIES[0]).click()
    until(driver, "#results li", 10)
    assert {mark.text for mark in until(driver, ".title mark")} == {"Waterproof", "hiking", "boots"}
    assert not driver.find_element("id", "examples").is_displayed()
    check(driver, "search", width, write_docs)


@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_judging_page(pages, driver, width, write_docs):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.expected_conditions import alert_is_present
    from selenium.webdriver.support.ui import WebDriverWait

    set_width(driver, width, WIDTHS[width])
    driver.get(pages.judging)
    until(driver, "#examples button", len(QUERIES))
    check(driver, "judging-empty", width, False)
    driver.find_element("id", "rater").send_keys(f"rater {width}", Keys.TAB)
    body = driver.find_element("css selector", "body")
    body.send_keys("n")
    until(driver, ".side li", 20)
    driver.find_elements("css selector", ".grades button")[3].click()
    until(driver, "button.given[aria-pressed=true]")
    check(driver, "judging", width, write_docs)
    body.send_keys("1")
    until(driver, ".revealed")
    until(driver, "#progress:not(:empty)")
    check(driver, "judging-done", width, False)
    body.send_keys("n")
    until(driver, "#sides:not(.revealed) li", 20)
    skipped = get(pages, "standing")["skipped"]
    body.send_keys("s")
    asked = WebDriverWait(driver, 60).until(alert_is_present())
    asked.send_keys("not my language")
    asked.accept()
    until(driver, ".revealed")
    assert get(pages, "standing")["skipped"] == skipped + 1
    assert get(pages, "next", rater=f"rater {width}")["done"] == 2


def get(pages: Pages, path: str, **parameters: str) -> dict:
    return httpx.get(f"{pages.judging}/{path}", params=parameters, timeout=60, trust_env=False).json()


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_docs_site(pages, driver, width, scheme):
    """A page of each kind; a wide table, code in several languages and long lines are among them."""
    set_width(driver, width, WIDTHS[width])
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for page in (
        "index",
        "operations",
        "data",
        "story",
        "programs",
        "architecture",
        "results/demo",
        "results/ablation",
    ):
        driver.get(f"{pages.site}/{page}.html")
        until(driver, "h1")
        check(driver, page, width, False)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_screens_in_docs_are_small():
    """That those are there which a page shows is seen to by the site's strict links."""
    sizes = {path.name: path.stat().st_size for path in SCREENS.glob("*.png")}
    assert sizes and max(sizes.values()) < LARGEST_SCREEN, sizes
