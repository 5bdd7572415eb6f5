"""What becomes of a log and its clicks where a dataset folder is written once more."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ranking.card import fingerprint
from ranking.errors import DataError
from training.sources.query_splits import SPLITS

LOGGER = logging.getLogger(__name__)


def clicks_are_judgments(folder: Path) -> bool:
    """Whether a dataset folder's clicks.parquet was made from its judgments (clicks_from_judgments) and no log.

    DataError if dataset.json cannot be read.
    """
    clicks, file = folder / "clicks.parquet", folder / "dataset.json"
    if not clicks.is_file() or not file.is_file():
        return False
    tables = [folder / f"judgments/{name}.parquet" for name in SPLITS] + [folder / "candidates.parquet", clicks]
    content = _read(file)
    # prepare_clicks may have written another clicks.parquet since
    return (
        "clicks_are" in content
        and all(table.is_file() for table in tables)
        and fingerprint(*tables) == content["fingerprint"]
    )


def warn_of_old_log(log: Path, origin: str) -> None:
    """Say so where a dataset folder's log, or its clicks, stood beside judgments of another source than origin.

    The same shop's next judgments go with them, another collection's do not. DataError if dataset.json cannot be read.
    """
    file = log.parent / "dataset.json"
    if log.is_file() and file.is_file() and (before := _read(file)["source"]) != origin:
        LOGGER.warning(
            "%s stays: it stood beside judgments of %s; delete it if it is of another collection than %s",
            log, before, origin,
        )  # fmt: skip


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        _ = content["source"], content["fingerprint"]
    except (ValueError, TypeError, KeyError) as problem:
        raise DataError(file, "cannot be read, so nobody knows whose clicks.parquet is; delete either") from problem
    return content
