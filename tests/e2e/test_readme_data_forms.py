"""Collections as people have them, each through the README's commands as printed, from its files to the evaluation.

What comes after it (builds, servers, router, report) does not depend on the form of the data;
`test_readme_recipe.py` goes through it with a table of grades alone.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow as pa
import pytest

from benchmarks.teacher.labelling_corpus import stub_servers
from ranking.schema import TABLES, read_table, write_table
from tests.helpers.readme import SMALL_LIMITS, block_with, run_in_process, settings_of, write_small_configs
from tests.helpers.tiny_student import make_student

COLOURS = ("red", "blue", "green", "fast", "slow", "secret")
THINGS = ("film", "ship", "house", "train", "robot", "island", "doctor")
QUERIES = {f"q{i}": f"{COLOURS[i % 6]} {THINGS[i // 6]}" for i in range(40)}
DOCUMENTS = {
    f"d{i}": (f"{colour} {thing}", f"a {thing} that is {colour} in winter")
    for i, (colour, thing) in enumerate((colour, thing) for colour in COLOURS for thing in THINGS)
}
RECIPE = [line for line in block_with("table:judgments.csv") if line.startswith("python -m training.")]
WITH_A_DECODER = block_with("training.pretrain_teacher")
LISTED = 6


def judged(grades: Callable[[int], str]) -> list[dict[str, str]]:
    """Six documents a query: the one that is meant, two that share a word with the query, three that share none."""
    rng = Random(0)
    rows = []
    for query_id, query in QUERIES.items():
        words = set(query.split())
        shared = {d: len(words & set(title.split())) for d, (title, _) in DOCUMENTS.items()}
        chosen = [d for d in shared if shared[d] == 2]
        chosen += rng.sample([d for d in shared if shared[d] == 1], 2)
        chosen += rng.sample([d for d in shared if not shared[d]], LISTED - len(chosen))
        for doc_id in chosen:
            row = {"query_id": query_id, "query": query, "doc_id": doc_id, "grade": grades(shared[doc_id])}
            rows.append(row | dict(zip(("title", "summary"), DOCUMENTS[doc_id])))
    return [row for row in rows if row["grade"]]


def table(folder: Path, grades: Callable[[int], str]) -> str:
    """judgments.csv without a split, as the README names it."""
    names = ["query", "title", "summary", "grade"]
    with (folder / "judgments.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(judged(grades))
    return "table:judgments.csv"


def beir(folder: Path, grades: Callable[[int], str], split: str = "test") -> str:
    """A BEIR folder with one split."""
    rows = judged(grades)
    (folder / "theirs" / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": d, "title": title, "text": text}) for d, (title, text) in DOCUMENTS.items()]
    (folder / "theirs" / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"_id": q, "text": text}) for q, text in QUERIES.items()]
    (folder / "theirs" / "queries.jsonl").write_text("\n".join(lines) + "\n")
    lines = [
        "query-id\tcorpus-id\tscore",
        *("\t".join(row[c] for c in ("query_id", "doc_id", "grade")) for row in rows),
    ]
    (folder / "theirs" / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return "beir:theirs --resplit"  # as README and the program's own warning say for a collection of one split


FORMS: dict[str, Callable[[Path], str]] = {
    "a BEIR folder with test alone": lambda folder: beir(folder, ["0", "1", "2"].__getitem__),
    "positives only": lambda folder: table(folder, ["", "1", "1"].__getitem__) + " --negatives 20",
    "thirds as grades": lambda folder: table(folder, ["1", "2.33", "3"].__getitem__),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """What stands in for MiniLM-L6 as a start: a BERT of two narrow layers."""
    return make_student(tmp_path_factory.mktemp("encoder") / "start")


@pytest.fixture
def workplace(tmp_path, encoder, monkeypatch) -> Path:
    """A folder with the configurations that the README names, each cut to a few steps; the working directory."""
    few = {"epochs": 1, "least_steps": 2, "batch_groups": 4, "limits": SMALL_LIMITS, "init": str(encoder)}
    write_small_configs(tmp_path, "baseline_minilm.yaml", few)
    write_small_configs(tmp_path, "student_minilm.yaml", few | {"judged_epochs": 0.5})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("form", FORMS)
def test_a_collection_goes_through_the_commands_to_its_evaluation(workplace, capsys, form):
    source = FORMS[form](workplace)
    for line in RECIPE:
        run_in_process(line.replace("table:judgments.csv", source))
    shown = capsys.readouterr().out
    assert all(f"| {system}" in shown for system in ("bm25", "teacher", "baseline", "student"))
    judgments = {split: read_table(f"data/mine/judgments/{split}.parquet", "judgments") for split in ("train", "test")}
    assert all(len(rows) for rows in judgments.values())


def write_log(path: Path) -> None:
    """Sixty users' pages for every query; they click what they meant, and look at the first positions more often."""
    rng = Random(1)
    rows: dict[str, list] = {name: [] for name in TABLES["events"].schema.names}
    for query_id, query in QUERIES.items():
        for user in range(60):
            shown = rng.sample(list(DOCUMENTS), LISTED)
            for position, doc_id in enumerate(shown, 1):
                shared = len(set(query.split()) & set(DOCUMENTS[doc_id][0].split()))
                clicked = rng.random() < shared / 2 / position
                values = {
                    "request_id": f"{query_id}-{user}", "doc_id": doc_id, "user_id": f"u{user}", "query": query,
                    "timestamp": 1_700_000_000_000_000 + user * 10**9, "position": position, "clicked": clicked,
                    "title": DOCUMENTS[doc_id][0], "summary": DOCUMENTS[doc_id][1],
                    "dwell_seconds": 60.0 if clicked else 0.0, "arm": "",
                }  # fmt: skip
                for name in rows:
                    rows[name].append(values[name])
    path.parent.mkdir()
    write_table(path, "events", pa.table(rows, TABLES["events"].schema))


def test_grades_and_a_click_log_go_through_the_commands_of_a_decoder_teacher(workplace):
    source = table(workplace, ["0", "1", "2"].__getitem__)
    write_log(workplace / "logs" / "november.parquet")
    few = {"epochs": 1, "batch_groups": 8, "precision": "fp32", "gradient_checkpointing": False, "loader_workers": 0}
    decoder = {"model": None, "from_scratch": "1M", "vocabulary": 600, "limits": SMALL_LIMITS, "held_out": 0.3}
    write_small_configs(workplace, "pretrain_0.5b_24gb.yaml", few | decoder)
    write_small_configs(workplace, "finetune_0.5b_24gb.yaml", few)
    run_in_process(RECIPE[0].replace("table:judgments.csv", source))
    for line in WITH_A_DECODER:
        if line.startswith("tritonserver"):
            continue  # a stub stands in for it: tests/e2e/test_served_teacher.py has the real one
        if "label_corpus" not in line:
            run_in_process(line)
            continue
        folder = settings_of(line)[1].teacher
        with stub_servers(1, next(folder.glob("*/checkpoint")).resolve()) as (url,):
            run_in_process(f"{line} --url {url}")
    (distil,) = [line for line in RECIPE if "distill_student" in line]
    run_in_process(f"{distil} --teacher runs/mine/teacher")
    manifest = json.loads(Path("runs/mine/labels/manifest.json").read_text(encoding="utf-8"))
    assert (
        sum(run["pairs"] for run in manifest["runs"])
        == read_table("data/mine/candidates.parquet", "candidates").num_rows
    )
    assert Path("runs/mine/student/ranker.json").is_file()
