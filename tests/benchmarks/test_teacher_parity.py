"""The gate of benchmarks/teacher/parity.py: served scores whose order moved end it with an error."""

from __future__ import annotations

import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.teacher import parity
from benchmarks.teacher.parity import Config, JudgedPairs, main
from build.build_teacher import Config as BuildConfig
from ranking.errors import InputError

REFERENCE = np.linspace(-2, 2, 8, dtype=np.float32)


@pytest.fixture
def published(monkeypatch) -> list[BuildConfig]:
    """Stand-ins for model and server; what is asked to be published. A served bf16 model swaps two neighbours."""
    asked: list[BuildConfig] = []
    pairs = JudgedPairs(["q"] * 8, ["t"] * 8, ["s"] * 8, np.arange(8) // 4, np.zeros(8, np.int64))
    texts = SimpleNamespace(texts=lambda *_: [SimpleNamespace(text=str(n)) for n in range(8)])

    @contextmanager
    def server(_):
        yield SimpleNamespace(grpc="nowhere")

    def ask(_, prompts):
        order = [1, 0, *range(2, 8)] if asked[-1].dtype == "bfloat16" else range(8)
        return REFERENCE[list(order)][[int(prompt) for prompt in prompts]]

    monkeypatch.setattr(parity, "read_pairs", lambda *_: pairs)
    monkeypatch.setattr(parity.Scorer, "load", lambda *_: SimpleNamespace(score=lambda *_: REFERENCE))
    monkeypatch.setattr(parity.TeacherFormat, "of_checkpoint", lambda *_: texts)
    monkeypatch.setattr(parity, "start_triton", server)
    monkeypatch.setattr(parity, "ask", ask)
    monkeypatch.setattr(parity, "build_teacher", asked.append)
    return asked


def test_a_variant_whose_order_moved_ends_it_after_all_figures_are_printed(published, tmp_path, capsys):
    settings = {"variants": ["bfloat16", "float32"], "engine_args": {"quantization": "fp8"}, "eager": False}
    with pytest.raises(InputError, match=r"tau within queries is below 0\.99: bfloat16 0\.9286$"):
        main(Config(tmp_path, tmp_path, min_tau=0.99, **settings))
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [figures["variant"] for figures in printed] == ["bfloat16", "float32"]
    assert all(config.engine_args == {"enforce_eager": False, "quantization": "fp8"} for config in published)
    main(Config(tmp_path, tmp_path, min_tau=0.9, **settings))
