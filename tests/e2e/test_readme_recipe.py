"""The README's recipe for own data, line by line as printed, on a small real table: CSV in, report out.

Only what a test cannot share is changed: the servers get free addresses, and loads, passes and texts are small.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import numpy as np
import pytest

from ranking.bm25 import bm25_scores
from ranking.metrics import JudgedRanking
from serving.temporary_server import free_ports
from tests.helpers.readme import BLOCKS, ROOT, SMALL_LIMITS, write_small_configs

MSRD = ROOT.parent / "shared" / "data" / "msrd"
(RECIPE,) = [block for block in BLOCKS if "table:judgments.csv" in block]
SMALL_LOADS = {"-u 2 -t 60s": "-u 1 -t 3s", "--users 500": "--users 60"}
SMALL_TRAINING = {
    "epochs": 1,
    "least_steps": 60,
    "batch_groups": 4,
    "group_documents": 4,
    "limits": SMALL_LIMITS,
}
QUERIES, DOCUMENTS = {"train": 12, "dev": 8, "test": 8}, 8


def msrd_rows() -> list[dict[str, str]]:
    """Judged pairs of real queries that BM25 ranks badly, so that models of a minute's training are not refused."""
    corpus = {}
    for line in (MSRD / "corpus.jsonl").read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        corpus[document["_id"]] = (document["title"], " ".join(document["text"].split()[:25]))
    texts = [json.loads(line) for line in (MSRD / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    query_of = {query["_id"]: query["text"] for query in texts}
    judged: dict[str, dict[str, list[str]]] = {}
    for line in (MSRD / "qrels" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:20000]:
        query_id, doc_id, grade = line.split("\t")
        judged.setdefault(query_id, {"0": [], "1": []})["1" if int(grade) else "0"].append(doc_id)
    half = DOCUMENTS // 2
    lists = {q: ids["1"][:half] + ids["0"][:half] for q, ids in judged.items() if min(map(len, ids.values())) >= half}
    pairs = [(q, d) for q, documents in lists.items() for d in documents]
    grades = np.tile([1] * half + [0] * half, len(lists))
    titles, summaries = zip(*(corpus[d] for _, d in pairs))
    scores = bm25_scores([query_of[q] for q, _ in pairs], titles, summaries)
    order = Random(0).sample(range(len(pairs)), len(pairs))  # ties must not fall to the relevant documents
    groups = np.repeat(np.arange(len(lists)), DOCUMENTS)
    quality = JudgedRanking(scores[order], grades[order], groups[order], len(lists)).ndcg(5)
    worst = [list(lists)[number] for number in np.argsort(quality, kind="stable")[: sum(QUERIES.values())]]
    grade_of = dict(zip(pairs, grades))
    return [
        {"query": query_of[q], "title": corpus[d][0], "summary": corpus[d][1], "grade": str(grade_of[q, d])}
        for q in worst
        for d in lists[q]
    ]


def made_up_rows() -> list[dict[str, str]]:
    """Where MSRD is not: queries whose words stand in no document, so BM25 knows nothing of them."""
    rng = Random(0)
    animals = ["horse", "cow", "sheep", "goat", "pig", "hen", "duck", "goose", "rabbit", "donkey", "mule", "ox"]
    rows = []
    for _ in range(sum(QUERIES.values())):
        # no two queries alike: of those near a held-out one the judgments are left out
        query = " ".join("".join(rng.choices("abdefgiklmnoprstuvz", k=7)) for _ in range(2))
        for place in range(DOCUMENTS):
            name = rng.choice(animals)
            title, grade = (f"{name} in stable {place}", "1") if place % 2 else (f"engine part {place}", "0")
            rows.append({"query": query, "title": title, "grade": grade})
    return rows


def write_table(path: Path) -> None:
    """judgments.csv with a split per query."""
    rows = msrd_rows() if MSRD.is_dir() else made_up_rows()
    splits = [split for split, count in QUERIES.items() for _ in range(count * DOCUMENTS)]
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["query", "title", "summary", "grade", "split"], restval="")
        writer.writeheader()
        writer.writerows({**row, "split": split} for row, split in zip(rows, splits, strict=True))


def lay_out(folder: Path) -> None:
    """A working folder in which the printed paths mean the repository's programs, with small settings."""
    write_small_configs(folder, "baseline_minilm.yaml", SMALL_TRAINING)
    write_small_configs(folder, "student_minilm.yaml", SMALL_TRAINING | {"judged_epochs": 0.5})
    for name in ("build", "loadtest"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "clients").mkdir()
    for path in (ROOT / "clients").iterdir():
        (folder / "clients" / path.name).symlink_to(path)


@contextmanager
def running(command: str, folder: Path, address: str, environment: dict[str, str]) -> Iterator[None]:
    """A server of the recipe, from its readiness to the end of the block."""
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=folder, env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + 240
        while not answers(address):
            assert server.poll() is None and time.monotonic() < end, (folder / "server.log").read_text()[-4000:]
            time.sleep(0.3)
        yield
    finally:
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=30):
            return True
    except OSError:
        return False


@pytest.mark.timeout(3000)  # some three minutes where nothing else runs
def test_the_recipe_of_the_readme_leads_from_a_csv_to_a_report(tmp_path):
    lay_out(tmp_path)
    write_table(tmp_path / "judgments.csv")
    http, grpc, metrics, router = free_ports(4)
    addresses = {
        "tritonserver": "--http-address=127.0.0.1 --grpc-address=127.0.0.1 --metrics-address=127.0.0.1 "
        f"--http-port={http} --grpc-port={grpc} --metrics-port={metrics}",
        "locust": f"--grpc-url 127.0.0.1:{grpc} --metrics-url 127.0.0.1:{metrics}",
        "python clients/ab_router.py": f"--url 127.0.0.1:{grpc} --port {router}",
        "python clients/simulate_traffic.py": f"--router http://127.0.0.1:{router}",
    }
    ready = {
        "tritonserver": f"http://127.0.0.1:{http}/v2/health/ready",
        "python clients/ab_router.py": f"http://127.0.0.1:{router}/health",
    }
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    with_servers = []
    changed = set()
    try:
        for printed in RECIPE.splitlines():
            command = printed.partition("   #")[0]
            for large, small in SMALL_LOADS.items():
                if large in command:
                    command, _ = command.replace(large, small), changed.add(large)
            program = next((name for name in addresses if command.startswith(name)), "")
            background = command.endswith(" &")
            command = f"{command.removesuffix(' &')} {addresses.get(program, '')}"
            if background:
                server = running(command, tmp_path, ready[program], environment)
                server.__enter__()
                with_servers.append(server)
                continue
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{printed}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    finally:
        for server in reversed(with_servers):
            server.__exit__(None, None, None)
    assert changed == set(SMALL_LOADS) and len(with_servers) == 2
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "student" in report and "baseline" in report
    manifest = json.loads((tmp_path / "model_repository" / "student" / "1" / "manifest.json").read_text())
    assert [c["opponent"] for c in manifest["quality"]["alone"]] == ["bm25", "baseline version 1"]
    assert manifest["quality"]["objections"] == [] and manifest["accept_worse"] == ""
