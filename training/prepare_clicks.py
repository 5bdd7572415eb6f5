"""Click log to click pairs, larger than memory: satisfied clicks per normalised query and document (docs/clicks.md).

python -m training.prepare_clicks --events 'logs/2026-*.parquet' --out data/shop/clicks.parquet
"""

from __future__ import annotations

import json

from ranking.program import run
from training.clicks.click_pairs import ClickConfig, write_clicks


def main(config: ClickConfig) -> None:
    report = write_clicks(config)
    print(json.dumps({name: value for name, value in report.items() if name != "settings"}, indent=2))


if __name__ == "__main__":
    run(
        main,
        ClickConfig,
        example="python -m training.prepare_clicks --events 'logs/2026-*.parquet' --out data/shop/clicks.parquet",
    )
