"""INT8 beside fp32: a table with every precision that this CPU has, of test queries."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.students import precisions
from build import openvino_engine
from tests.helpers.tiny_student import make_judged, make_student


def test_the_table_has_a_row_for_each_precision(tmp_path, capsys):
    data, checkpoint = make_judged(tmp_path / "data", queries=6), make_student(tmp_path / "student")
    shutil.copyfile(data / "judgments" / "dev.parquet", data / "judgments" / "test.parquet")
    config = precisions.Config(data, [f"tiny={checkpoint}"], pages=2, rounds=2, calibration_pairs=16)
    precisions.main(config)
    _, found, table = capsys.readouterr().out.partition("6 test queries, 60 judged documents")  # NNCF's bars come first
    _, _, *rows = table.strip().splitlines()
    assert found
    cells = {row.split(" | ")[1]: [cell.strip(" |") for cell in row.split(" | ")] for row in rows}
    assert set(cells) == {*openvino_engine.cpu_precisions(), "int8_groups of 64", "int8_groups of 32"}
    assert cells["fp32"][2:4] == ["", ""] and cells["fp32"][8] == "1"
    for name, row in cells.items():
        if name != "fp32":
            tau, mean, largest = float(row[2]), *map(float, row[3].split(", "))
            assert row[0] == "tiny" and 0.8 < tau <= 1 and 0 < mean < largest and float(row[7]) > 0
            assert row[5].startswith(("+", "-")) and " x" in row[8]


def test_a_student_without_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="NAME=CHECKPOINT"):
        precisions.Config(tmp_path, ["runs/student"])
