"""docs/results/loop.md, written from the rounds that are finished."""

from __future__ import annotations
from pathlib import Path
from typing import Any
from training.world.drift import DriftSettings


def write_report(found: list[dict[str, Any]], rounds: int, drift: DriftSettings, report: Path | None, note: str) -> str:
    return "\n".join(
        str(
            (
                one["seed"],
                one["round"],
                one["test"]["ndcg@5"],
                one["refused"],
                [d["ctr"] for d in one["days"]],
                [
                    [
                        (a["check"], a["where"].get("model"), round(a["value"], 3), round(a["reference"], 3))
                        for a in d["alerts"]
                    ]
                    for d in one["days"]
                ],
            )
        )
        for one in found
    )
