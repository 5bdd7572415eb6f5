"""The evaluation program on a small dataset: rows, tests, retention, agreement, calibration, and what it refuses."""

from __future__ import annotations

import json
import math
import re

import ir_measures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clients.labelling.candidate_file import CandidateFile
from clients.labelling.score_files import ScoreColumns, ScoreFile
from ranking.bm25 import bm25_scores, words
from ranking.errors import DataError, InputError
from ranking.metrics import JudgedRanking
from ranking.program import parse
from ranking.schema import write_table
from training import evaluate as program
from training.evaluate import Config, main, score_system
from training.evaluation.comparison import Judgments, compare
from training.evaluation.result_tables import disagreement_page, disagreements, table, teacher_table
from training.evaluation.trec_files import write_qrels, write_run
from training.sources.judged_collections import read_beir
from training.sources.row_readers import BadRows

QUERIES, DOCUMENTS = 40, 8


def judgment_rows() -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for q in range(QUERIES):
        for d in range(DOCUMENTS):
            grade = int(rng.integers(0, 5))
            text = " ".join(["word"] * grade + [f"filler{rng.integers(9)}"] * 3)
            rows.append(
                {"query_id": f"q{q}", "doc_id": f"d{d}", "query": f"word {q}"}
                | {"title": f"T{q}-{d}", "summary": text, "grade": grade}
            )
    return rows


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "set"
    table = pa.Table.from_pylist(judgment_rows()).cast(
        pa.schema(
        [(n, pa.string()) for n in ("query_id", "doc_id", "query", "title", "summary")] + [("grade", pa.int8())]
    )
    )  # fmt: skip
    for split in ("train", "dev", "test"):
        write_table(folder / f"judgments/{split}.parquet", "judgments", table)
    return folder


def test_judgments_and_rankings_travel_in_trecs_forms(data, tmp_path):
    """Written by the program; read by ir-measures and by this project's own readers of both forms."""
    write_labels(tmp_path / "labels.parquet", noise=1.0)
    beir = tmp_path / "beir"
    found = evaluate(
        data, tmp_path / "out", f"my teacher=labels:{tmp_path / 'labels.parquet'}", "random",
        write_qrels=beir / "qrels" / "test.qrels", write_runs=tmp_path / "runs",
    )  # fmt: skip
    run = tmp_path / "runs" / "my_teacher.run"
    assert run.read_text().splitlines()[0].split()[:2] == ["q0", "Q0"]
    qrels = list(ir_measures.read_trec_qrels(str(beir / "qrels" / "test.qrels")))
    aggregate = ir_measures.calc_aggregate([ir_measures.nDCG @ 5], qrels, ir_measures.read_trec_run(str(run)))
    ours = found["systems"]["my teacher"]["metrics"]["ndcg@5"]
    assert aggregate[ir_measures.nDCG @ 5] == pytest.approx(ours, abs=1e-6)

    rows = judgment_rows()
    corpus = {row["doc_id"]: {"_id": row["doc_id"], "title": row["title"], "text": row["summary"]} for row in rows}
    queries = {row["query_id"]: {"_id": row["query_id"], "text": row["query"]} for row in rows}
    for name, content in (("corpus", corpus), ("queries", queries)):
        (beir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content.values()))
    source = read_beir(beir, BadRows())
    assert source.judged["test"] == {(row["query_id"], row["doc_id"]): row["grade"] for row in rows}

    candidates = pa.Table.from_pylist([{k: v for k, v in row.items() if k != "grade"} for row in rows])
    write_table(tmp_path / "candidates.parquet", "candidates", candidates)
    labels = pq.read_table(tmp_path / "labels.parquet").to_pylist()
    with ScoreFile(run, ScoreColumns(), CandidateFile.open(tmp_path / "candidates.parquet"), tmp_path) as scored:
        back = pa.Table.from_batches(scored.scores())
    assert back.column("row").to_pylist() == list(range(len(rows)))
    assert back.column("score").to_pylist() == [np.float32(row["teacher_score"]) for row in labels]


@pytest.mark.parametrize("name, value", [("doc_id", "d 1"), ("query_id", "q\u00a01"), ("doc_id", "d\t1")])
def test_an_id_that_trecs_form_cannot_hold_is_refused_by_name(tmp_path, name, value):
    rows = [row | ({name: value} if number == 3 else {}) for number, row in enumerate(judgment_rows())]
    judgments = Judgments.of_table(pa.Table.from_pylist(rows))
    with pytest.raises(InputError, match=rf"test\.qrels: {name} {re.escape(repr(value))} .* white space"):
        write_qrels(tmp_path / "test.qrels", judgments)
    with pytest.raises(InputError, match=rf"{name} .* white space"):
        write_run(tmp_path / "a.run", judgments, np.zeros(len(rows), np.float32), "a")
    assert not list(tmp_path.iterdir())


def test_a_line_of_qrels_with_another_number_of_columns_is_told(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "dev.qrels").write_text("q1 0 d1 2\nq1 d2 1\n")
    with pytest.raises(DataError, match=r"dev\.qrels, row 2: 3 columns where TREC's qrels have 4"):
        read_beir(tmp_path, BadRows())


def write_labels(path, noise: float, rows=None) -> None:
    rng = np.random.default_rng(1)
    columns = [(r["query_id"], r["doc_id"], r["grade"] + noise * rng.normal(), "t") for r in rows or judgment_rows()]
    names = ("query_id", "doc_id", "teacher_score", "teacher_id")
    write_table(path, "labels", pa.table(dict(zip(names, map(list, zip(*columns))))))


def evaluate(data, out, *systems, **settings) -> dict:
    main(Config(data=data, system=list(systems), out=out, permutations=500, resamples=500, **settings))
    return json.loads((out / "evaluation.json").read_text(encoding="utf-8"))


def test_the_table_the_json_and_the_parquet_say_the_same(data, tmp_path, capsys):
    write_labels(tmp_path / "good.parquet", 0.5)
    out = tmp_path / "out"
    content = evaluate(data, out, "random", "bm25", f"teacher=labels:{tmp_path / 'good.parquet'}")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in printed[2:5]] == ["random", "bm25", "teacher"]
    systems = content["systems"]
    assert systems["random"]["metrics"]["ndcg@5"] < systems["bm25"]["metrics"]["ndcg@5"]
    per_query = pq.read_table(out / "per_query.parquet").to_pandas()
    for name, system in systems.items():
        own = per_query[per_query.system == name]
        assert len(own) == QUERIES
        assert own["ndcg@5"].mean() == pytest.approx(system["metrics"]["ndcg@5"])
        assert own.concordant.sum() / own.discordant.sum() == pytest.approx(system["metrics"]["pnr"])
        assert f"{system['metrics']['ndcg@5']:.4f}" in next(line for line in printed if line.startswith(f"| {name}"))
        low, high = system["interval_95"]["pnr"]
        assert low < system["metrics"]["pnr"] < high
    against = systems["teacher"]["against_first"]["ndcg_exp@5"]
    assert against["p"] < 0.01 and 0 < against["low"] < against["difference"] < against["high"]
    assert systems["random"]["against_first"] == {}
    scores = pq.read_table(out / "scores.parquet")
    judged = JudgedRanking(scores["bm25"], scores["grade"], scores["query_id"].to_pylist())
    assert judged.ndcg(10).mean() == pytest.approx(systems["bm25"]["metrics"]["ndcg@10"])


def test_retention_agreement_and_disagreements_refer_to_the_teacher(data, tmp_path):
    write_labels(tmp_path / "teacher.parquet", 0.6)
    write_labels(tmp_path / "student.parquet", 1.5)
    specs = [f"{n}=labels:{tmp_path / f'{n}.parquet'}" for n in ("teacher", "student")]
    out = tmp_path / "out"
    content = evaluate(data, out, "bm25", *specs, disagreements=3)
    assert content["teacher"] == "teacher"
    teacher, student = (content["systems"][n] for n in ("teacher", "student"))
    assert teacher["retention"]["ndcg@5"] == 1 and teacher["kendall_tau"] == pytest.approx(1)
    assert student["retention"]["pnr"] == pytest.approx(student["metrics"]["pnr"] / teacher["metrics"]["pnr"])
    assert 0.3 < student["kendall_tau"] < 0.95
    page = (out / "disagreements-student.md").read_text(encoding="utf-8")
    assert page.count("- grade ") == 3 and page.count("place ") == 7
    again = evaluate(data, tmp_path / "out2", "bm25", *specs, teacher="student")
    assert again["systems"]["student"]["kendall_tau"] == pytest.approx(1)
    with pytest.raises(InputError, match="--teacher nobody: no such row"):
        evaluate(data, tmp_path / "out3", "bm25", teacher="nobody")


def test_disagreements_ignore_scale_and_offset_and_spare_repeated_queries():
    judgments = Judgments.of_table(pa.Table.from_pylist(judgment_rows()))
    rng = np.random.default_rng(2)
    teacher = rng.normal(size=QUERIES * DOCUMENTS)
    student = 3 * teacher + 7 + judgments.groups  # another scale, another offset per query: the same ranking
    assert len(disagreements(teacher, 3 * teacher, judgments, 10)) == 0
    student[17] += 60
    student[18] -= 60
    student[19] += 60
    rows = disagreements(teacher, student, judgments, 10)
    assert set(rows[:2]) <= {17, 18, 19}
    assert (judgments.groups[rows] == judgments.groups[17]).sum() == 2
    page = disagreement_page(("teacher", "student"), (teacher, student), judgments, 1)
    assert "(query q2)" in page and "of 8" in page


def test_calibration_error_is_reported_before_and_after_the_map():
    judgments = Judgments.of_table(pa.Table.from_pylist(judgment_rows()))
    rng = np.random.default_rng(3)
    logits = judgments.grades + rng.normal(size=len(judgments.grades))
    knots = np.quantile(logits, np.linspace(0, 1, 9))
    shares = [float((judgments.grades >= 1)[np.abs(logits - k) < 0.7].mean()) for k in knots]
    fitted = {"kind": "isotonic", "scores": knots.tolist(), "probabilities": np.maximum.accumulate(shares).tolist()}
    result = compare(
        {"plain": logits, "mapped": 5 * logits - 10}, judgments, permutations=10, resamples=10,
        calibrations={"plain": None, "mapped": {**fitted, "scores": [5 * k - 10 for k in knots]}},
    )  # fmt: skip
    assert set(result["plain"].calibration) == {"before"}
    assert result["mapped"].calibration["after"] < 0.1 < result["mapped"].calibration["before"]


def test_a_system_without_discordant_pair_is_null_in_the_json(data, tmp_path):
    write_labels(tmp_path / "perfect.parquet", 0.0)
    content = evaluate(data, tmp_path / "out", "bm25", f"labels:{tmp_path / 'perfect.parquet'}")
    perfect = content["systems"]["perfect.parquet"]
    assert perfect["metrics"]["pnr"] is None and perfect["metrics"]["ndcg@5"] == 1.0
    assert all(math.isfinite(v) for v in perfect["interval_95"]["pnr"])


def test_what_cannot_be_evaluated_is_refused_in_one_line(data, tmp_path, monkeypatch):
    judgments = Judgments.of_table(pa.Table.from_pylist(judgment_rows()))
    write_labels(tmp_path / "part.parquet", 0.1, judgment_rows()[:-2])
    with pytest.raises(InputError, match=r"2 of 320 pairs have no label, the first is query 'q39', document 'd6'"):
        score_system(f"labels:{tmp_path / 'part.parquet'}", judgments, corpus=tmp_path)
    for bad in ("bm26", "checkpoint:", "x=labels"):
        with pytest.raises(InputError, match="is expected"):
            score_system(bad, judgments, corpus=tmp_path)
    with pytest.raises(InputError, match="nothing: no such folder"):
        score_system(f"checkpoint:{tmp_path / 'nothing'}", judgments, corpus=tmp_path)
    with pytest.raises(InputError, match="given twice"):
        evaluate(data, tmp_path / "out", "bm25", "bm25")
    with pytest.raises(InputError, match="no such file"):
        evaluate(tmp_path / "nowhere", tmp_path / "out", "bm25")
    # seen: said after every system had been scored, or two systems wrote one page of disagreements
    monkeypatch.setattr(program, "score_system", None)
    for systems, settings, said in (
        (["a", "a"], {}, "given twice"),
        (["a b", "a_b"], {}, "two systems would have one file"),
        (["grade"], {}, r"--system grade=\.\.\.: scores\.parquet has a column of that name"),
        (["a"], {"teacher": "b"}, "--teacher b: no such row; there are a"),
    ):
        with pytest.raises(InputError, match=said):
            evaluate(data, tmp_path / "out", *(f"{name}=bm25" for name in systems), **settings)
    spaced = [row | {"query_id": row["query"]} for row in judgment_rows()]
    table = pa.Table.from_pylist(spaced, pq.read_schema(data / "judgments/test.parquet"))
    write_table(data / "judgments/test.parquet", "judgments", table)
    with pytest.raises(InputError, match="query_id 'word 0' is empty or holds white space"):
        evaluate(data, tmp_path / "out", "bm25", write_runs=tmp_path / "runs")
    with pytest.raises(ValueError, match="system: at least one"):
        Config(data=data, system=[])


def test_checkpoints_are_rows_with_the_calibration_of_their_cards(data, tmp_path):
    from ranking.card import ScoreCard
    from tests.helpers.tiny_student import make_student
    from tests.helpers.tiny_teacher import make_teacher
    from training.evaluation.checkpoint_scores import score_pairs

    student, teacher = make_student(tmp_path / "student"), make_teacher(tmp_path / "teacher")
    card = ScoreCard.load(student)
    card.calibration = {"kind": "platt", "slope": 0.01, "intercept": 1.4}  # four of five documents are relevant
    card.save(student)
    content = evaluate(data, tmp_path / "out", "bm25", f"checkpoint:{student}", f"mine=checkpoint:{teacher}", queries=6)
    assert content["teacher"] == "mine" and list(content["systems"]) == ["bm25", "student", "mine"]
    error = content["systems"]["student"]["ece"]
    assert error["after"] < 0.12 < error["before"]
    assert set(content["systems"]["mine"]["ece"]) == {"before"} and content["systems"]["bm25"]["ece"] == {}
    scores = pq.read_table(tmp_path / "out/scores.parquet")
    rows = pq.read_table(data / "judgments/test.parquet").slice(0, len(scores))
    texts = [rows.column(name).to_pylist() for name in ("query", "title", "summary")]
    np.testing.assert_allclose(scores["student"].to_numpy(), score_pairs(student, *texts), atol=1e-5)
    assert (tmp_path / "out/disagreements-student.md").is_file()


def test_a_published_arm_is_one_system_on_the_command_line():
    """Seen: its checkpoint was taken for a system of its own, so that no command could name a published arm."""
    words = ["--system", "bm25,random", "--system", "x=published:repository/student,runs/student"]
    found = parse(Config, ["--data", "d", *words, "--system", "published:a", "--system", "y=checkpoint:c"]).system
    assert found == [
        "bm25", "random", "x=published:repository/student,runs/student", "published:a", "y=checkpoint:c"
    ]  # fmt: skip


def test_a_published_arm_is_a_row_with_its_prior(data, tmp_path):
    from ranking.card import fingerprint
    from tests.helpers.tiny_student import make_student

    student = make_student(tmp_path / "student")
    version = tmp_path / "arm" / "2"
    version.mkdir(parents=True)
    manifest = {
        "checkpoint": {"name": student.name, "fingerprint": fingerprint(student)},
        "quality": {"prior": {"weight": 1.0, "mean": 2.0, "spread": 0.5}, "first_stage": "bm25"},
    }
    (version / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "arm" / "promoted.json").write_text("[1, 2]")
    content = evaluate(data, tmp_path / "out", "bm25", f"student + prior=published:{tmp_path / 'arm'},{student}")
    alone, arm = (content["systems"][name]["metrics"] for name in ("bm25", "student + prior"))
    assert arm["ndcg@5"] == pytest.approx(alone["ndcg@5"]) and arm["pnr"] == pytest.approx(alone["pnr"])
    with pytest.raises(InputError, match=r"fitted on bm25, and first stage mine\.parquet is given"):
        evaluate(data, tmp_path / "o", f"published:{version},{student}", first_stage=tmp_path / "mine.parquet")
    (student / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"not what .* was built from"):
        evaluate(data, tmp_path / "o", f"published:{version},{student}")
    with pytest.raises(InputError, match="not a published arm"):
        evaluate(data, tmp_path / "o", f"published:{tmp_path},{student}")
    with pytest.raises(InputError, match="ARM,CHECKPOINT"):
        evaluate(data, tmp_path / "o", f"published:{tmp_path}")


def test_a_prior_is_weighted_on_dev_and_measured_on_test(data, tmp_path):
    from tests.helpers.tiny_student import make_student

    student = make_student(tmp_path / "student")  # random weights: all that ranks is the prior
    specs = ("bm25", f"alone=checkpoint:{student}", f"student + bm25=prior:{student}")
    content = evaluate(data, tmp_path / "out", *specs)
    found = {name: row["metrics"]["ndcg@5"] for name, row in content["systems"].items()}
    assert found["alone"] < found["bm25"] - 0.05
    assert found["student + bm25"] == pytest.approx(found["bm25"], abs=0.03)
    # the scores of a row that came before are not taken anew: the blend is the same without that row
    again = evaluate(data, tmp_path / "again", "bm25", specs[2])
    assert again["systems"]["student + bm25"]["metrics"] == content["systems"]["student + bm25"]["metrics"]
    with pytest.raises(InputError, match="fitted on dev"):
        evaluate(data, tmp_path / "o", specs[2], split="dev")


def test_queries_can_be_limited_and_tables_need_no_teacher(data, tmp_path):
    content = evaluate(data, tmp_path / "out", "bm25", "random", queries=5)
    assert (content["queries"], content["documents"], content["teacher"]) == (5, 40, None)
    judgments = Judgments.of_table(pa.Table.from_pylist(judgment_rows()))
    results = compare(
        {"a": judgments.grades, "b": -judgments.grades}, judgments, teacher="a", permutations=10, resamples=9
    )
    assert "-100" not in table(results, 40, "mrr") and "| b " in teacher_table(results, "a")


def test_bm25_ranks_by_rare_shared_words_and_knows_unspaced_scripts():
    assert words("Running SHOES, glass！") == ["running", "shoe", "glass"]
    assert words("跑步鞋 nike") == ["跑步", "步鞋", "nike"]
    titles = ["red shoes", "red hat", "red coat", "跑步鞋"]
    scores = bm25_scores(["red shoe"] * 3 + ["步鞋"], titles, [""] * 4)
    assert scores[0] > scores[1] == scores[2] > 0 and scores[3] > 0
    assert bm25_scores(["???", "zebra"], ["a b", "c d"], ["", ""]).tolist() == [0, 0]


def test_bm25_finds_a_word_whatever_undrawn_characters_and_digits_it_is_spelled_with():
    assert words("Wasch\u00admaschine \u200eA1") == words("Waschmaschine A1")
    assert words("क्\u200dया") == words("क्या") and words("辻\U000e0100本") == words("辻本")
    assert words("İstanbul") == ["istanbul"] and words("آيفون ١٥") == words("ايفون 15")
    assert words("کتاب\u200cها") == ["کتاب", "ها"]  # Persian endings are words of their own
