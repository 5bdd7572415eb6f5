"""Documents of the built-in world: what each is about, and readable text that says so."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from training.world.lexicon import Concept, Domain, Lexicon

# Shares of documents; together with the phrasing below they give a title of about 6 words and a summary of about 15.
ATTRIBUTE_COUNTS = (0.15, 0.60, 0.25)  # one, two, three
HAS_SETTING = 0.75
HAS_FILLER = 0.4
HAS_COMPANION = 0.25
HAS_INCIDENTAL = 0.25
TITLE_SHAPES = (0.35, 0.65, 0.85)  # below the first the first form of a title, and so on
SECOND_WORD = 0.3  # a mention uses the concept's second document word rather than the first
EVEN = 4  # popularity of a concept is 1 / (rank + EVEN): a small model meets the head often, and yet there is a tail


@dataclass(frozen=True)
class Documents:
    """The corpus, by document number.

    head, setting, companion: concept numbers [n], -1 for none. A companion is another head that a sentence offers
    beside the main one: a weak match. has: bool [n, concepts], the attributes and the setting of each document.
    incidental: (concept, form) [n, 2], a head named in passing by one of its *searcher's* words: a word match that is
    no concept match; -1 for none.
    """

    head: np.ndarray
    setting: np.ndarray
    companion: np.ndarray
    has: np.ndarray
    incidental: np.ndarray
    doc_ids: pa.Array
    titles: pa.Array
    summaries: pa.Array

    def __len__(self) -> int:
        return len(self.head)


def popularity(count: int, rng: np.random.Generator, even: float = EVEN) -> np.ndarray:
    """A long-tailed distribution over count things in random order: float64 [count], sum one; even flattens it."""
    weights = 1 / (np.arange(count) + even)
    return rng.permutation(weights / weights.sum())


def make_documents(lexicon: Lexicon, count: int, rng: np.random.Generator) -> Documents:
    """Draw count documents, domains in equal parts."""
    head, setting, companion = (np.full(count, -1, dtype=np.int32) for _ in range(3))
    incidental = np.full((count, 2), -1, dtype=np.int32)
    has = np.zeros((count, len(lexicon.concepts)), dtype=bool)
    attributes: list[list[int]] = [[] for _ in range(count)]
    domain_of = rng.integers(len(lexicon.domains), size=count)
    for number, domain in enumerate(lexicon.domains):
        rows = np.flatnonzero(domain_of == number)
        n = len(rows)
        heads = np.array([c.number for c in domain.heads])
        share = popularity(len(heads), rng)
        head[rows] = rng.choice(heads, n, p=share)
        settings = np.array([c.number for c in domain.settings])
        drawn = rng.choice(settings, n, p=popularity(len(settings), rng))
        setting[rows] = np.where(rng.random(n) < HAS_SETTING, drawn, -1)
        companion[rows] = _another(heads, head[rows], HAS_COMPANION, rng)
        named = _another(heads, head[rows], HAS_INCIDENTAL, rng)
        incidental[rows, 0] = np.where(named == companion[rows], -1, named)
        incidental[rows, 1] = rng.integers(1 << 30, size=n)
        order = _weighted_orders(popularity(len(domain.attributes), rng), n, rng)
        how_many = rng.choice(len(ATTRIBUTE_COUNTS), n, p=ATTRIBUTE_COUNTS) + 1
        first = domain.attributes[0].number
        for row, ranked, many in zip(rows, order + first, how_many):
            attributes[row] = ranked[:many].tolist()
    for row, drawn_attributes in enumerate(attributes):
        has[row, drawn_attributes] = True
    has[np.flatnonzero(setting >= 0), setting[setting >= 0]] = True
    forms = np.array([len(concept.typed) for concept in lexicon.concepts])
    incidental[:, 1] = np.where(incidental[:, 0] >= 0, incidental[:, 1] % forms[incidental[:, 0]], -1)

    titles, summaries = [], []
    for row in range(count):
        facts = (head[row], attributes[row], setting[row], companion[row], incidental[row])
        title, summary = _write(lexicon, lexicon.domains[domain_of[row]], facts, rng.random(16).tolist())
        titles.append(title)
        summaries.append(summary)
    width = max(5, len(str(count)))
    doc_ids = pa.array([f"d{row:0{width}d}" for row in range(count)])
    return Documents(head, setting, companion, has, incidental, doc_ids, pa.array(titles), pa.array(summaries))


def _another(heads: np.ndarray, main: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """For a share of the documents a head other than their own, else -1."""
    drawn = rng.choice(heads, len(main))
    return np.where((rng.random(len(main)) < share) & (drawn != main), drawn, -1)


def _weighted_orders(share: np.ndarray, rows: int, rng: np.random.Generator) -> np.ndarray:
    """rows independent orders drawn without replacement by share (Gumbel top-k); int [rows, len(share)]."""
    return np.argsort(-(np.log(share) + rng.gumbel(size=(rows, len(share)))), axis=1)


def _write(lexicon: Lexicon, domain: Domain, facts: tuple, luck: list[float]) -> tuple[str, str]:
    """Title and summary of one document. luck: uniform random numbers, consumed in a fixed order."""
    head, attributes, setting, companion, (named, named_form) = facts
    take = iter(luck)
    concepts = lexicon.concepts

    def pick(choices: tuple[str, ...]) -> str:
        return choices[int(next(take) * len(choices))]

    def word(concept: Concept) -> str:
        return concept.documents[1 if next(take) < SECOND_WORD else 0]

    grammar = lexicon.grammar
    place = grammar.place.format(place=word(concepts[setting])) if setting >= 0 else ""
    adjectives = [word(concepts[number]) for number in attributes]
    thing, name, shape = word(concepts[head]), pick(domain.names), next(take)
    form = grammar.titles[int(np.searchsorted(TITLE_SHAPES, shape, side="right"))]
    first_two = grammar.list_and.join(adjectives[:2])
    title = form.format(adjective=adjectives[0], adjectives=first_two, thing=thing, place=place, name=name)
    sentences = [
        grammar.sentence.format(
            opening=pick(domain.openings),
            adjectives=grammar.listed(adjectives),
            thing=word(concepts[head]),
            place=place,
        )
    ]
    if next(take) < HAS_FILLER:
        sentences.append(pick(domain.fillers))
    if companion >= 0:
        sentences.append(pick(domain.companion).format(x=word(concepts[companion])))
    if named >= 0:
        sentences.append(pick(domain.incidental).format(x=concepts[named].typed[named_form]))
    return title[0].upper() + title[1:], grammar.sentence_gap.join(sentences)
