"""The commands of the pages in docs/, as printed and in the pages' order, in one folder of tiny data and models.

Of the commands that begin with `python`, one that needs what this machine lacks, or is a server, is in ELSEWHERE with
the test of its program; every other one runs here. Only sizes are changed, by flags behind the printed ones, and
addresses of servers.
"""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.teacher.labelling_corpus import stub_servers
from demo.run import SMALL_WORLD
from ranking.schema import read_table, write_table
from tests.helpers.ab_logs import exposures, save
from tests.helpers.foreign_encoders import make_encoder
from tests.helpers.foreign_rerankers import make_reranker
from tests.helpers.logs_of_others import ga4_event, lines, ubi_event, ubi_query
from tests.helpers.readme import ROOT, SMALL_LIMITS, commands_of, run_in_process, settings_of, write_small_configs
from tests.helpers.tiny_student import make_student

# what a command has that cannot run here -> the test of its program
ELSEWHERE = {
    "clients/ab_router.py": "tests/e2e/test_readme_recipe.py",  # a server
    "clients/ab_compact.py": "tests/e2e/test_readme_recipe.py",  # as printed, on the router's own log
    "clients/ab_forecast.py": "tests/clients/ab/forecast/test_forecast.py",  # needs a shadow's days
    "clients/ab_watch.py": "tests/clients/ab/watch/test_watch.py",  # needs days of an arm
    "clients/search_page.py": "tests/e2e/test_screens.py",  # a server
    "demo.engine_page": "tests/e2e/test_screens.py",  # a server
    "clients/rerank.py": "tests/e2e/test_rerank_clients.py",  # asks a server
    "--target tensorrt": "tests/build/test_build_student.py",  # its engine is built in a container with a GPU
    "--url host1:8001": "tests/e2e/test_students.py",  # two hosts
    "--teacher-kind ranker": "tests/clients/labelling/test_ranker_teacher.py",  # asks an arm that a server has loaded
    "--engine ray": "tests/clients/labelling/test_label_corpus.py",  # a cluster
    "--engine spark": "tests/e2e/test_log_engines.py",  # a cluster
    "s3://": "tests/clients/labelling/test_labels_in_a_bucket.py",  # a bucket
    "demo.retrain": "tests/demo/test_retrain.py",  # stage by stage; all of it runs in benchmarks/loop.py
    "demo.label_rounds": "tests/demo/test_label_rounds.py",  # starts programs of its own
    "loadtest/compare.py": "tests/loadtest/test_results.py",  # two load tests
}
# in the order in which one page makes what another one reads
PAGES = ["world", "teacher", "serving-teacher", "labelling", "students", "clicks", "data", "build", "foreign-teachers"]
PAGES += ["integrations", "ab-report", "scale"]
# sizes of a test, by flags behind the printed ones
SMALLER = {
    "--source world": " ".join([*SMALL_WORLD, "--world.judged_documents=16"]),
    "training.blend_labels": "--max-tokens 24",
    "build/build_teacher.py": "--engine-args.enforce_eager true",
    "build/build_student.py": "--accept-worse random-weights",
    "--out runs/baseline ": "--epochs 0.3 --batch-groups 4",
    "--out runs/student ": "--epochs 0.3 --batch-groups 4",
    "--out runs/world/student": "--epochs 0.2 --match-steps 2 --vocabulary-size 500",
    "--chunks 16": "--epochs 0.2 --least-steps 2",
    "--exclude data/shop": "--queries 20",
}
STEPS = {"epochs": 1, "least_steps": 2, "batch_groups": 4, "group_documents": 4, "limits": SMALL_LIMITS}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Iterator[Path]:
    """The working directory of all commands, with the files that people have before them."""
    folder = tmp_path_factory.mktemp("pages")
    encoder = make_student(folder / "runs" / "bert-6")
    write_small_configs(folder, "*_minilm.yaml", STEPS | {"init": str(encoder)})
    write_small_configs(folder, "student_minilm.yaml", STEPS | {"init": str(encoder), "judged_epochs": 0.5})
    write_small_configs(folder, "pretrain_small.yaml", {"epochs": 0.2, "vocabulary": 600, "limits": SMALL_LIMITS})
    write_small_configs(folder, "*likelihood_small.yaml", {"epochs": 1})
    write_small_configs(folder, "finetune_small.yaml", {"epochs": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def lay_out_shop() -> None:
    """After world.md and clicks.md's first need: the same collection under the names that other pages give theirs."""
    for place in ("data/shop", "data/NAME", "data/reports"):
        shutil.copytree("data/world", place)
    for place, source in (("logs", "events"), ("pool", "candidates")):
        Path(place).mkdir()
        shutil.copy(f"data/world/{source}.parquet", f"{place}/2026-11.parquet")
    for encoder in ("shop/encoder", "NAME/student", "NAME/small"):
        make_student(Path("runs", encoder))


def label(command: str) -> None:
    """A labelling command that asks a stub of the teacher, into a folder that holds no labels yet."""
    shutil.rmtree(settings_of(command)[1].out, ignore_errors=True)
    with stub_servers(1, Path("runs/teacher").resolve()) as (url,):
        run_in_process(f"{re.sub(r' --url [^ ]+', '', command)} --url {url}")


def lay_out_files_of_others() -> None:
    """A shop's table with columns of its own, a BEIR folder, and a teacher's labels of judged pairs."""
    judged = read_table("data/world/judgments/train.parquet", "judgments").to_pylist()
    names = {"query": "search_term", "doc_id": "sku", "title": "name", "summary": "description", "grade": "label"}
    with Path("judged.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(names.values()))
        writer.writeheader()
        writer.writerows({theirs: row[ours] for ours, theirs in names.items()} for row in judged)
    Path("msrd/qrels").mkdir(parents=True)
    corpus = {row["doc_id"]: {"_id": row["doc_id"], "title": row["title"], "text": row["summary"]} for row in judged}
    lines(Path("msrd/corpus.jsonl"), list(corpus.values()))
    queries = {row["query_id"]: row["query"] for row in judged}
    lines(Path("msrd/queries.jsonl"), [{"_id": query_id, "text": query} for query_id, query in queries.items()])
    last = list(queries)[-8:]
    for split, chosen in (("train", set(queries) - set(last)), ("test", set(last))):
        rows = [f"{row['query_id']}\t{row['doc_id']}\t{row['grade']}" for row in judged if row["query_id"] in chosen]
        table = "\n".join(["query-id\tcorpus-id\tscore", *rows])
        Path(f"msrd/qrels/{split}.tsv").write_text(table + "\n", encoding="utf-8")
    test = read_table("data/NAME/judgments/test.parquet", "judgments").drop_columns("grade")
    write_table("judged.parquet", "candidates", test)
    shutil.rmtree("runs/labels")
    label("python clients/label_corpus.py --candidates judged.parquet --out runs/labels --url localhost:8001")


def lay_out_logs_of_others() -> None:
    """One search with a click, as UBI and as GA4 write it."""
    lines(Path("products.jsonl"), [{"doc_id": d, "title": f"title {d}", "summary": "a thing"} for d in "abc"])
    lines(Path("ubi_queries.ndjson"), [ubi_query(1)])
    lines(Path("ubi_events.ndjson"), [ubi_event(1, "b", 10)])
    Path("ga4").mkdir()
    day = [ga4_event("view_item_list", 0, ["a", "b"], "night train"), ga4_event("select_item", 30, ["b"])]
    lines(Path("ga4/2026-11.ndjson"), day)


def lay_out_labels() -> None:
    """The labels of labelling.md by the names of other pages' examples."""
    for place in ("labels", "labels-qwen3", "labels-m3", "reports/labels"):
        shutil.copytree("runs/world/labels", f"runs/{place}")


def lay_out_models() -> None:
    """What people download: a Qwen3 reranker, and an encoder as bge-reranker-v2-m3."""
    shutil.rmtree("runs/world/labels")  # of labelling.md
    make_reranker(Path("models/Qwen3-Reranker-0.6B"), "qwen3-reranker")
    make_encoder(Path("models/bge-reranker-v2-m3"), "xlm-roberta")
    pairs = read_table("data/world/candidates.parquet", "candidates").select(["query_id", "doc_id"])
    scores = pa.table([*pairs.columns, pa.array(range(len(pairs)), pa.float64())], names=["qid", "pid", "logit"])
    pq.write_table(scores, "scores.parquet")


PREPARE = {
    "labelling": lay_out_shop,
    "students": lay_out_labels,
    "data": lay_out_files_of_others,
    "foreign-teachers": lay_out_models,
    "integrations": lay_out_logs_of_others,
    "ab-report": lambda: save(Path("runs/ab/data"), exposures()),
}


def commands_to_run(page: str) -> Iterator[str]:
    """The page's commands that run here, a loop of the shell as the commands that it makes."""
    path = ROOT / "docs" / f"{page}.md"
    for command in commands_of(path):
        if "--train-share 1" in command:
            (shares,) = re.findall(r"for share in ([\d. ]+);", path.read_text(encoding="utf-8"))
            for share in shares.split():
                yield command.replace("--train-share 1", f"--train-share {share}").replace("-1", f"-{share}")
        elif not any(part in command for part in ELSEWHERE):
            yield command


@pytest.mark.timeout(3000)  # a minute or two where nothing else runs
def test_the_commands_of_the_pages_run_as_printed(workplace):
    for page in PAGES:
        PREPARE.get(page, lambda: None)()
        for command in commands_to_run(page):
            small = " ".join([command, *(flags for part, flags in SMALLER.items() if part in f"{command} ")])
            run = label if "clients/label_corpus.py" in command else run_in_process
            print(small, flush=True)  # what a failure shows last
            run(small)


def test_every_command_of_the_pages_runs_here_or_in_a_test_that_is_named():
    pages = sorted((ROOT / "docs").glob("*.md"))
    assert [page.stem for page in pages if page.stem not in PAGES and list(commands_to_run(page.stem))] == []
    commands = [command for page in pages for command in commands_of(page)]
    assert [part for part in ELSEWHERE if not any(part in command for command in commands)] == []
    assert [part for part in SMALLER if not any(part in f"{command} " for command in commands)] == []
    for part, path in ELSEWHERE.items():
        programs = {settings_of(command)[0].__name__.rpartition(".")[2] for command in commands if part in command}
        words, text = {*programs, part.split()[-1]}, (ROOT / path).read_text(encoding="utf-8")
        assert "readme" in path or any(word in text for word in words), (part, path)
