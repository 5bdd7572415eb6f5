"""The built-in worlds' lexicons: concepts with the words documents use and the different words searchers use.

lexicon.yaml is English, lexicon_chinese.yaml a second one in a script without spaces; a lexicon of one's own is a file
of the same form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from ranking.errors import InputError

LEXICONS = {"english": Path(__file__).with_name("lexicon.yaml")}
LEXICONS["chinese"] = LEXICONS["english"].with_name("lexicon_chinese.yaml")

Kind = Literal["head", "attribute", "setting"]


@dataclass(frozen=True)
class Grammar:
    """How words become titles, sentences and queries; the defaults are English. A lexicon's key `grammar` sets others.

    preposition: pattern of what stands before a setting in a document and is not typed; word_gap: what stands between
    the words of a query, "" in a script without spaces; sentence_gap: between sentences; settings_first: a query's
    settings stand before its other words; list_comma, list_and: between adjectives, and before the last one; place: a
    setting's phrase in a text; titles: four forms of {adjective}, {adjectives} (the first two), {thing}, {place} and
    {name}; sentence: of {opening}, {adjectives}, {thing} and {place}.
    """

    preposition: str = r"^(?:for|in|on|near|around) (?:the |a )?"
    word_gap: str = " "
    sentence_gap: str = " "
    settings_first: bool = False
    list_comma: str = ", "
    list_and: str = " and "
    place: str = " {place}"
    titles: tuple[str, ...] = (
        "{adjective} {thing}{place} by {name}", "{name}: {thing}{place}", "{name} {adjectives} {thing}",
        "{thing}{place}, {adjective}",
    )  # fmt: skip
    sentence: str = "{opening} {adjectives} {thing}{place}."

    def listed(self, adjectives: Sequence[str]) -> str:
        """All of them in one phrase."""
        *front, last = adjectives
        return f"{self.list_comma.join(front)}{self.list_and}{last}" if front else last

    def words(self, text: str) -> list[str]:
        """The words of a text; in a script without spaces, its pairs of letters."""
        if self.word_gap:
            return text.split()
        return [text[start : start + 2] for start in range(max(1, len(text) - 1))]

    def bag(self, text: str) -> str:
        """The words in an order of their own, or the letters where no space parts words: equal for reworded text."""
        return " ".join(sorted(text.split() if self.word_gap else text))


@dataclass(frozen=True)
class Concept:
    """One meaning. A head is what a document is about; attributes and settings modify it.

    number: index in Lexicon.concepts; domain: index in Lexicon.domains; family: number of the head's family, -1 for
    modifiers; documents: phrases that documents use; typed: phrases that searchers use, typed[0] being the document
    word itself and the rest synonyms that stand in no document for this concept.
    """

    number: int
    domain: int
    kind: Kind
    family: int
    documents: tuple[str, ...]
    typed: tuple[str, ...]


@dataclass(frozen=True)
class Domain:
    """A field such as travel: its concepts by kind, invented proper names, and sentence material."""

    name: str
    heads: tuple[Concept, ...]
    attributes: tuple[Concept, ...]
    settings: tuple[Concept, ...]
    names: tuple[str, ...]
    openings: tuple[str, ...]
    companion: tuple[str, ...]
    incidental: tuple[str, ...]
    fillers: tuple[str, ...]


@dataclass(frozen=True)
class Lexicon:
    """All concepts by number, the domains that they belong to, and the grammar of their texts."""

    domains: tuple[Domain, ...]
    concepts: tuple[Concept, ...]
    grammar: Grammar = Grammar()

    def synonyms(self) -> list[tuple[int, int]]:
        """Every (concept number, index in typed) that is not the document word."""
        return [(c.number, form) for c in self.concepts for form in range(1, len(c.typed))]

    def draw_hidden(self, hidden_share: float, rng: np.random.Generator) -> set[tuple[int, int]]:
        """The synonyms kept out of the judged train queries: hidden_share of each concept's, at least one each."""
        hidden = set()
        for concept in self.concepts:
            forms = np.arange(1, len(concept.typed))
            count = min(len(forms), max(1, round(hidden_share * len(forms)))) if hidden_share > 0 else 0
            hidden |= {(concept.number, int(form)) for form in rng.permutation(forms)[:count]}
        return hidden


def load_lexicon(name: str = "english") -> Lexicon:
    """Read a lexicon: english, chinese, or a file's path.

    InputError: no such file, a key that is missing or unknown, or a line without words on one of its two sides.
    """
    path = LEXICONS.get(name) or Path(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _read_lexicon(path, content)
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise InputError(
            f"{path}: not a lexicon ({', '.join(LEXICONS)} are built in; training/world/lexicon.yaml shows the form): "
            f"{' '.join(repr(problem).split())[:300]}"
        ) from problem


def _read_lexicon(path: Path, content: dict) -> Lexicon:
    if not isinstance(content, dict):
        raise ValueError("domains by name are expected")
    said = dict(content.pop("grammar", {}))
    grammar = Grammar(**said | ({"titles": tuple(said["titles"])} if "titles" in said else {}))
    preposition = re.compile(grammar.preposition)
    if len(grammar.titles) != 4:
        raise ValueError(f"grammar: {len(grammar.titles)} titles, 4 forms are needed")
    concepts: list[Concept] = []
    domains = []
    families = 0

    def read(line: str, kind: Kind, domain: int, family: int = -1) -> Concept:
        documents, synonyms = ([w.strip() for w in side.split("|")] for side in line.split("="))
        if not all(documents) or not all(synonyms):
            raise ValueError(f"{path}: {line!r}: words are needed on both sides of '='")
        plain = preposition.sub("", documents[0]) if kind == "setting" else documents[0]
        concept = Concept(len(concepts), domain, kind, family, tuple(documents), (plain, *synonyms))
        concepts.append(concept)
        return concept

    for number, (name, domain) in enumerate(content.items()):
        heads = []
        for lines in domain["families"].values():
            heads += [read(line, "head", number, families) for line in lines]
            families += 1
        attributes = [read(line, "attribute", number) for line in domain["attributes"]]
        settings = [read(line, "setting", number) for line in domain["settings"]]
        material = {part: tuple(domain[part]) for part in ("names", "openings", "companion", "incidental", "fillers")}
        domains.append(Domain(name, tuple(heads), tuple(attributes), tuple(settings), **material))
    return Lexicon(tuple(domains), tuple(concepts), grammar)
