"""The table over seeds of benchmarks/students/clicks_first.py, on scores whose differences are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.students.clicks_first import table_of_seeds

QUERIES, DOCUMENTS = 60, 6


def test_rows_are_held_against_the_baselines_of_their_own_seeds(tmp_path):
    rng = np.random.default_rng(0)
    rows = QUERIES * DOCUMENTS
    grades = np.tile([1, 0, 0, 0, 0, 0], QUERIES)
    best, worst = grades.astype(np.float32), -grades.astype(np.float32)
    chance = rng.random(rows).astype(np.float32)
    content = {"query_id": [f"q{n // DOCUMENTS}" for n in range(rows)], "doc_id": [f"d{n}" for n in range(rows)]}
    content |= {"grade": pa.array(grades, pa.int8())}

    def file(name: str, **scores: np.ndarray) -> Path:
        pq.write_table(pa.table(content | {row.replace("_", "-"): of for row, of in scores.items()}), tmp_path / name)
        return tmp_path / name

    first = file("1", bm25=chance, baseline_few=worst, student=best)
    second = [file("2", bm25=chance, baseline_few=best, student=best), file("3", bm25=chance, decoder=best)]
    lines = table_of_seeds({1: [first], 2: second}).splitlines()[2:]
    table = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}
    assert list(table) == ["bm25", "baseline-few", "student", "decoder"]
    assert table["baseline-few"][:2] == ["2", "0.5000"] and table["student"][:3] == ["2", "1.0000", "0.0000"]
    assert table["student"][4].startswith("+0.5000 [+0.0000, +1.0000]") and float(table["student"][5]) < 0.001
    assert table["decoder"] == ["1", "1.0000", "", "inf", "+0.0000 [+0.0000, +0.0000]", "1.0000"]
    assert table["bm25"][0] == "" and table["bm25"][2] == ""
