"""Training beside sentence-transformers: one student learns in every way, and a finished training is kept."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.students import training_speed
from ranking.errors import InputError
from ranking.schema import write_table
from tests.helpers.tiny_student import make_judged, make_student


@pytest.fixture
def config(tmp_path) -> training_speed.Config:
    data = make_judged(tmp_path / "data")
    for split in ("train", "test"):
        shutil.copyfile(data / "judgments" / "dev.parquet", data / "judgments" / f"{split}.parquet")
    return training_speed.Config(
        data=data, out=tmp_path / "out", init=str(make_student(tmp_path / "start")), seconds=0.2, batch_groups=2,
        documents=4, precision="fp32",
    )  # fmt: skip


def test_every_way_trains_and_a_finished_one_is_kept(config, capsys):
    training_speed.main(config)
    first = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines() if line.startswith("|")]
    by_way = {row[0]: row[1:] for row in rows[2:]}
    assert list(by_way) == ["ours", "st-point", "st-triplets", "st-lists"]
    assert all(int(row[0]) >= 1 and float(row[1]) > 0 for row in by_way.values())
    assert by_way["ours"][3] == "1.00" and by_way["ours"][6] == "" and by_way["st-lists"][6].endswith("]")
    # pairs in the loss: all of a group of 4, none of point-wise rows, one of a triplet, three of a list
    kept = {row["way"]: row["pairs"] / row["documents"] for row in training_speed.finished_rows(config.out)}
    assert kept == {"ours": 1.5, "st-point": 0, "st-triplets": 0.5, "st-lists": 0.75}
    training_speed.main(config)
    assert capsys.readouterr().out == first
    with pytest.raises(InputError, match="trainings of other settings lie here"):
        training_speed.main(replace(config, seconds=0.3))


def test_labels_that_are_all_alike_are_refused(config):
    path = config.data / "judgments" / "train.parquet"
    rows = pq.read_table(path)
    grades = pa.array([1] * len(rows), pa.int8())
    same = rows.set_column(rows.column_names.index("grade"), rows.schema.field("grade"), grades)
    write_table(path, "judgments", same)
    with pytest.raises(InputError, match="no two labels differ"):
        training_speed.main(config)
