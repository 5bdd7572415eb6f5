"""What of a person reaches the log: salted hashes of user ids and queries, queries dropped, page text left out."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ranking.errors import InputError

DROPPED_QUERY = "(dropped)"
StoredQueries = Literal["keep", "hash", "drop"]


@dataclass(frozen=True)
class Privacy:
    """What of a person reaches the disk.

    Args:
        salt: secret of the hashes; empty keeps user ids as they are
        queries: keep | hash | drop
        text: whether titles and summaries are stored
    """

    salt: bytes = b""
    queries: StoredQueries = "keep"
    text: bool = True

    def __post_init__(self):
        if self.queries == "hash" and not self.salt:
            raise InputError("queries can only be hashed with a salt: give --salt-file")

    def user(self, user_id: str) -> str:
        """The user id as it is stored: 32 hex digits of a salted hash, or as it is without a salt."""
        return self._hash(user_id, 32) if self.salt else user_id

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
        salt_file: file with a secret; if given, user ids are stored as salted hashes
        queries: keep | hash | drop: what is stored of queries; hash needs --salt-file
        log_text: store titles and summaries, which training on these clicks needs
    """

    salt_file: Path | None = None
    queries: StoredQueries = "keep"
    log_text: bool = True

    def privacy(self) -> Privacy:
        """What these settings let through.

        InputError: a salt that cannot be read or is under 16 bytes, or a missing one.
        """
        salt = b""
        if self.salt_file is not None:
            try:
                salt = self.salt_file.read_bytes().strip()
            except OSError as problem:
                raise InputError(f"{self.salt_file}: the salt cannot be read: {problem}") from problem
            if len(salt) < 16:
                raise InputError(f"{self.salt_file}: a salt of 16 bytes or more is needed, e.g. openssl rand -hex 32")
        return Privacy(salt, self.queries, self.log_text)
