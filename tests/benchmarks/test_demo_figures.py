"""A demo run's summary as tables: of a run with an A/B test, and of one that ended with `do not ship`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.demo_figures import Config, main
from ranking.errors import InputError

QUALITY = {
    name: {"ndcg@5": value, "pnr": 10 * value}
    for name, value in {"bm25": 0.4966, "baseline": 0.6744, "teacher": 0.8418, "student": 0.8112}.items()
}
REFUSED: dict[str, Any] = {
    "quality": QUALITY,
    "labelling": {"pairs": 80_000, "pairs_per_second": 861.2, "rejected": 0, "lost": 1, "duplicated": 2},
    "do_not_ship": "nothing beats BM25",
    "stages": {"data": {"seconds": 30.0}, "student": {"seconds": 90.0}},
}
LIFT = {"lift": 0.051, "low": 0.03, "high": 0.071, "p": 0.00001}
PUBLISHED = {key: value for key, value in REFUSED.items() if key != "do_not_ship"} | {
    "quality": {**QUALITY, "student + bm25": {"ndcg@5": 0.8201, "pnr": 8.0}},
    "student against baseline": {"lead": 0.137, "low": 0.12, "high": 0.15, "p": 0.0123, "queries": 500},
    "serving": {"student": {"p50_ms": 10.04, "p99_ms": None, "errors": 3}},
    "ab": {"page_ctr": LIFT, "user_ctr": {**LIFT, "lift": None}, "dwell": LIFT, "srm_p": 0.8},
}


def printed(summary: dict[str, Any], folder, capsys) -> list[str]:
    (folder / "summary.json").write_text(json.dumps(summary))
    main(Config(folder))
    return capsys.readouterr().out.splitlines()


def test_a_run_with_an_ab_test_has_all_its_figures(tmp_path, capsys):
    lines = printed(PUBLISHED, tmp_path, capsys)
    assert "| NDCG@5, 500 test queries | 0.497 | 0.674 | 0.842 | 0.811 |" in lines
    assert "| PNR | 4.97 | 6.74 | 8.42 | 8.11 |" in lines
    for line in (
        "| student over baseline, NDCG@5 | +0.137 [+0.120, +0.150], p 0.0123 |",
        "| student with BM25 as prior, NDCG@5 | 0.820 |",
        "| labels | 80,000 at 861 a second; 1 lost, 2 duplicated, 0 rejected |",
        "| 24 documents from the student | p50 10.0 ms, p99 failed, 3 errors |",
        "| A/B, page CTR | +5.1% [+3.0%, +7.1%], p < 0.0001 |",
        "| A/B, user CTR | no lift |",
        "| stages | 2.0 minutes in sum: data 30 s, student 90 s |",
    ):
        assert line in lines


def test_a_run_that_ended_before_publishing_says_why(tmp_path, capsys):
    lines = printed(REFUSED, tmp_path, capsys)
    assert "| do not ship | nothing beats BM25 |" in lines
    assert "| NDCG@5 | 0.497 | 0.674 | 0.842 | 0.811 |" in lines
    assert not any("A/B" in line for line in lines)


def test_a_folder_without_a_finished_run_is_named(tmp_path):
    with pytest.raises(InputError, match=r"summary.json: no such file; `make demo OUT="):
        main(Config(tmp_path))
