"""The built-in world's lexicon: concepts with the words documents use and the different words searchers use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

LEXICON_PATH = Path(__file__).with_name("lexicon.yaml")

Kind = Literal["head", "attribute", "setting"]

_PREPOSITION = re.compile(r"^(?:for|in|on|near|around) (?:the |a )?")


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
    """All concepts by number, and the domains that they belong to."""

    domains: tuple[Domain, ...]
    concepts: tuple[Concept, ...]

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


def load_lexicon(path: Path = LEXICON_PATH) -> Lexicon:
    """Read the lexicon. ValueError names a line that has no words for one of the two sides."""
    concepts: list[Concept] = []
    domains = []
    families = 0

    def read(line: str, kind: Kind, domain: int, family: int = -1) -> Concept:
        documents, synonyms = ([w.strip() for w in side.split("|")] for side in line.split("="))
        if not all(documents) or not all(synonyms):
            raise ValueError(f"{path}: {line!r}: words are needed on both sides of '='")
        plain = _PREPOSITION.sub("", documents[0]) if kind == "setting" else documents[0]
        concept = Concept(len(concepts), domain, kind, family, tuple(documents), (plain, *synonyms))
        concepts.append(concept)
        return concept

    for number, (name, content) in enumerate(yaml.safe_load(path.read_text(encoding="utf-8")).items()):
        heads = []
        for lines in content["families"].values():
            heads += [read(line, "head", number, families) for line in lines]
            families += 1
        attributes = [read(line, "attribute", number) for line in content["attributes"]]
        settings = [read(line, "setting", number) for line in content["settings"]]
        material = {part: tuple(content[part]) for part in ("names", "openings", "companion", "incidental", "fillers")}
        domains.append(Domain(name, tuple(heads), tuple(attributes), tuple(settings), **material))
    return Lexicon(tuple(domains), tuple(concepts))
