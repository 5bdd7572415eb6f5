"""Spellings that searchers take for one: what BM25 finds a word by, and what makes two queries the same query."""

from __future__ import annotations

import unicodedata

from ranking.text import normalise
from ranking.visible import UNDRAWN

# a word may end there: blank fillers, and what stands between words of Khmer and before the endings of Persian ones
_MAY_END_A_WORD = {0x115F, 0x1160, 0x200B, 0x200C, 0x2800, 0x3164, 0xFFA0}
# soft hyphens, joiners, direction marks, variation selectors: a catalogue's "wasch-maschine" with a soft hyphen would
# be two words that no searcher types
_UNDRAWN = {code: "" for first, last in UNDRAWN for code in range(first, last + 1) if code not in _MAY_END_A_WORD}
# Arabic as searchers type it, by the rules of Lucene's ArabicNormalizer: one alef, one yeh, one heh, no vowel marks
_ARABIC = str.maketrans(
    {"آ": "ا", "أ": "ا", "إ": "ا", "ى": "ي", "ة": "ه", "\u0640": ""} | {chr(code): "" for code in range(0x064B, 0x0653)}
)
# Arabic, Devanagari and other digits are typed as 0 to 9 just as often
_DIGITS = {
    code: str(unicodedata.decimal(chr(code)))
    for code in range(0x0660, 0xAC00)
    if unicodedata.category(chr(code)) == "Nd"
}
_DOT_ABOVE = {0x0307: ""}  # all that is left of the case of a Turkish capital i
_ONE_SPELLING = _UNDRAWN | _ARABIC | _DIGITS | _DOT_ABOVE


def fold_spelling(text: str) -> str:
    """The normalised text in one case, with one spelling of Arabic letters and digits, without undrawn characters."""
    text = normalise(text).casefold()
    return text if text.isascii() else text.translate(_ONE_SPELLING)
