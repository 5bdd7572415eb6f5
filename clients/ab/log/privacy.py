"""What of a person reaches the log: salted hashes of user ids, segments and queries, or none; page text or none."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ranking.errors import InputError
from ranking.schema import DROPPED_QUERY, NO_USER

StoredQueries = Literal["keep", "hash", "drop"]
StoredSegments = Literal["keep", "hash", "drop"]


@dataclass(frozen=True)
class Privacy:
    """What of a person reaches the disk.

    Args:
        salt: secret of the hashes; empty keeps user ids and segments as they are
        queries: keep | hash | drop
        segments: keep | hash | drop, of their values; names stay
        text: whether titles and summaries are stored
    """

    salt: bytes = b""
    queries: StoredQueries = "keep"
    text: bool = True
    segments: StoredSegments = "hash"

    def __post_init__(self):
        if self.queries == "hash" and not self.salt:
            raise InputError("queries can only be hashed with a salt: give --salt-file")

    def user(self, user_id: str) -> str:
        """The user id as it is stored: 32 hex digits of a salted hash, or as it is without a salt.

        Who begins with NO_USER still does, since nobody may be counted as a person who is none.
        """
        if not self.salt:
            return user_id
        return (NO_USER if user_id.startswith(NO_USER) else "") + self._hash(user_id, 32)

    def segment_values(self, segments: Mapping[str, str]) -> dict[str, str]:
        """The segments as they are stored: kept, each value as 16 hex digits of a salted hash, or none."""
        if self.segments == "drop":
            return {}
        if self.segments == "keep" or not self.salt:
            return dict(segments)
        return {name: self._hash(value, 16) for name, value in segments.items()}

    def definition(self, definition: dict[str, Any]) -> dict[str, Any]:
        """An experiment's definition as it is stored: its forced users are named as in the exposures."""
        forced = {self.user(user): arm for user, arm in (definition.get("forced") or {}).items()}
        return {**definition, "forced": forced}

    def query(self, query: str) -> str:
        """The query as it is stored: kept, 16 hex digits of a salted hash, or DROPPED_QUERY."""
        if self.queries == "drop":
            return DROPPED_QUERY
        return self._hash(query, 16) if self.queries == "hash" else query

    def _hash(self, text: str, digits: int) -> str:
        return hmac.digest(self.salt, text.encode("utf-8", "surrogatepass"), "sha256").hex()[:digits]


@dataclass(kw_only=True)
class PrivacySettings:
    """Settings of a program that writes the log.

    Args:
        salt_file: file with a secret of 16 bytes or more; user ids and segments are stored as hashes salted with it
        raw_ids: store user ids and segments as they come, without a salt; only where they name nobody
        queries: keep | hash | drop: what is stored of queries; hash needs --salt-file
        segments: keep | hash | drop: what is stored of the values of segments, where there is a salt
        log_text: store titles and summaries, which training on these clicks needs
    """

    salt_file: Path | None = None
    raw_ids: bool = False
    queries: StoredQueries = "keep"
    segments: StoredSegments = "hash"
    log_text: bool = True

    def privacy(self) -> Privacy:
        """What these settings let through.

        InputError: a salt that cannot be read or is under 16 bytes, or neither a salt nor raw ids, or both.
        """
        if self.salt_file is None and not self.raw_ids:
            raise InputError(
                "user ids are stored as salted hashes: give --salt-file FILE (made by openssl rand -hex 32 > FILE), "
                "or --raw-ids if they name nobody"
            )
        if self.salt_file is not None and self.raw_ids:
            raise InputError("--salt-file and --raw-ids contradict each other: give one")
        salt = read_salt(self.salt_file) if self.salt_file is not None else b""
        return Privacy(salt, self.queries, self.log_text, self.segments)


def read_salt(path: Path) -> bytes:
    """The secret in a file. InputError if it cannot be read or is under 16 bytes."""
    try:
        salt = path.read_bytes().strip()
    except OSError as problem:
        raise InputError(f"{path}: the salt cannot be read: {problem}") from problem
    if len(salt) < 16:
        raise InputError(f"{path}: a salt of 16 bytes or more is needed, e.g. openssl rand -hex 32")
    return salt
