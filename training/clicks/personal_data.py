"""Patterns of personal data in queries: which query names a person, a number or an address (docs/privacy.md).

The patterns are Microsoft Presidio's (extra `privacy`): its rules alone, without a language model, so nothing is
downloaded. Two rules are added here: runs of seven and more digits, whatever they count, and street addresses. Names of
people follow no pattern; only the number of users who asked keeps those out (privacy_gate.py).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from functools import cached_property
from importlib.util import find_spec
from typing import Any, NamedTuple

from ranking.errors import InputError

WORTH_A_LOOK = re.compile(r"[\d@]")  # every rule needs one of them
_DIGIT = re.compile(r"\d")
# queries come in lower case, and an IBAN is only known in capitals; those of ASCII keep every character's place
_CAPITALS = str.maketrans(string.ascii_lowercase, string.ascii_uppercase)
# with spaces only where digits start as telephone numbers do, or come in fours: "iso 27001 2022" is no such number
_DIGITS = (
    r"(?<![\w.])(?:\d(?:[().\-/]?\d){6,}|(?:\+|\(?0)\d(?:[\s().\-/]{0,2}\d){5,}|\d{4}(?: \d{4}){2,}(?: \d+)?)(?!\w)"
)
_STREET = (
    r"\b\d{1,5}[a-z]?,?\s+(?:[\w.'-]+\s+){1,3}(?:street|st|road|rd|avenue|ave|lane|ln|drive|dr|boulevard|blvd|way|court"
    r"|ct|square|sq|terrace|close|crescent)\b"
    r"|\b[\w-]{3,}\s?(?:straße|strasse|str\.|weg|gasse|allee|platz)\s*\d{1,4}\s?[a-z]?\b"
    r"|\b\d{1,4},?\s+(?:bis\s+)?(?:rue|avenue|boulevard|chemin|impasse|quai)\s+\w+"
    r"|\b(?:calle|carrer|avenida|via|viale|piazza|rua)\s+(?:[\w'-]+\s+){1,4}\d{1,4}\b"
)


class _Rule(NamedTuple):
    """A recogniser and what it cannot do without. digits: as many; marks: one of these characters, or none needed.

    Most queries have too little for most rules: looking for telephone numbers alone takes 0.2 ms.
    """

    recogniser: Any
    digits: int = 0
    marks: str = ""

    def may_find(self, text: str, digits: int) -> bool:
        """Whether the text, with so many digits, has what the recogniser needs."""
        return digits >= self.digits and (not self.marks or any(mark in text for mark in self.marks))


class PersonalData:
    """Finds personal data in text. InputError if Presidio is not installed.

    Presidio is imported with the first text that is worth a look: it takes seconds.
    """

    def __init__(self) -> None:
        if find_spec("presidio_analyzer") is None:
            raise InputError(
                "personal data are recognised by presidio-analyzer, which is not installed: pip install "
                "'disranker[privacy]', or --privacy.personal-data keep where queries hold none"
            )

    @cached_property
    def _rules(self) -> list[_Rule]:
        from presidio_analyzer import Pattern, PatternRecognizer
        from presidio_analyzer import predefined_recognizers as presidio

        def rule(entity: str, patterns: list[Pattern]) -> PatternRecognizer:
            return PatternRecognizer(supported_entity=entity, patterns=patterns, name=entity)

        return [
            # its patterns alone: the recogniser itself would fetch the list of top-level domains from the network
            _Rule(rule("EMAIL_ADDRESS", presidio.EmailRecognizer.PATTERNS), marks="@"),
            _Rule(presidio.CreditCardRecognizer(), digits=12),
            _Rule(presidio.IbanRecognizer(), digits=2),
            _Rule(presidio.IpRecognizer(), marks=".:"),
            _Rule(presidio.MacAddressRecognizer(), marks=".:-"),
            _Rule(presidio.UsSsnRecognizer(), digits=9),
            _Rule(presidio.UkNinoRecognizer(), digits=6),
            _Rule(presidio.PhoneRecognizer(), digits=4),  # Germany has numbers of four
            _Rule(rule("STREET_ADDRESS", [Pattern("street and number", _STREET, 0.6)]), digits=1),
            _Rule(rule("NUMBER", [Pattern("seven and more digits", _DIGITS, 0.5)]), digits=6),
        ]

    def spans(self, text: str) -> list[tuple[int, int, str]]:
        """Start, end and kind of what was found, in order and without overlaps; the earlier rule wins."""
        if not WORTH_A_LOOK.search(text):
            return []
        found: list[tuple[int, int, str]] = []
        capitals, digits = text.translate(_CAPITALS), len(_DIGIT.findall(text))
        for rule in self._rules:
            if not rule.may_find(text, digits):
                continue
            for hit in rule.recogniser.analyze(capitals, rule.recogniser.supported_entities, None) or []:
                if all(hit.end <= start or hit.start >= end for start, end, _ in found):
                    found.append((hit.start, hit.end, hit.entity_type))
        return sorted(found)

    def masked(self, text: str, spans: list[tuple[int, int, str]]) -> str:
        """The text with each span replaced by its kind in angle brackets."""
        for start, end, kind in reversed(spans):
            text = f"{text[:start]}<{kind.lower()}>{text[end:]}"
        return text


def kinds(spans: list[tuple[int, int, str]]) -> Counter[str]:
    """How many queries a list of spans counts for, by kind: each kind once."""
    return Counter({kind for _, _, kind in spans})
