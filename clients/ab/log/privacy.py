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

    @classmethod
    def of_file(cls, salt_file: Path | None, queries: StoredQueries, text: bool) -> Privacy:
        salt = b""
        if salt_file is not None:
            try:
                salt = salt_file.read_bytes().strip()
            except OSError as problem:
                raise InputError(f"{salt_file}: the salt cannot be read: {problem}") from problem
            if len(salt) < 16:
                raise InputError(f"{salt_file}: a salt of 16 bytes or more is needed, e.g. openssl rand -hex 32")
        return cls(salt, queries, text)

    def user(self, user_id: str) -> str:
        return self._hash(user_id, 32) if self.salt else user_id

    def query(self, query: str) -> str:
        if self.queries == "drop":
            return DROPPED_QUERY
        return self._hash(query, 16) if self.queries == "hash" else query

    def _hash(self, text: str, digits: int) -> str:
        return hmac.digest(self.salt, text.encode("utf-8", "surrogatepass"), "sha256").hex()[:digits]
