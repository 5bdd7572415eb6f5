"""Queries of the built-in world: what is meant, how it is typed, which documents compete, and what each is worth."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from training.world.documents import Documents
from training.world.lexicon import Concept, Lexicon

CONCEPTS_PER_QUERY = (0.25, 0.45, 0.30)  # shares of queries with one, two and three concepts
HEAD_FIRST = 0.2  # share typed as "boots waterproof" rather than "waterproof boots"
OTHER_DOMAINS = 0.2  # share of the padding candidates drawn from the whole corpus


@dataclass(frozen=True)
class Query:
    """What is meant and how it is typed.

    head: the concept meant; modifiers: 0 to 2 attributes or settings; forms: (concept, index in typed) used; order: the
    concepts in the order in which their words stand in the text.
    """

    head: int
    modifiers: tuple[int, ...]
    forms: tuple[tuple[int, int], ...]
    order: tuple[int, ...]
    text: str

    def intent(self) -> tuple[int, tuple[int, ...]]:
        """What is meant, whatever the words: two queries of one intent ask for the same documents."""
        return self.head, self.modifiers

    def typed_with(self, lexicon: Lexicon) -> Query:
        """The same wish in the searchers' words of another lexicon with the same concepts."""

        def form_of(concept: int, form: int) -> tuple[int, int]:
            others = len(lexicon.concepts[concept].typed) - 1  # a concept may have fewer synonyms there
            return concept, 1 + (form - 1) % others if form else 0

        return query_of(lexicon, self.head, self.modifiers, dict(form_of(*form) for form in self.forms), self.order)


def query_of(
    lexicon: Lexicon, head: int, modifiers: tuple[int, ...], form_of: dict[int, int], order: tuple[int, ...]
) -> Query:
    """The query of these concepts, each typed by its form; order: where the words stand."""
    words = [lexicon.concepts[number].typed[form_of[number]] for number in order]
    return Query(
        head, modifiers, tuple((n, form_of[n]) for n in (head, *modifiers)), order, lexicon.grammar.word_gap.join(words)
    )


def grade(query: Query, documents: Documents, rows: np.ndarray, family: np.ndarray) -> np.ndarray:
    """Grades 0..4 of document rows by concept overlap, int8 [n].

    About the query's head: 4 with every modifier, 3 with one of two, 2 with none. Otherwise 1 if the head is offered as
    a companion, or if the document is about a sibling of the same family and has every modifier; else 0.
    family: int [concepts].
    """
    about = documents.head[rows] == query.head
    wanted = len(query.modifiers)
    matched = documents.has[rows][:, list(query.modifiers)].sum(1) if wanted else np.zeros(len(rows), dtype=np.int64)
    near = documents.companion[rows] == query.head
    if wanted:
        near = near | ((family[documents.head[rows]] == family[query.head]) & (matched == wanted))
        full = 2 + (matched > 0) + (matched == wanted)
    else:
        full = np.full(len(rows), 4)
    return np.where(about, full, near).astype(np.int8)


@dataclass
class Corpus:
    """Documents with the look-ups that candidate generation needs. Built once; pools are row numbers.

    lexicon: the searchers' words; documents: written with the words of the first lexicon; moved: concept -> the concept
    whose synonyms it had there, where they differ (training/world/drift.py).
    """

    lexicon: Lexicon
    documents: Documents
    moved: dict[int, int] = field(default_factory=dict)
    family: np.ndarray = field(init=False)
    of_head: dict[int, np.ndarray] = field(init=False)
    of_companion: dict[int, np.ndarray] = field(init=False)
    of_modifier: dict[int, np.ndarray] = field(init=False)
    of_domain: list[np.ndarray] = field(init=False)
    _named: dict[tuple[int, int], np.ndarray] = field(init=False)
    _siblings: dict[tuple[int, tuple[int, ...]], np.ndarray] = field(default_factory=dict)
    _lookalikes: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        concepts, documents = self.lexicon.concepts, self.documents
        self.family = np.array([concept.family for concept in concepts])
        self.of_head = _rows_by(documents.head)
        self.of_companion = _rows_by(documents.companion)
        self.of_modifier = {c.number: np.flatnonzero(documents.has[:, c.number]) for c in concepts if c.kind != "head"}
        domain = np.array([concept.domain for concept in concepts])[documents.head]
        self.of_domain = [np.flatnonzero(domain == number) for number in range(len(self.lexicon.domains))]
        pairs = defaultdict(list)
        for row in np.flatnonzero(documents.incidental[:, 0] >= 0):
            pairs[(int(documents.incidental[row, 0]), int(documents.incidental[row, 1]))].append(row)
        self._named = {key: np.array(rows) for key, rows in pairs.items()}

    def siblings(self, query: Query) -> np.ndarray:
        """Documents about another head of the family that have every modifier."""
        family = int(self.family[query.head])
        key = (family, query.modifiers)
        if key not in self._siblings:
            mask = self.family[self.documents.head] == family
            for modifier in query.modifiers:
                mask = mask & self.documents.has[:, modifier]
            self._siblings[key] = np.flatnonzero(mask)
        rows = self._siblings[key]
        return rows[self.documents.head[rows] != query.head]

    def lookalikes(self, query: Query) -> np.ndarray:
        """Documents of other heads that hold a word the query typed for its head: word matches without the concept."""
        key = next(form for form in query.forms if form[0] == query.head)
        if key not in self._lookalikes:
            grammar = self.lexicon.grammar
            typed = set(grammar.words(self.lexicon.concepts[key[0]].typed[key[1]]))
            written = (self.moved.get(key[0], key[0]), key[1]) if key[1] else key
            pools = [self._named.get(written, _NONE)]
            for concept in self.lexicon.concepts:
                shares = any(typed & set(grammar.words(words)) for words in concept.documents)
                if concept.kind == "head" and shares and concept.number != query.head:
                    pools.append(self.of_head.get(concept.number, _NONE)[:200])
            self._lookalikes[key] = np.concatenate(pools)
        return self._lookalikes[key]

    def candidates(self, query: Query, count: int, luck: random.Random) -> list[int]:
        """count distinct document rows that compete for the query, in no order: good, near, and misleading ones."""
        chosen: dict[int, None] = {}

        def take(pool: np.ndarray, most: int) -> None:
            for _ in range(min(most, len(pool)) if len(pool) else 0):
                if len(chosen) < count:
                    chosen.setdefault(int(pool[int(luck.random() * len(pool))]))

        about = self.of_head.get(query.head, _NONE)
        grades = grade(query, self.documents, about, self.family)
        # shares of a page of 20; small enough that a random order scores low
        for value, share in ((4, 0.15), (3, 0.10), (2, 0.10)):
            take(about[grades == value], max(1, round(share * count)))
        take(self.of_companion.get(query.head, _NONE), max(1, count // 12))
        take(self.siblings(query), max(1, count // 7))
        take(self.lookalikes(query), max(1, count // 7))
        for modifier in query.modifiers:
            take(self.of_modifier[modifier], max(1, count // 10))
        home = self.of_domain[self.lexicon.concepts[query.head].domain]
        tries = 0
        while len(chosen) < min(count, len(self.documents)):
            tries += 1  # a tiny corpus is walked through in the end
            row = int(luck.random() * len(self.documents))
            if luck.random() >= OTHER_DOMAINS and tries < 20 * count:
                row = int(home[int(luck.random() * len(home))])
            chosen.setdefault(row)
        rows = list(chosen)
        luck.shuffle(rows)
        return rows


_NONE = np.empty(0, dtype=np.int64)


def _rows_by(values: np.ndarray) -> dict[int, np.ndarray]:
    order = np.argsort(values, kind="stable")
    numbers, starts = np.unique(values[order], return_index=True)
    return {int(n): rows for n, rows in zip(numbers, np.split(order, starts[1:])) if n >= 0}


def draw_query(
    corpus: Corpus, lexical_share: float, hidden: set[tuple[int, int]], luck: random.Random, judged: bool
) -> Query:
    """A query that at least one document answers in full, in the words of a searcher.

    Each concept is typed by its document word with probability lexical_share, else by a synonym; judged train queries
    (`judged`) use no synonym of `hidden`.
    """
    documents, concepts = corpus.documents, corpus.lexicon.concepts
    row = int(luck.random() * len(documents))
    head = int(documents.head[row])
    owned = np.flatnonzero(documents.has[row]).tolist()
    luck.shuffle(owned)
    modifiers = tuple(sorted(owned[: luck.choices((0, 1, 2), CONCEPTS_PER_QUERY)[0]]))

    def typed(concept: Concept) -> tuple[int, int]:
        forms = [form for form in range(1, len(concept.typed)) if not (judged and (concept.number, form) in hidden)]
        if not forms or luck.random() < lexical_share:
            return concept.number, 0
        return concept.number, forms[int(luck.random() * len(forms))]

    forms = dict(typed(concepts[number]) for number in (head, *modifiers))
    attributes = [m for m in modifiers if concepts[m].kind == "attribute"]
    settings = [m for m in modifiers if concepts[m].kind == "setting"]
    front, back = (attributes, []) if luck.random() >= HEAD_FIRST else ([], attributes)
    in_order = (
        (*settings, *front, head, *back) if corpus.lexicon.grammar.settings_first else (*front, head, *back, *settings)
    )
    return query_of(corpus.lexicon, head, modifiers, forms, in_order)
