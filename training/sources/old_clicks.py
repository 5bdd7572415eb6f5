"""What becomes of clicks.parquet where a dataset folder is written once more."""

from __future__ import annotations

import json
from pathlib import Path

from ranking.card import fingerprint
from ranking.errors import DataError
from training.sources.query_splits import SPLITS


def old_clicks_are_judgments(out: Path, origin: str) -> bool:
    """Whether the folder's clicks.parquet was made from the judgments of an earlier run (clicks_from_judgments).

    DataError if it is a log's, but stands beside judgments of another source than origin: dataset.json would state it
    as this collection's, and its queries could be those of this one's test split.
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
    if _same_place(before) != _same_place(origin):
        raise DataError(
            clicks,
            f"belongs to judgments of {before}; delete it, or dataset.json beside it if these clicks go with {origin}, "
            "or take another --out",
        )
    return False


def _same_place(origin: str) -> tuple[str, str]:
    """Kind and path of a source, however the path is written."""
    kind, _, path = origin.partition(":")
    return kind, path if not path or kind == "ir" else str(Path(path).resolve())
