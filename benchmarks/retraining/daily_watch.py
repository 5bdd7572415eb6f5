"""What the watch says of each day, and when the drop of page CTR itself can be told from chance."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BertForSequenceClassification

from build.reference_scores import REFERENCE_NAME, reference_of
from build.runners import Feed, Runner
from clients.ab.report.statistics import UserTotals, compare_arms, estimate
from clients.ab_watch import Config, watch
from ranking.database import literal
from ranking.files import write_json
from ranking.text import StudentFormat

REFERENCE_PAIRS = 1000  # as many as build_student keeps


def keep_version(checkpoint: Path, data: Path, folder: Path) -> None:
    """The version folder of a served checkpoint as far as the watch reads it: text format, scores of its candidates."""
    if (folder / REFERENCE_NAME).is_file():
        return
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("training"), dirs_exist_ok=True)
    text = StudentFormat.of_checkpoint(checkpoint)
    write_json(folder / REFERENCE_NAME, reference_of(data, text, torch_runner(checkpoint), REFERENCE_PAIRS))


def torch_runner(checkpoint: Path) -> Runner:
    """The checkpoint's encoder in PyTorch."""
    model = BertForSequenceClassification.from_pretrained(checkpoint).eval()

    @torch.inference_mode()
    def run(feed: Feed) -> NDArray[np.float32]:
        return model(**{name: torch.from_numpy(values).long() for name, values in feed.items()}).logits[:, 0].numpy()

    return run


def alerts_of(data: Path, repository: Path, day: date) -> list[dict[str, Any]]:
    """The alerts that ab_watch raises on a day: check, where, value, reference."""
    _, _, findings = watch(Config(data=data, repository=repository, day=str(day)))
    return [
        {"check": one.check, "where": one.where, "value": one.value, "reference": one.reference}
        for one in findings
        if one.alert
    ]


def ctr_of(data: Path, model: str, day: date, quiet: list[date]) -> dict[str, float]:
    """Page CTR of a model on a day, on the quiet days before the drift, and p of no difference, clustered by user."""

    def totals(days: list[date]) -> UserTotals:
        files = [data / "exposures" / f"{one}.parquet" for one in days]
        found = duckdb.sql(f"""
            SELECT sum((clicks > 0)::INT)::DOUBLE AS clicked, count(*)::DOUBLE AS pages
            FROM read_parquet({literal(files)}) WHERE served_by = '{model}' GROUP BY user_id
        """)
        assert found is not None, "a SELECT has rows"
        rows = found.fetchnumpy()
        return UserTotals(np.asarray(rows["clicked"]), np.asarray(rows["pages"]))

    now, before = estimate(totals([day])), estimate(totals(quiet))
    return {"ctr": now.value, "quiet": before.value, "p": compare_arms(before, now).p}


def read_json(path: Path) -> Any:
    """A JSON file's content."""
    return json.loads(path.read_text(encoding="utf-8"))
