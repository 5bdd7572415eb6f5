"""The table over seeds of benchmarks/students/clicks_first.py, on scores whose differences are known."""

from __future__ import annotations

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
    scores = {"bm25": rng.random(rows).astype(np.float32), "baseline-few-1": worst, "baseline-few-2": best}
    scores |= {"student-1": best, "student-2": best, "decoder-2": best}
    content = {"query_id": [f"q{n // DOCUMENTS}" for n in range(rows)], "doc_id": [f"d{n}" for n in range(rows)]}
    pq.write_table(pa.table(content | {"grade": pa.array(grades, pa.int8())} | scores), tmp_path / "scores.parquet")
    lines = table_of_seeds(tmp_path / "scores.parquet", [1, 2]).splitlines()[2:]
    table = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}
    assert list(table) == ["bm25", "baseline-few", "student", "decoder"]
    assert table["baseline-few"][:2] == ["2", "0.5000"] and table["student"][:3] == ["2", "1.0000", "0.0000"]
    assert table["student"][3].startswith("+0.5000 [+0.0000, +1.0000]") and float(table["student"][4]) < 0.001
    assert table["decoder"] == ["1", "1.0000", "", "+0.0000 [+0.0000, +0.0000]", "1.0000"]
    assert table["bm25"][0] == "" and table["bm25"][2] == ""
