"""Turns a click log into click pairs: what the teacher reads in continued pre-training (docs/clicks.md)."""

from __future__ import annotations

import json

from ranking.program import run
from training.clicks.click_pairs import ClickPairSettings, write_clicks


def main(settings: ClickPairSettings) -> None:
    """Write the clicks table and print its report, without the settings that made it."""
    report = write_clicks(settings)
    print(json.dumps({name: value for name, value in report.items() if name != "settings"}, indent=2))


if __name__ == "__main__":
    run(
        main,
        ClickPairSettings,
        example="python -m training.prepare_clicks --events 'logs/2026-*.parquet' --out data/shop/clicks.parquet",
    )
