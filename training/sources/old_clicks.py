"""What becomes of clicks.parquet where a dataset folder is written once more."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from ranking.card import fingerprint
from ranking.errors import DataError
from training.sources.query_splits import SPLITS

LOGGER = logging.getLogger(__name__)


def old_clicks_are_judgments(out: Path, origin: str) -> bool:
    """Whether the folder's clicks.parquet was made from the judgments of an earlier run (clicks_from_judgments).

    A log's clicks stay, with a warning where the judgments beside them were of another source than origin: the same
    shop's next judgments go with them, another collection's do not. DataError if dataset.json cannot be read.
    """
    clicks, file = out / "clicks.parquet", out / "dataset.json"
    if not clicks.is_file() or not file.is_file():
        return False
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        before, written = content["source"], content["fingerprint"]
    except (ValueError, TypeError, KeyError) as problem:
        raise DataError(file, "cannot be read, so nobody knows whose clicks.parquet is; delete either") from problem
    tables = [out / f"judgments/{name}.parquet" for name in SPLITS] + [out / "candidates.parquet", clicks]
    # prepare_clicks may have written another clicks.parquet since
    if "clicks_are" in content and all(table.is_file() for table in tables) and fingerprint(*tables) == written:
        return True
    if before != origin:
        LOGGER.warning(
            "%s stays: it stood beside judgments of %s; delete it if it is of another collection than %s",
            clicks, before, origin,
        )  # fmt: skip
    return False
