"""The gate's second question on scores made by hand: is an arm worse than what ranks today? What is a prior worth?"""

from __future__ import annotations

import json

import numpy as np
import pyarrow.compute as pc
import pytest

from build import build_student, releases
from build.build_student import Config
from build.gate import GateLimits, Reference
from build.judged_pairs import read_judged
from build.quality_gate import JUDGED_SCORES_NAME, kept_scores, measure_quality, save_scores
from ranking.errors import InputError, Refused
from ranking.prior import PriorBlend
from ranking.prior_fit import fit_prior
from ranking.schema import read_table, write_table
from ranking.text import StudentFormat
from tests.helpers.tiny_student import make_judged

QUERIES, DOCUMENTS = 60, 10
GROUPS = np.repeat(np.arange(QUERIES), DOCUMENTS)
RNG = np.random.default_rng(5)
GRADES = RNG.integers(0, 3, QUERIES * DOCUMENTS)


def ranker(noise: float, seed: int) -> np.ndarray:
    """Scores that know the grades but for noise."""
    return (GRADES + noise * np.random.default_rng(seed).normal(size=len(GRADES))).astype(np.float32)


def reference(scores: np.ndarray) -> Reference:
    return Reference(scores, GRADES, GROUPS, [f"query {q}" for q in range(QUERIES)])


def report(scores, first_stage, callers_send_prior=False, max_loss=0.0, **opponents):
    limits = GateLimits(max_loss=max_loss)
    return measure_quality(reference(scores), first_stage, "bm25", opponents, limits, callers_send_prior)


def test_a_useless_arm_is_refused_and_the_prior_named_as_the_way_out():
    found = report(ranker(50, 1), ranker(0.7, 2))
    assert found.alone[0].high < 0 and found.objections[0].startswith("worse than bm25: NDCG@5 0.")
    assert found.prior.weight == 1.0
    assert "with bm25 as prior (weight 1) it is not worse" in found.refusal("student")
    assert '--accept-worse "REASON"' in found.refusal("student")


def test_an_arm_whose_callers_send_the_prior_is_judged_with_it():
    found = report(ranker(50, 1), ranker(0.7, 2), callers_send_prior=True)
    assert found.objections == [] and found.with_prior[0].difference == pytest.approx(0, abs=0.02)


def test_an_arm_that_cannot_be_told_from_the_first_stage_passes():
    found = report(ranker(1.0, 2), ranker(1.0, 4))
    assert found.objections == [] and found.alone[0].low < 0 < found.alone[0].high


def test_an_arm_is_refused_for_the_one_that_serves_now():
    found = report(ranker(1.5, 1), ranker(3.0, 2), **{"student version 3": ranker(0.3, 3)})
    assert [o.split(":")[0] for o in found.objections] == ["worse than student version 3"]
    assert found.alone[0].low > 0
    allowed = report(ranker(1.5, 1), ranker(3.0, 2), max_loss=0.9, **{"student version 3": ranker(0.3, 3)})
    assert allowed.objections == []


def test_two_halves_of_the_truth_make_a_better_blend():
    first, second = ranker(1.5, 1), ranker(1.5, 2)
    prior, honest = fit_prior(first, second, GRADES, GROUPS, QUERIES)
    assert 0.2 <= prior.weight <= 0.8
    found = report(first, second)
    assert found.with_prior[0].ndcg5 == pytest.approx(honest.mean()) and found.with_prior[0].low > 0


def test_a_prior_without_information_gets_no_weight():
    prior, _ = fit_prior(ranker(0.1, 1), ranker(500, 2), GRADES, GROUPS, QUERIES)
    assert prior.weight == 0
    assert fit_prior(ranker(1, 1), np.full(len(GRADES), np.nan, np.float32), GRADES, GROUPS, QUERIES)[0].weight == 0


def test_only_queries_that_both_were_scored_on_are_compared(caplog):
    def known(queries: int) -> np.ndarray:
        theirs = ranker(0.3, 3)
        theirs[queries * DOCUMENTS :] = np.nan
        theirs[0] = np.nan  # of a query whose other documents have scores
        return theirs

    assert [c.queries for c in report(ranker(1.5, 1), ranker(3.0, 2), older=known(40)).alone] == [60, 39]
    assert "of these 60 queries alone" not in caplog.text
    assert report(ranker(1.5, 1), ranker(3.0, 2), older=known(25)).alone[1].queries == 24
    assert "older was gated on 24 of these 60 queries alone" in caplog.text
    for few in (20, 4, 0):  # seen: an arm that was much worse passed, since nothing is clear on three queries
        with pytest.raises(InputError, match=f"older was gated on {max(few - 1, 0)} of these 60 queries with the same"):
            report(ranker(1.5, 1), ranker(3.0, 2), older=known(few))


def test_a_first_stage_of_few_of_the_judged_pairs_is_told(caplog):
    """Seen: a file with priors of 2% of the pairs passed for the first stage without a word."""
    first_stage = ranker(0.7, 2)
    assert report(ranker(1.5, 1), first_stage).first_stage_coverage == 1 and "judged pairs" not in caplog.text
    first_stage[12:] = np.nan
    assert report(ranker(1.5, 1), first_stage).first_stage_coverage == 0.02
    assert ("WARNING", "gate: bm25 has a score of 2% of the judged pairs") in [
        (record.levelname, record.message) for record in caplog.records
    ]


@pytest.fixture
def judged(data, checkpoint):
    """A function (dataset folder) that draws its judged pairs."""
    return lambda folder=data: read_judged(folder, "dev", StudentFormat.of_checkpoint(checkpoint), 200)


def test_a_versions_scores_come_back_by_text_whatever_the_ids_are(judged, data, tmp_path):
    """Seen: a dataset with the same ids and other texts got the old arm's scores of the old texts."""
    mine, place = judged(), tmp_path / "student" / "1"
    save_scores(place / JUDGED_SCORES_NAME, mine, np.arange(len(mine.grades), dtype=np.float32))
    assert kept_scores(tmp_path, "student", 1, mine).tolist() == list(range(len(mine.grades)))
    assert np.isnan(kept_scores(tmp_path, "student", 1, judged(make_judged(tmp_path / "others", seed=5)))).all()
    renamed, path = make_judged(tmp_path / "renamed"), tmp_path / "renamed" / "judgments" / "dev.parquet"
    table = read_table(path, "judgments")
    ids = pc.binary_join_element_wise("new-", table.column("query_id"), "")
    write_table(path, "judgments", table.set_column(0, table.schema.field(0), ids))
    theirs, expected = judged(renamed), dict(zip(texts(mine), range(len(mine.grades))))
    assert set(theirs.table.column("query_id").to_pylist()).isdisjoint(mine.table.column("query_id").to_pylist())
    assert kept_scores(tmp_path, "student", 1, theirs).tolist() == [expected[text] for text in texts(theirs)]


def texts(judged) -> list[tuple[str, ...]]:
    return list(zip(*(judged.table.column(name).to_pylist() for name in ("query", "title", "summary"))))


def test_scores_that_an_earlier_release_kept_by_id_count_for_the_very_file_that_they_are_of(judged, tmp_path):
    mine, place = judged(), tmp_path / "student" / "1"
    place.mkdir(parents=True)
    ids = {f"{name}s": np.array(mine.table.column(name).to_pylist(), np.str_) for name in ("query_id", "doc_id")}
    np.savez_compressed(place / JUDGED_SCORES_NAME, scores=np.ones(len(mine.grades), np.float32), **ids)
    (place / releases.MANIFEST_NAME).write_text(json.dumps({"gate_data": {"fingerprint": mine.fingerprint}}))
    assert (kept_scores(tmp_path, "student", 1, mine) == 1).all()
    with pytest.raises(InputError, match=r"gated on another file of judgments, by an older release .* build it again"):
        kept_scores(tmp_path, "student", 1, judged(make_judged(tmp_path / "others", seed=5)))
    (place / JUDGED_SCORES_NAME).write_bytes(b"cut short")
    with pytest.raises(InputError, match="not the scores of judged pairs"):
        kept_scores(tmp_path, "student", 1, mine)


@pytest.fixture
def judged_by_itself(checkpoint, data, tmp_path, exported, monkeypatch):
    """A function that builds the tiny student on its data, its scores replaced by `scores` of the judged pairs."""

    def make(scores, data=data, **settings) -> None:
        monkeypatch.setattr(build_student, "export", lambda _, path: path.write_bytes(exported.read_bytes()) and path)
        if scores is not None:
            monkeypatch.setattr(build_student, "score_documents", lambda *_, **__: scores)
        limits = GateLimits(max_error=1e9, mean_error=1e9, min_tau=-1, max_ndcg_change=1)
        settings = {"precision": "fp32", "repository": tmp_path / "repository", "gate": limits} | settings
        build_student.main(Config(checkpoint, "student", "openvino", data, **settings))

    return make


def test_a_build_is_refused_or_published_with_the_reason(judged_by_itself, judged, tmp_path):
    good = judged().grades.astype(np.float32)
    repository = tmp_path / "repository"
    judged_by_itself(good)
    manifest = releases.manifest(repository, "student", 1)
    assert manifest["quality"]["alone"][0]["ndcg5"] == pytest.approx(1.0) and manifest["accept_worse"] == ""
    with pytest.raises(Refused, match=r"student is not published: worse than .*student version 1: NDCG@5"):
        judged_by_itself(-good)
    judged_by_itself(-good, accept_worse="a rollback drill")
    manifest = releases.manifest(repository, "student", 2)
    assert manifest["accept_worse"] == "a rollback drill" and len(manifest["quality"]["objections"]) >= 1
    assert PriorBlend(**manifest["quality"]["prior"]).weight > 0 and "judged_scores.npz" in manifest["files"]
    config = (repository / "student" / "2" / "config.pbtxt").read_text()
    assert 'key: "prior_weight"' in config and "optional: true" in config
    with pytest.raises(InputError, match="student version 2 was gated on 0 of these 12 queries with the same texts"):
        judged_by_itself(good, data=make_judged(tmp_path / "others", seed=5))
    with pytest.raises(InputError, match="--serves-now baseline: no version of it serves"):
        judged_by_itself(good, serves_now="baseline")
    (repository / "student" / "2" / JUDGED_SCORES_NAME).unlink()
    with pytest.raises(InputError, match="by an older release"):
        judged_by_itself(good)


def test_the_first_stage_may_be_a_file_of_ones_own(judged_by_itself, data, tmp_path):
    rows = read_table(data / "judgments" / "dev.parquet", "judgments")
    priors = rows.select(["query_id", "doc_id"]).append_column("prior", rows.column("grade").cast("float32"))
    write_table(tmp_path / "mine.parquet", "priors", priors)
    with pytest.raises(Refused, match=r"worse than first stage mine\.parquet: .* 1\.000"):
        judged_by_itself(None, first_stage=tmp_path / "mine.parquet")


def test_a_blank_reason_is_none():
    with pytest.raises(ValueError, match="accept_worse is blank"):
        Config("c", "student", "openvino", "d", accept_worse=" ")
