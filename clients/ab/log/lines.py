"""One record is one line: a checksum and JSON. Writer and reader share this form (docs/ab-log.md)."""

from __future__ import annotations

import json
import zlib
from typing import Any

SUFFIX = ".ablog"
DAY_MICROSECONDS = 86_400_000_000


def encode(record: dict[str, Any]) -> bytes:
    """One line: checksum of the JSON, a space, the JSON, a newline. JSON text holds no raw newline."""
    body = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    return b"%08x %s\n" % (zlib.crc32(body), body)


def decode(line: bytes) -> dict[str, Any] | None:
    """The record of a whole line without its newline, None if the line is damaged."""
    if len(line) < 10 or line[8:9] != b" ":
        return None
    try:
        if int(line[:8], 16) != zlib.crc32(line[9:]):
            return None
        record = json.loads(line[9:])
    except (ValueError, RecursionError):  # the latter: brackets nested without end
        return None
    return record if isinstance(record, dict) else None
