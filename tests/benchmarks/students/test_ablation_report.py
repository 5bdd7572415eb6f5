"""The ablation's table says what the stored scores say, and its page keeps what people wrote."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.students.ablation_report import write_report
from ranking.errors import InputError
from ranking.metrics import JudgedRanking, mean

BEATS = {"bm25": None, "teacher": "bm25", "student-hybrid": "bm25"}


@pytest.fixture
def results(tmp_path):
    """Two seeds of three systems: scores are grades plus noise, the less the better the system."""
    rows = []
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        folder = tmp_path / f"seed-{seed}" / "scores"
        folder.mkdir(parents=True)
        for name, noise in {"bm25": 6.0, "teacher": 0.5, "student-hybrid": 0.7}.items():
            row = {"row": name, "seed": seed}
            for split in ("dev", "test"):
                grades, groups = rng.integers(0, 5, 600), np.repeat(np.arange(60), 10)
                scores = grades + rng.normal(0, noise, 600)
                np.savez(folder / f"{name}-{split}.npz", scores=scores, grades=grades, groups=groups)
                judged = JudgedRanking(scores, grades, groups)
                row |= {f"{split}_ndcg@5": mean(judged.ndcg(5)), f"{split}_pnr": judged.pairs().pnr}
            rows.append(row)
    return rows


def cells(table: str, name: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_has_mean_spread_retention_and_a_paired_test_over_all_seeds(results, tmp_path):
    table = write_report(results, tmp_path, BEATS, None)
    values = [row["test_ndcg@5"] for row in results if row["row"] == "student-hybrid"]
    teacher = [row["test_ndcg@5"] for row in results if row["row"] == "teacher"]
    row = cells(table, "student-hybrid")
    assert row[1:3] == ["2", f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"]
    assert row[4] == f"{np.mean(np.array(values) / teacher):.1%}"
    assert row[6] == "bm25" and row[7].startswith("+") and float(row[8]) < 0.01
    assert cells(table, "bm25")[6:] == ["", "", ""]


def test_seeds_on_one_dataset_do_not_count_its_queries_twice(results, tmp_path):
    once = cells(write_report([row for row in results if row["seed"] == 1], tmp_path, BEATS, None), "teacher")
    for row in results:
        if row["seed"] == 2:
            kept = tmp_path / "seed-1/scores" / f"{row['row']}-test.npz"
            (tmp_path / "seed-2/scores" / f"{row['row']}-test.npz").write_bytes(kept.read_bytes())
    assert cells(write_report(results, tmp_path, BEATS, None), "teacher")[7] == once[7]


def test_the_page_keeps_the_words_around_its_table_and_gets_a_plot(results, tmp_path):
    report = tmp_path / "report"
    write_report(results[:3], tmp_path, BEATS, report)
    page = report / "ablation.md"
    page.write_text(page.read_text().replace("# Ablation", "Words before.\n# Ablation") + "\nWords after.\n")
    write_report(results, tmp_path, BEATS, report)
    text = page.read_text()
    assert "Words before." in text and "Words after." in text and text.count("| teacher |") == 1
    assert cells(text, "teacher")[1] == "2"
    assert (report / "ablation.png").read_bytes()[:4] == b"\x89PNG"


def test_worlds_are_joined_and_the_seeds_of_one_world_count_its_queries_once(results, tmp_path):
    """Two seeds on each of two worlds, three queries in ten with an intent that nothing was learnt of."""
    rows = []
    for row in results:
        for seed in (1, 2):
            kept = np.load(tmp_path / f"seed-{row['seed']}/scores/{row['row']}-test.npz")
            folder = tmp_path / f"world-{row['seed']}-seed-{seed}" / "scores"
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(folder / f"{row['row']}-dev.npz", **kept)
            held_out = np.isin(kept["groups"] % 10, (0, 1, 2))
            worse = np.where(held_out, np.random.default_rng(seed).normal(0, 3, len(held_out)), 0)
            np.savez(
                folder / f"{row['row']}-test.npz", **dict(kept) | {"scores": kept["scores"] + worse}, held_out=held_out
            )
            judged = JudgedRanking(kept["scores"] + worse, kept["grades"], kept["groups"])
            figures = {"test_ndcg@5": mean(judged.ndcg(5)), "test_pnr": judged.pairs().pnr}
            rows.append({"row": row["row"], "seed": seed, "world": row["seed"]} | figures)
    table = write_report(rows, tmp_path, BEATS, None)
    main, held_out = table.split("\n\n")
    assert cells(main, "teacher")[1] == cells(held_out, "teacher")[1] == "4"
    assert cells(held_out, "teacher")[2] == str(4 * 18) and cells(held_out, "teacher")[5] == "bm25"
    assert float(cells(held_out, "teacher")[3].split()[0]) < float(cells(main, "teacher")[2].split()[0])
    # one world's queries, each with its mean over the seeds, and another world's behind them
    assert float(cells(main, "teacher")[7].split()[0]) > 0
    one_world = write_report([row for row in rows if row["world"] == 1], tmp_path, BEATS, None)
    assert cells(one_world, "teacher")[7] != cells(main, "teacher")[7]


def test_nothing_to_report_is_said(tmp_path):
    with pytest.raises(InputError, match="no finished row"):
        write_report([], tmp_path, BEATS, None)
