"""Turn the router's raw log into Parquet by day: exposures, events, shadows (docs/ab-log.md).

python clients/ab_compact.py --log runs/ab/log --out runs/ab/data

Rerun it as often as you like: each day that still has raw files is written anew, aside and renamed into place.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from clients.ab.log.compaction import compact, write_summary
from clients.ab.log.quarantine import REJECTS
from clients.ab.log.retention import remove_old_days
from ranking.program import run
from ranking.query_engine import QueryEngineSettings

logger = logging.getLogger("ab_compact")


@dataclass
class Config(QueryEngineSettings):
    """Compact the A/B router's log into Parquet tables by day.

    Args:
        log: folder of raw log files, as ab_router writes it
        out: folder for exposures/, events/, shadows/ and compact.json
        retain_days: remove raw files and Parquet days older than this many whole UTC days; 0 keeps everything
    """

    log: Path
    out: Path
    retain_days: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retain_days < 0:
            raise ValueError("retain_days must be 0 or more")


def main(config: Config) -> None:
    """Compact, then remove what is too old, and print the counts."""
    summary = compact(config.log, config.out, config)
    if config.retain_days:
        today = datetime.now(UTC).date()
        summary.removed = remove_old_days(config.log, config.out, config.retain_days, today)
    write_summary(config.out, summary)
    print(
        f"{summary.exposures} exposures ({summary.exposures_repeated} repeated), {summary.events} events "
        f"({summary.events_orphaned} orphaned), {summary.shadows} shadows over {len(summary.days)} days -> {config.out}"
    )
    if summary.torn_tails or summary.damaged:
        damaged = ", ".join(summary.damaged[:5]) or "-"
        logger.warning("%d torn tails skipped, %d damaged lines: %s", summary.torn_tails, len(summary.damaged), damaged)
    if summary.rejected:
        logger.warning("%d records break their table and were left out: %s", summary.rejected, config.out / REJECTS)


if __name__ == "__main__":
    run(main, Config, example="python clients/ab_compact.py --log runs/ab/log --out runs/ab/data")
