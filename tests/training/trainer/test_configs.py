"""Every shipped YAML loads into the program or launcher it is for."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from ranking.program import parse

CONFIGS = Path(__file__).parents[3] / "training" / "configs"
PROGRAMS = {
    "pretrain": "training.pretrain_teacher",
    "likelihood": "training.finetune_teacher",
    "finetune": "training.finetune_teacher",
    "baseline": "training.train_baseline",
    "student": "training.distill_student",
}
NEEDED = {"data": "d", "out": "o", "model": "m", "labels": "l", "teacher": "t"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_config_loads(path):
    kind = path.stem.split("_")[0]
    if kind == "accelerate":
        config = load_config_from_file(str(path))
        expected = {"one": "NO", "ddp": "MULTI_GPU", "fsdp": "FSDP"}[path.stem.split("_")[1]]
        assert str(getattr(config.distributed_type, "value", config.distributed_type)) == expected
        return
    config_class = importlib.import_module(PROGRAMS[kind]).Config
    given = path.read_text()
    required = [
        f.name for f in dataclasses.fields(config_class) if f.default is f.default_factory is dataclasses.MISSING
    ]
    flags = [word for name in required if f"\n{name}:" not in f"\n{given}" for word in (f"--{name}", NEEDED[name])]
    config = parse(config_class, ["--config", str(path), *flags], example="")
    assert config.learning_rate > 0


def test_flags_win_over_the_file():
    config_class = importlib.import_module(PROGRAMS["finetune"]).Config
    argv = ["--config", str(CONFIGS / "finetune_small.yaml"), "--data", "d", "--model", "m", "--out", "o"]
    assert parse(config_class, [*argv, "--epochs", "9"], example="").epochs == 9


def test_the_paper_size_and_one_gpu_have_their_configs():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert {"finetune_7b_lora", "finetune_7b_fsdp", "pretrain_7b_fsdp", "finetune_0.5b_24gb", "pretrain_small"} <= names
