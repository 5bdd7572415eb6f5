"""The stages that make a decoder a teacher, as the demo and a retraining run them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from demo.stages import Stages


def train_teacher(
    stages: Stages, data: Path, out: Path, *, size: str, start: Sequence[str], init: Sequence[str], once: Sequence[str]
) -> None:
    """Pre-train on the clicks, turn the likelihood into a score, and fine-tune; out/teacher is the teacher.

    size: names the settings, training/configs/pretrain_SIZE.yaml and finetune_SIZE.yaml; start: the settings' name of
    the likelihood stage, without .yaml, then flags that override them; init: flags of what pre-training starts from;
    once: flags that cut pre-training and fine-tuning short.
    """
    stages.program(
        "pretrain", "continued pre-training of the teacher: query in, clicked title and summary out",
        "-m", "training.pretrain_teacher", "--config", f"training/configs/pretrain_{size}.yaml", "--data", data,
        "--out", out / "pretrained", *init, *once, made=out / "pretrained",
    )  # fmt: skip
    stages.program(
        "start", "the teacher's start: its own likelihood becomes its score",
        "-m", "training.finetune_teacher", "--config", f"training/configs/{start[0]}.yaml", "--data", data,
        "--model", out / "pretrained", "--out", out / "start", *start[1:], made=out / "start",
    )  # fmt: skip
    stages.program(
        "finetune", "fine-tuning of the teacher with a pairwise rank loss",
        "-m", "training.finetune_teacher", "--config", f"training/configs/finetune_{size}.yaml", "--data", data,
        "--model", out / "start", "--out", out / "teacher", *once, made=out / "teacher",
    )  # fmt: skip
