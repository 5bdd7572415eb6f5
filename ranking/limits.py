"""How much text is taken: the length limits of fields, ids and pages, in the unit that each name says.

Whatever one door takes, the next one must take too, so every door reads its limits here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

MAX_FIELD_BYTES = 1 << 20  # of UTF-8; a longer query, title or summary is a broken export, not a document
MAX_ID_CHARACTERS = 512  # of an id or a segment's value that a caller of the router makes up
MAX_DOCUMENTS = 1000  # in one page, unless the router and the built model are both told another number


@dataclass(frozen=True)
class FieldLimits:
    """How many tokens of each field a model reads; the rest of a longer field is cut off. ValueError below 1.

    Args:
        max_query_tokens: tokens of the query that are read
        max_title_tokens: tokens of the title that are read
        max_summary_tokens: tokens of the summary that are read
    """

    max_query_tokens: int
    max_title_tokens: int
    max_summary_tokens: int

    def __post_init__(self):
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{limit.name} is {value!r}: a whole number from 1 on is needed")

    def total_tokens(self) -> int:
        """The tokens of three full fields, without those that the text format adds."""
        return self.max_query_tokens + self.max_title_tokens + self.max_summary_tokens


DEFAULT_LIMITS = FieldLimits(max_query_tokens=32, max_title_tokens=32, max_summary_tokens=128)


def field_bytes(text: str) -> int:
    """Length of a text in bytes of UTF-8, as tables and wire carry it. UnicodeEncodeError for half a surrogate pair."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))
