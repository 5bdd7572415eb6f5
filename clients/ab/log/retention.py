"""Remove raw files and Parquet days that are older than is to be kept."""

from __future__ import annotations

import logging
from datetime import date, timedelta
from pathlib import Path

from clients.ab.log.days_lock import days_lock
from clients.ab.log.erasure import remove_half_written
from clients.ab.log.reader import log_files

logger = logging.getLogger("ab_compact")


def remove_old_days(raw: Path, out: Path, retain_days: int, today: date) -> list[str]:
    """Remove what is older than retain_days whole UTC days, oldest first; returns the paths.

    raw: folder of raw log files; out: folder of exposures/, events/ and shadows/; today: the UTC day.
    """
    with days_lock(out):
        return _remove_days_before((today - timedelta(days=retain_days)).isoformat(), raw, out)


def _remove_days_before(first_kept: str, raw: Path, out: Path) -> list[str]:
    remove_half_written(raw)
    old = [path for path in log_files(raw) if path.name[:10] < first_kept]
    for table in ("exposures", "events", "shadows"):
        old += [path for path in sorted((out / table).glob("*.parquet")) if path.stem < first_kept]
    for path in sorted(old, key=lambda p: p.name):
        path.unlink(missing_ok=True)  # a run into another folder may keep as many days of the same log
        logger.info("removed %s, older than %s", path, first_kept)
    return [str(path) for path in old]
