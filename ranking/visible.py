"""Which text a person can see: the one rule by which every door takes a query or an id, or refuses it as blank.

The router, the Triton model that tokenises, the Parquet tables, the DuckDB checks and the file readers share this rule.
Each of their engines (Python, the RE2 of Arrow and of DuckDB) has Unicode tables of its own version, so `\\s` or
`\\p{C}` would mean something else in each of them. The invisible code points are therefore listed here, and every
engine's pattern is made of that list.

A character is invisible if no font draws it: white space, control characters, the characters that Unicode calls
"default ignorable" (format characters, fillers, variation selectors, tags), blank fillers, noncharacters, and halves of
surrogate pairs. Everything else is visible. That includes private use and code points that have no character yet: the
next Unicode version may give them one, and a query in a new script must not be refused.

Normalisation (ranking.text.normalise) keeps the rule: visible text stays visible, invisible text stays invisible.
"""

from __future__ import annotations

import re

CodePoints = tuple[tuple[int, int], ...]  # ranges (first, last)

# What stands between words: ranking.text.normalise makes one space of a run of these.
SEPARATORS: CodePoints = (
    (0x0000, 0x0020),  # C0 controls, space
    (0x007F, 0x00A0),  # delete, C1 controls, no-break space
    (0x1680, 0x1680),  # Ogham space mark
    (0x2000, 0x200A),  # spaces of all widths
    (0x2028, 0x2029),  # line and paragraph separators
    (0x202F, 0x202F),  # narrow no-break space
    (0x205F, 0x205F),  # mathematical space
    (0x3000, 0x3000),  # ideographic space
    (0xD800, 0xDFFF),  # halves of surrogate pairs, which no UTF-8 text can hold
    (0xFEFF, 0xFEFF),  # byte order mark
)

# What changes how its neighbours are drawn, or nothing; it is part of a word, and stays in a normalised text.
UNDRAWN: CodePoints = (
    (0x00AD, 0x00AD),  # soft hyphen
    (0x034F, 0x034F),  # combining grapheme joiner
    (0x061C, 0x061C),  # Arabic letter mark
    (0x115F, 0x1160),  # Hangul fillers
    (0x17B4, 0x17B5),  # Khmer inherent vowels
    (0x180B, 0x180F),  # Mongolian variation selectors and vowel separator
    (0x200B, 0x200F),  # zero width space and joiners, direction marks
    (0x202A, 0x202E),  # direction controls
    (0x2060, 0x206F),  # word joiner, invisible operators, deprecated format characters
    (0x2800, 0x2800),  # Braille pattern without a dot
    (0x3164, 0x3164),  # Hangul filler
    (0xFDD0, 0xFDEF),  # noncharacters
    (0xFE00, 0xFE0F),  # variation selectors
    (0xFFA0, 0xFFA0),  # halfwidth Hangul filler
    (0xFFF0, 0xFFFB),  # default ignorable without a character yet, interlinear annotation
    (0x13430, 0x1343F),  # Egyptian hieroglyph format controls
    (0x1BCA0, 0x1BCA3),  # shorthand format controls
    (0x1D173, 0x1D17A),  # musical format controls
    (0xE0000, 0xE0FFF),  # tags, more variation selectors
    *((plane + 0xFFFE, plane + 0xFFFF) for plane in range(0, 0x110000, 0x10000)),  # noncharacters of each plane
)


def python_class(ranges: CodePoints) -> str:
    """The ranges as the inside of a character class of Python's `re`."""
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


_VISIBLE = re.compile(f"[^{python_class(SEPARATORS + UNDRAWN)}]")

# The same rule for Arrow's and DuckDB's RE2: a text is visible if it holds a match. RE2 reads UTF-8 and knows no
# surrogates.
VISIBLE_RE2 = "[^{}]".format(
    "".join(f"\\x{{{first:X}}}-\\x{{{last:X}}}" for first, last in SEPARATORS + UNDRAWN if first != 0xD800)
)


def is_visible(text: str) -> bool:
    """Whether the text has at least one character that a person can see."""
    return _VISIBLE.search(text) is not None
