"""The curve of sizes: which layers are left out first, and a table of students that are trained already."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

from benchmarks.students import sizes
from ranking.errors import InputError
from tests.helpers.tiny_student import make_judged, make_student

IDLE = 1  # the layer of the whole student that changes nothing


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> sizes.Config:
    folder = tmp_path_factory.mktemp("sizes")
    data, out = make_judged(folder / "data", queries=8), folder / "out"
    shutil.copyfile(data / "judgments" / "dev.parquet", data / "judgments" / "test.parquet")
    make_idle(make_student(out / "whole", num_hidden_layers=3))
    make_student(out / "shape-2", num_hidden_layers=2)
    make_student(out / "shape-3x32", num_hidden_layers=3, intermediate_size=32)
    make_student(out / "shape-3", num_hidden_layers=3, seed=1)
    make_student(out / "pretrained-1", num_hidden_layers=1)
    return sizes.Config(
        data=data, labels=folder, out=out, shapes=["2", "3x32", "3"], from_pretrained=[1], pages=2, rounds=2,
        evaluation="float32", plot=folder / "plot.png",
    )  # fmt: skip


def make_idle(checkpoint: Path) -> None:
    """Layer IDLE adds nothing, and normalises what its predecessor has normalised."""
    model = BertForSequenceClassification.from_pretrained(checkpoint)
    layers = model.bert.encoder.layer
    with torch.no_grad():
        for part in (layers[IDLE].attention.output, layers[IDLE].output):
            for parameter in part.dense.parameters():
                parameter.zero_()
        for part in (layers[IDLE - 1].output, layers[IDLE].attention.output, layers[IDLE].output):
            part.LayerNorm.weight.fill_(1.0)
            part.LayerNorm.bias.zero_()
    model.save_pretrained(checkpoint)


def test_the_table_has_every_student_beside_bm25_and_the_teacher(config, monkeypatch, capsys):
    plain = sizes.score_system

    def score_system(spec, judgments, **knobs):
        if spec != f"teacher=blend:{config.labels}":
            return plain(spec, judgments, **knobs)
        found = plain("random", judgments, **knobs)
        found.scores = judgments.grades.astype(np.float32)
        return found

    monkeypatch.setattr(sizes, "score_system", score_system)
    sizes.main(config)
    printed, joined = capsys.readouterr().out.split("\n\n")
    lines = printed.splitlines()
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])}
    assert list(rows) == ["BM25", "teacher", "3 layers", "2 layers (0, 2)", "3 layers, 32 inner",
                          "3 layers, trained on", "1 layer (0) of MiniLM itself"]  # fmt: skip
    assert rows["teacher"][1] == "1.0000" and rows["teacher"][4:] == ["", ""]
    assert rows["3 layers"][2:4] == ["", ""] and rows["3 layers"][5] == "1"
    assert rows["2 layers (0, 2)"][5].endswith(" x") and rows["2 layers (0, 2)"][2].endswith("]")
    # lists of 10: with k = 12 the whole student scores all, whatever the first
    first = [[cell.strip() for cell in line.split("|")[1:-1]] for line in joined.splitlines()]
    assert first[0] == ["first", "k = 5", "k = 8", "k = 12", "k = 16"]
    assert [row[0] for row in first[2:]] == list(rows)[3:]
    assert all(row[3] == "+0.0000, 1.00 x" for row in first[2:]) and all(row[1][-1] == "x" for row in first[2:])
    assert config.plot is not None and config.plot.read_bytes()[:4] == b"\x89PNG"


def test_the_layer_that_does_nothing_is_left_out_first(config):
    (config.out / "layers_by_need.json").unlink(missing_ok=True)
    order = sizes.layers_by_need(config, config.out / "whole", 3)
    assert order[-1] == IDLE and sorted(order) == [0, 1, 2]
    (config.out / "layers_by_need.json").write_text("[2, 1, 0]")
    assert sizes.layers_by_need(config, config.out / "whole", 3) == [2, 1, 0], "kept for the next run"
    (config.out / "layers_by_need.json").write_text(json.dumps(order))


@pytest.mark.parametrize("shape", ["", "x4", "4x", "four", "4x2x1", "-1"])
def test_a_shape_that_is_none_is_refused(shape):
    with pytest.raises(ValueError, match="is none"):
        sizes.Config(data=Path("d"), labels=Path("l"), shapes=[shape])


@pytest.mark.parametrize("asked", [{"shapes": ["0"]}, {"shapes": ["4"]}, {"from_pretrained": [4]}])
def test_more_layers_than_the_start_has_are_refused(config, asked):
    with pytest.raises(InputError, match="the start has 1 to 3"):
        sizes.main(replace(config, **asked))


def test_what_is_kept_of_other_settings_is_refused(config):
    sizes.refuse_other_settings(config)
    sizes.refuse_other_settings(replace(config, pages=9, shapes=["1"]))
    with pytest.raises(InputError, match="trainings of other settings lie here"):
        sizes.main(replace(config, epochs=3))


def test_a_precision_that_is_not_measured_is_refused(config):
    with pytest.raises(ValueError, match="bf16 and fp32"):
        replace(config, precision="int8")
